"""The command line, `peftfn` followed by a command; also as `python -m peftfn …`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from peftfn import __version__
from peftfn.cli import on_adapters, on_models, training

COMMANDS = (
    *(training.add_demo, training.add_compare),
    *(on_adapters.add_inspect, on_adapters.add_convert, on_adapters.add_merge, on_adapters.add_extract),
    *(on_models.add_suggest, on_models.add_verify, on_adapters.add_combine, on_models.add_serve),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0; 1 if the answer is no; 2, after one line on stderr, for bad input."""
    options = _parser().parse_args(argv)
    try:
        code: int = options.run(options)
    except options.expected as e:
        what: Any = e.args[0] if isinstance(e, KeyError) and e.args else e
        if isinstance(e, OSError) and e.filename and e.strerror:  # the system's own, with a number in front
            what = f"{e.filename}: {e.strerror}"
        print(f"peftfn {options.command}: {' '.join(str(what).split())}", file=sys.stderr)
        return 2
    return code


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="peftfn", description="Adapters as values, methods as pure functions.")
    parser.add_argument("--version", action="version", version=f"peftfn {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command", dest="command")

    def command(name: str, run: Any, brief: str, description: str) -> argparse.ArgumentParser:
        new = commands.add_parser(name, help=brief, description=description)
        new.add_argument("--version", action="version", version=f"peftfn {__version__}")
        new.set_defaults(run=run, expected=(ValueError, KeyError, OSError))
        return new

    for add in COMMANDS:
        add(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
