"""Loading one more adapter of PEFT's format, with 1 to 99 there already: `pf.load` against PEFT's `load_adapter`."""

import tempfile
import warnings
from pathlib import Path

import torch
from peft import PeftModel

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, row
from benchmarks.models import agree, llama, pair

COUNTS = (2, 10, 100)
NEXT = "next"


def run(options: Options) -> list[Json]:
    base = llama(2, 128, 352, 4)
    theirs, _, _ = pair(base, dora=False)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of names and bases
        theirs.save_pretrained(place)
        folder = Path(place)
        return measure(options, folder, base, llama(2, 128, 352, 4))


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
