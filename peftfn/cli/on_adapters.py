"""The commands on adapters: inspect, convert, merge, extract, combine."""

import argparse
import json
from pathlib import Path

from peftfn.cli.arguments import ADAPTER, ANY_BASE, Command, positive

MERGING = ("linear", "magnitude", "ties", "dare", "della", "tsv", "iso_c")
FORMATS = ("native", "peft", "kohya", "swift", "gguf")
ENGINES = ("vllm", "sglang")


def add_inspect(command: Command) -> None:
    new = command(
        "inspect",
        _inspect,
        "what is in an adapter, whether it fits a model, and whether a server takes it",
        "Prints method, ranks, layers and size of an adapter, from its headers. Exit code 1: it does not fit MODEL, "
        "or the server would not take it.",
    )
    new.add_argument("path", metavar="PATH", help=f"{ADAPTER} (kohya's and diffusers': a .safetensors)")
    new.add_argument(
        "--model", type=Path, metavar="MODEL", help="a model's folder or config.json: does the adapter fit?"
    )
    new.add_argument("--for", dest="engine", choices=ENGINES, help="the server: what of the adapter does it not take?")
    new.add_argument(
        "--max-lora-rank", type=positive, metavar="R", help="what that server is started with (vllm: 16 if not given)"
    )
    new.add_argument("--layers", action="store_true", help="list the adapted layers too")
    new.add_argument(
        "--spectrum",
        action="store_true",
        help="figures of each change's singular values and entries; LoRAs in PEFT's format need no MODEL",
    )
    new.add_argument("--json", action="store_true", help="print JSON")


def _inspect(options: argparse.Namespace) -> int:
    from peftfn.cli.inspect import inspect, report

    found = inspect(options.path, options.model, options.engine, options.max_lora_rank, options.spectrum)
    if options.json:
        for facts in found.values():
            facts |= {"spectrum": facts["spectrum"].json()} if "spectrum" in facts else {}
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        texts = [report(name, facts, options.path, options.model, options.layers) for name, facts in found.items()]
        print("\n\n".join(texts))
    return int(any(facts.get("fits", "yes") != "yes" or facts.get("obstacles") for facts in found.values()))


def add_convert(command: Command) -> None:
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
    new.add_argument("--rank", type=positive, metavar="R", help="write the best LoRA of rank R of any method")
    new.add_argument("--layout", choices=("kohya", "diffusers"), help="kohya: whose names (kohya)")
    new.add_argument("--prefix", metavar="NAME", help="kohya: the names' prefix, lora_te for one")
    new.add_argument("--name", metavar="NAME", help="swift: the adapter's name (default)")
    new.add_argument("--any-base", action="store_true", help=ANY_BASE)


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


def add_merge(command: Command) -> None:
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


def _merge(options: argparse.Namespace) -> int:
    from peftfn.cli.merge import merge

    done = merge(options.base, options.adapter, options.out, any_base=options.any_base)
    untied = f"; no longer tied: {', '.join(done['untied'])}" if done["untied"] else ""
    print(f"wrote {options.out}: {len(done['adapted'])} tensors changed, {len(done['files'])} files{untied}")
    return 0


def add_extract(command: Command) -> None:
    new = command(
        "extract",
        _extract,
        "a LoRA from a full fine-tune",
        "Writes the nearest LoRA of what the model of the folder FULL changed of the model of the folder BASE.",
    )
    new.add_argument("full", type=Path, metavar="FULL", help="the fine-tuned model's folder of safetensors")
    new.add_argument("base", type=Path, metavar="BASE", help="the base model's folder of safetensors")
    new.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    new.add_argument("--rank", type=positive, metavar="R", help="the rank of each matrix")
    new.add_argument("--energy", type=float, metavar="E", help="the smallest ranks that hold this share of Σ σ²")
    new.add_argument(
        "--pattern", default="", metavar="P", help="which matrices get a LoRA; others are saved whole (all)"
    )
    new.add_argument("--to", choices=("peft", "native"), default="peft", help="the format to write (%(default)s)")


def _extract(options: argparse.Namespace) -> int:
    from peftfn.cli.extract import extract

    o = options
    print(extract(o.full, o.base, o.out, o.rank, o.energy, o.pattern, o.to))
    return 0


def add_combine(command: Command) -> None:
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
    new.add_argument("--rank", type=positive, metavar="R", help="the nearest LoRA of rank R")
    new.add_argument("--energy", type=float, metavar="E", help="the smallest ranks that hold this share of Σ σ²")
    new.add_argument(
        "--density", type=float, metavar="D", help="magnitude, ties, dare, della: share of entries to keep"
    )
    new.add_argument("--epsilon", type=float, metavar="E", help="della: how far the probabilities reach around D")
    new.add_argument("--elect", choices=("total", "frequency"), help="ties, dare, della: how signs are elected")
    new.add_argument("--space", choices=("dense", "core", "knots", "shared"), help="where those rules' entries are")
    new.add_argument("--beta", type=float, metavar="B", help="shared: how far the changes' sizes count (0)")
    new.add_argument("--keep", type=positive, metavar="K", help="tsv: singular components of each adapter")
    new.add_argument("--seed", type=int, metavar="N", help="dare, della: of what is dropped")
    new.add_argument("--model", type=Path, metavar="MODEL", help="the base model: its folder, or its config.json")
    new.add_argument("--to", choices=("peft", "native"), default="peft", help="the format to write (%(default)s)")


def _combine(options: argparse.Namespace) -> int:
    from peftfn.cli.combine import combine

    words = ("rank", "energy", "density", "epsilon", "elect", "space", "beta", "keep", "seed")
    given = {k: v for k in words if (v := getattr(options, k)) is not None}
    o = options
    print(combine(o.paths, o.out, o.method, o.weights, o.model, o.to, **given))
    return 0
