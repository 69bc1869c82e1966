"""The commands on a model: suggest, verify, serve."""

import argparse
import json
from pathlib import Path

from peftfn.cli.arguments import ADAPTER, ANY_BASE, Command, names, positive


def add_suggest(command: Command) -> None:
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
    new.add_argument("--rank", type=positive, metavar="R", help="its rank; the mean of ranks, without a budget")
    new.add_argument("--modules", type=names, metavar="A,B", help="layers to choose from, or all-linear")
    new.add_argument("--share", type=float, metavar="S", help="condition: this share of the layers (0.2)")
    new.add_argument("--count", type=positive, metavar="N", help="condition: this many layers")
    new.add_argument("--at-most", type=float, metavar="K", help="condition: the layers whose number is at most this")
    new.add_argument("--largest", type=positive, metavar="N", help="condition: leave weights with a longer side out")
    new.add_argument("--budget", type=positive, metavar="N", help="ranks: their sum")
    new.add_argument("--energy", type=float, metavar="E", help="ranks: the smallest that hold this share of Σ σ²")
    new.add_argument("--most", type=positive, metavar="R", help="ranks: the largest of a site")
    new.add_argument("--full", type=Path, metavar="FULL", help="change: the fine-tuned model's folder")
    new.add_argument(
        "--inputs", type=Path, nargs="+", metavar="FILE", help="gradient: a .safetensors of arguments for each batch"
    )
    new.add_argument("--sketch", type=positive, metavar="K", help="gradient: keep a sketch, of this rank")
    new.add_argument("--json", action="store_true", help="print JSON")


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


def add_verify(command: Command) -> None:
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


def _verify(options: argparse.Namespace) -> int:
    from peftfn.cli.verify import verify

    o = options
    given = {"tolerance": o.tolerance, "effects": not o.no_effects, "any_base": o.any_base}
    found = verify(o.adapter, o.model, o.against, o.inputs, **given)
    print(json.dumps(found.json(), indent=2, ensure_ascii=False) if o.json else found)
    return int(not found.ok)


def add_serve(command: Command) -> None:
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
        new.add_argument(option, type=positive, default=default, metavar="N", help=f"{what} (%(default)s)")
    new.add_argument("--context", type=positive, metavar="N", help="tokens of prompt and answer (the model's)")


def _serve(options: argparse.Namespace) -> int:
    from peftfn.cli.serve import serve

    words = ("host", "port", "name", "device", "dtype", "resident", "plans", "rows", "queue", "max_tokens", "max_body")
    given = {k: getattr(options, k) for k in (*words, "aliases", "grace", "context")}
    serve(options.model, options.adapters, **given, say=lambda text: print(f"peftfn serve: {text}", flush=True))
    return 0
