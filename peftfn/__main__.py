"""The command line: `peftfn demo`, also as `python -m peftfn demo`."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="peftfn", description="Adapters as values, methods as pure functions.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    command = commands.add_parser(
        "demo",
        help="train several adapters on real texts, and check what must hold",
        description="Trains several methods and seeds on a frozen sentence encoder, on two real tasks; prints a table, "
        "writes a plot and the adapters. Needs no network and no GPU.",
    )
    command.add_argument("--out", type=Path, default="demo_out", metavar="DIR", help="output folder (%(default)s)")
    command.add_argument("--seeds", type=_positive, metavar="N", help="adapters a method, trained at once")
    command.add_argument("--steps", type=_positive, metavar="N", help="training steps")
    command.add_argument("--quick", action="store_true", help="a few texts and steps: seconds, but no result")
    command.set_defaults(run=_demo)
    options = parser.parse_args(argv)
    code: int = options.run(options)
    return code


def _demo(options: argparse.Namespace) -> int:
    try:
        from peftfn.demo import Settings, run
    except ModuleNotFoundError as e:
        print(f"peftfn demo needs {e.name}: pip install 'peftfn[demo]'", file=sys.stderr)
        return 1
    settings = Settings.quick() if options.quick else Settings()
    given = {k: v for k in ("seeds", "steps") if (v := getattr(options, k)) is not None}
    try:
        return run(options.out, replace(settings, **given))
    except ModuleNotFoundError as e:
        print(e, file=sys.stderr)
        return 1


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


if __name__ == "__main__":
    sys.exit(main())
