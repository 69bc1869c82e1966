"""The command line, `peftfn` followed by a command; also as `python -m peftfn …`."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from peftfn import __version__

ADAPTER = "an adapter's folder or file, or the hub's owner/name"
ANY_BASE = "the base may have other values than the one that the adapter was made on"
MERGING = ("linear", "magnitude", "ties", "dare", "della", "tsv", "iso_c")
FORMATS = ("native", "peft", "kohya", "swift", "gguf")


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

    new = command(
        "demo",
        _demo,
        "train several adapters on real texts, and check what must hold",
        "Trains several methods and seeds on a frozen sentence encoder, on two real tasks; prints a table, "
        "writes a plot and the adapters. Needs no network and no GPU.",
    )
    new.set_defaults(expected=(OSError,))  # its only input is a folder
    new.add_argument("--out", type=Path, default="demo_out", metavar="DIR", help="output folder (%(default)s)")
    new.add_argument("--seeds", type=_positive, metavar="N", help="adapters a method, trained at once")
    new.add_argument("--steps", type=_positive, metavar="N", help="training steps")
    new.add_argument("--quick", action="store_true", help="a few texts and steps: seconds, but no result")

    new = command(
        "compare",
        _compare,
        "compare methods on real data, each at its own best learning rate",
        "Trains every method on every task at a grid of learning rates and seeds, in a sweep, and writes a record of "
        "each pair and a page. Run it again to go on. Needs no network and no GPU.",
    )
    new.add_argument("--out", type=Path, default="compare_out", metavar="DIR", help="output folder (%(default)s)")
    new.add_argument("--methods", type=_names, metavar="A,B", help="which methods, in this order (all)")
    new.add_argument("--tasks", type=_names, metavar="A,B", help="which of digits, characters, news, reviews (all)")
    new.add_argument("--rates", type=_rates, metavar="X,Y", help="learning rates (3e-4 to 1, two a decade)")
    new.add_argument("--seeds", type=_positive, metavar="N", help="of each rate (3)")
    new.add_argument("--steps", type=_positive, metavar="N", help="of training (60)")
    new.add_argument(
        "--budget", type=float, metavar="MINUTES", help="begin nothing that would end later, by the last on its task"
    )

    new = command(
        "inspect",
        _inspect,
        "what is in an adapter, and whether it fits a model",
        "Prints method, ranks, layers and size of an adapter, from its headers. Exit code 1: it does not fit MODEL.",
    )
    new.add_argument("path", metavar="PATH", help=f"{ADAPTER} (kohya's and diffusers': a .safetensors)")
    new.add_argument(
        "--model", type=Path, metavar="MODEL", help="a model's folder or config.json: does the adapter fit?"
    )
    new.add_argument("--layers", action="store_true", help="list the adapted layers too")
    new.add_argument("--json", action="store_true", help="print JSON")

    new = command(
        "convert",
        _convert,
        "write an adapter in another format",
        "Reads an adapter of any format and writes it in another; its meaning stays, or it is an error.",
    )
    new.add_argument("path", metavar="PATH", help=ADAPTER)
    new.add_argument("out", type=Path, metavar="OUT", help="a new folder (kohya: or a .safetensors file; gguf: a file)")
    new.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    new.add_argument(
        "--model",
        type=Path,
        metavar="MODEL",
        help="the base model: its folder, or its config.json. Without it, the local folder that the adapter names",
    )
    new.add_argument("--rank", type=_positive, metavar="R", help="write the best LoRA of rank R of any method")
    new.add_argument("--layout", choices=("kohya", "diffusers"), help="kohya: whose names (kohya)")
    new.add_argument("--prefix", metavar="NAME", help="kohya: the names' prefix, lora_te for one")
    new.add_argument("--name", metavar="NAME", help="swift: the adapter's name (default)")
    new.add_argument("--any-base", action="store_true", help=ANY_BASE)

    new = command(
        "merge",
        _merge,
        "fold an adapter into a base model's files",
        "Writes the model of the folder BASE with ADAPTER folded in to the new folder OUT, tensor by tensor. Names, "
        "dtypes, shards and other files stay.",
    )
    new.add_argument("base", type=Path, metavar="BASE", help="a folder of safetensors")
    new.add_argument("adapter", metavar="ADAPTER", help=ADAPTER)
    new.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    new.add_argument("--any-base", action="store_true", help=ANY_BASE)

    new = command(
        "extract",
        _extract,
        "a LoRA from a full fine-tune",
        "Writes the nearest LoRA of what the model of the folder FULL changed of the model of the folder BASE.",
    )
    new.add_argument("full", type=Path, metavar="FULL", help="the fine-tuned model's folder of safetensors")
    new.add_argument("base", type=Path, metavar="BASE", help="the base model's folder of safetensors")
    new.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    new.add_argument("--rank", type=_positive, metavar="R", help="the rank of each matrix")
    new.add_argument("--energy", type=float, metavar="E", help="the smallest ranks that hold this share of Σ σ²")
    new.add_argument(
        "--pattern", default="", metavar="P", help="which matrices get a LoRA; others are saved whole (all)"
    )
    new.add_argument("--to", choices=("peft", "native"), default="peft", help="the format to write (%(default)s)")

    new = command(
        "suggest",
        _suggest,
        "which layers to adapt, and with which ranks",
        "Suggests layers of the model of the folder MODEL by the condition numbers of their weights, or ranks by the "
        "singular values of weights, of what a fine-tune changed, or of a gradient.",
    )
    new.add_argument("model", type=Path, metavar="MODEL", help="the model's folder of safetensors")
    new.add_argument(
        "--by", choices=("condition", "weight", "change", "gradient"), default="condition", help="(%(default)s)"
    )
    new.add_argument("--method", default="LoRA", metavar="NAME", help="the method of the rules (%(default)s)")
    new.add_argument("--rank", type=_positive, metavar="R", help="its rank; the mean of ranks, without a budget")
    new.add_argument("--modules", type=_names, metavar="A,B", help="layers to choose from, or all-linear")
    new.add_argument("--share", type=float, metavar="S", help="condition: this share of the layers (0.2)")
    new.add_argument("--count", type=_positive, metavar="N", help="condition: this many layers")
    new.add_argument("--at-most", type=float, metavar="K", help="condition: the layers whose number is at most this")
    new.add_argument("--largest", type=_positive, metavar="N", help="condition: leave weights with a longer side out")
    new.add_argument("--budget", type=_positive, metavar="N", help="ranks: their sum")
    new.add_argument("--energy", type=float, metavar="E", help="ranks: the smallest that hold this share of Σ σ²")
    new.add_argument("--most", type=_positive, metavar="R", help="ranks: the largest of a site")
    new.add_argument("--full", type=Path, metavar="FULL", help="change: the fine-tuned model's folder")
    new.add_argument(
        "--inputs", type=Path, nargs="+", metavar="FILE", help="gradient: a .safetensors of arguments for each batch"
    )
    new.add_argument("--sketch", type=_positive, metavar="K", help="gradient: keep a sketch, of this rank")
    new.add_argument("--json", action="store_true", help="print JSON")

    new = command(
        "verify",
        _verify,
        "whether an adapter is applied, everywhere",
        "Runs the model of the folder MODEL without and with ADAPTER, merged, and by PEFT; prints each site's change "
        "and effect, and how far the ways differ. Exit code 1: there are problems.",
    )
    new.add_argument("adapter", metavar="ADAPTER", help=ADAPTER)
    new.add_argument("--model", type=Path, required=True, metavar="MODEL", help="the base model's folder")
    new.add_argument(
        "--against",
        choices=("peft", "merged"),
        help="compare with this alone; peft must be installed. Else with the merged model, and with PEFT if it can be",
    )
    new.add_argument("--inputs", type=Path, metavar="FILE", help="a .safetensors of the model's arguments by name")
    new.add_argument("--tolerance", type=float, default=0.05, metavar="T", help="share of the effect (%(default)s)")
    new.add_argument("--any-base", action="store_true", help=ANY_BASE)
    new.add_argument("--no-effects", action="store_true", help="do not run the model once for each site")
    new.add_argument("--json", action="store_true", help="print JSON")

    new = command(
        "combine",
        _combine,
        "merge several adapters into one",
        "Merges adapters of one base by a function of peftfn.merging, and writes one adapter. LoRAs in PEFT's format "
        "need no model.",
    )
    new.add_argument("paths", metavar="ADAPTER", nargs="+", help=ADAPTER)
    new.add_argument("--out", type=Path, required=True, metavar="OUT", help="a new folder")
    new.add_argument("--method", choices=MERGING, default="linear", help="%(default)s if not given")
    new.add_argument("--weights", type=float, nargs="+", metavar="W", help="a number for each adapter (1)")
    new.add_argument("--rank", type=_positive, metavar="R", help="the nearest LoRA of rank R")
    new.add_argument("--energy", type=float, metavar="E", help="the smallest ranks that hold this share of Σ σ²")
    new.add_argument(
        "--density", type=float, metavar="D", help="magnitude, ties, dare, della: share of entries to keep"
    )
    new.add_argument("--epsilon", type=float, metavar="E", help="della: how far the probabilities reach around D")
    new.add_argument("--elect", choices=("total", "frequency"), help="ties, dare, della: how signs are elected")
    new.add_argument("--space", choices=("dense", "core", "knots", "shared"), help="where those rules' entries are")
    new.add_argument("--beta", type=float, metavar="B", help="shared: how far the changes' sizes count (0)")
    new.add_argument("--keep", type=_positive, metavar="K", help="tsv: singular components of each adapter")
    new.add_argument("--seed", type=int, metavar="N", help="dare, della: of what is dropped")
    new.add_argument("--model", type=Path, metavar="MODEL", help="the base model: its folder, or its config.json")
    new.add_argument("--to", choices=("peft", "native"), default="peft", help="the format to write (%(default)s)")

    new = command(
        "serve",
        _serve,
        "answer requests over HTTP, each with an adapter of its own",
        "Serves the model MODEL and the adapters in the sub-folders of DIR at OpenAI's routes, on one machine. The "
        "adapter's name is the model of a request. Stops at SIGINT or SIGTERM.",
    )
    new.add_argument("model", metavar="MODEL", help="the base model's folder, or the hub's owner/name")
    new.add_argument("--adapters", type=Path, metavar="DIR", help="its sub-folders are adapters (none: the base alone)")
    new.add_argument("--host", default="127.0.0.1", help="where to listen (%(default)s)")
    new.add_argument("--port", type=int, default=8000, metavar="N", help="0: any (%(default)s)")
    new.add_argument("--name", metavar="NAME", help="the base's name in requests (its folder's)")
    new.add_argument("--device", metavar="D", help="cpu, cuda:0, … (the accelerator, if there is one)")
    new.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="(the file's)")
    for option, default, what in (
        ("--resident", 64, "adapters of one plan in memory at once"),
        ("--plans", 4, "plans that have slots: methods, ranks and targets that do not fit into each other"),
        ("--aliases", 1000, "names that requests may give to folders of other names"),
        ("--rows", 16, "requests that run at once"),
        ("--queue", 256, "requests that wait at most"),
        ("--max-tokens", 1024, "of an answer, at most"),
        ("--max-body", 1 << 20, "bytes of a request, at most"),
        ("--grace", 30, "seconds for answers to end at a stop"),
    ):
        new.add_argument(option, type=_positive, default=default, metavar="N", help=f"{what} (%(default)s)")
    new.add_argument("--context", type=_positive, metavar="N", help="tokens of prompt and answer (the model's)")
    return parser


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


def _compare(options: argparse.Namespace) -> int:
    try:
        from peftfn.compare import page, plot, run
    except ModuleNotFoundError as e:
        print(f"peftfn compare needs {e.name}: pip install 'peftfn[demo]'", file=sys.stderr)
        return 1
    o = options
    given = {k: v for k in ("rates", "seeds", "steps") if (v := getattr(o, k)) is not None}
    names = {k: v for k in ("methods", "tasks") if (v := getattr(o, k)) is not None}
    try:
        records = run.compare(o.out, **names, settings=run.Settings(**given), minutes=o.budget)
    except ModuleNotFoundError as e:
        print(e, file=sys.stderr)
        return 1
    drawn = plot.pareto(records, o.out / page.PICTURE)
    (o.out / "comparison.md").write_text(page.page(records, picture=drawn), encoding="utf-8")
    print(f"written to {o.out}: {len(records)} records, comparison.md{f', {page.PICTURE}' if drawn else ''}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from peftfn.cli.inspect import inspect, report

    found = inspect(options.path, options.model)
    if options.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        texts = [report(name, facts, options.path, options.model, options.layers) for name, facts in found.items()]
        print("\n\n".join(texts))
    return int(any(facts.get("fits", "yes") != "yes" for facts in found.values()))


def _convert(options: argparse.Namespace) -> int:
    from peftfn.cli.convert import convert

    own = {"kohya": ("layout", "prefix"), "swift": ("name",)}
    given = {k: v for k in ("layout", "prefix", "name") if (v := getattr(options, k)) is not None}
    for k in given:
        if k not in own.get(options.to, ()):
            raise ValueError(f"--{k} is not an option of {options.to}")
    o = options
    print(convert(o.path, o.out, o.to, o.model, o.rank, any_base=o.any_base, **given))
    return 0


def _merge(options: argparse.Namespace) -> int:
    from peftfn.cli.merge import merge

    done = merge(options.base, options.adapter, options.out, any_base=options.any_base)
    untied = f"; no longer tied: {', '.join(done['untied'])}" if done["untied"] else ""
    print(f"wrote {options.out}: {len(done['adapted'])} tensors changed, {len(done['files'])} files{untied}")
    return 0


def _extract(options: argparse.Namespace) -> int:
    from peftfn.cli.extract import extract

    o = options
    print(extract(o.full, o.base, o.out, o.rank, o.energy, o.pattern, o.to))
    return 0


def _suggest(options: argparse.Namespace) -> int:
    from peftfn.cli.suggest import suggest

    o, ranks = options, ("budget", "energy", "most")
    own = {"condition": ("share", "count", "at_most", "largest"), "gradient": (*ranks, "sketch")}
    words = ("share", "count", "at_most", "largest", *ranks, "sketch")
    given = {k: v for k in words if (v := getattr(o, k)) is not None}
    for k in given:
        if k not in own.get(o.by, ranks):
            raise ValueError(f"--{k.replace('_', '-')} is not an option of --by {o.by}")
    files = {"full": o.full, "inputs": o.inputs}
    found = suggest(o.model, o.by, method=o.method, rank=o.rank, modules=o.modules, **files, **given)
    print(json.dumps(found.json(), indent=2, ensure_ascii=False) if o.json else found)
    return 0


def _verify(options: argparse.Namespace) -> int:
    from peftfn.cli.verify import verify

    o = options
    given = {"tolerance": o.tolerance, "effects": not o.no_effects, "any_base": o.any_base}
    found = verify(o.adapter, o.model, o.against, o.inputs, **given)
    print(json.dumps(found.json(), indent=2, ensure_ascii=False) if o.json else found)
    return int(not found.ok)


def _combine(options: argparse.Namespace) -> int:
    from peftfn.cli.combine import combine

    words = ("rank", "energy", "density", "epsilon", "elect", "space", "beta", "keep", "seed")
    given = {k: v for k in words if (v := getattr(options, k)) is not None}
    o = options
    print(combine(o.paths, o.out, o.method, o.weights, o.model, o.to, **given))
    return 0


def _serve(options: argparse.Namespace) -> int:
    from peftfn.cli.serve import serve

    words = ("host", "port", "name", "device", "dtype", "resident", "plans", "rows", "queue", "max_tokens", "max_body")
    given = {k: getattr(options, k) for k in (*words, "aliases", "grace", "context")}
    serve(options.model, options.adapters, **given, say=lambda text: print(f"peftfn serve: {text}", flush=True))
    return 0


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _rates(text: str) -> tuple[float, ...]:
    """Numbers above 0."""
    try:
        rates = tuple(float(x) for x in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < r < float("inf") for r in rates):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0")
    return rates


def _positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


if __name__ == "__main__":
    sys.exit(main())
