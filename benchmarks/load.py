"""Loading one more adapter of PEFT's format, with 1 to 99 there already: `pf.load` against PEFT's `load_adapter`, and
the hundredth against the first.
"""

import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, Target, row
from benchmarks.models import agree, llama, pair

COUNTS = (2, 10, 100)
NEXT = "next"
FIRST = "the first"


def run(options: Options) -> list[Json]:
    base = llama(2, 128, 352, 4)
    theirs, _, _ = pair(base, dora=False)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of names and bases
        theirs.save_pretrained(place)
        folder = Path(place)
        rows = alone(options, folder, base, llama(2, 128, 352, 4))
        return measure(options, folder, base, llama(2, 128, 352, 4)) + rows


def alone(options: Options, folder: Path, base: torch.nn.Module, other: torch.nn.Module) -> list[Json]:
    """Ours with COUNTS[-1] adapters kept on one model, against ours on another model that has none."""
    kept = [pf.load(folder, base) for _ in range(COUNTS[-1] - 1)]
    ways = {OURS: lambda: pf.load(folder, base), FIRST: lambda: pf.load(folder, other)}
    what = f"adapter number {COUNTS[-1]} against the first on another copy of the model, {len(kept[0].net.plan)} sites"
    return [row(what, options.compare(ways), target=Target(FIRST, 1.1))]


def measure(options: Options, folder: Path, base: torch.nn.Module, other: torch.nn.Module) -> list[Json]:
    theirs = PeftModel.from_pretrained(other, folder, adapter_name="0")
    kept = [pf.load(folder, base)]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        net, adapter = kept[0]
        agree(net.apply(adapter, ids).logits, theirs(ids).logits, "the loaded adapter")
    sites = len(net.plan)
    rows: list[Json] = []
    for count in COUNTS:
        for n in range(len(kept), count - 1):
            theirs.load_adapter(folder, adapter_name=str(n), low_cpu_mem_usage=True)
            kept.append(pf.load(folder, base))

        def fresh() -> Path:
            if NEXT in theirs.peft_config:
                theirs.delete_adapter(NEXT)
            return folder

        def ours(path: Path) -> pf.Adapter:
            adapter: pf.Adapter = pf.load(path, base).adapter
            return adapter

        ways = {OURS: ours, "PEFT": lambda path: theirs.load_adapter(path, adapter_name=NEXT)}
        rows.append(row(f"adapter number {count}, {sites} sites", options.compare(ways, fresh=fresh)))
        fresh()
    return rows
