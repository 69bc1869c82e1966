"""python -m zoo [KIND …]: a line for each kind, what is not as known.json says, and "N of M hold"."""

import argparse
import json
import logging
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from . import known
from .build import kinds
from .families import CHOSEN
from .outcome import HOLDS, NOT_APPLICABLE
from .sweep import Record, record, sweep

RESULTS = Path(__file__).parents[2] / "benchmarks" / "zoo.json"
PACKAGES = ("peftfn", "torch", "transformers", "peft", "diffusers", "timm", "sentence-transformers")


def versions() -> dict[str, str]:
    out = {}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:  # the rows of what is not installed are not built
            continue
    return out


def write_results(records: list[Record], path: Path) -> None:
    """The file with these records in it: which hold, and what became of the checks that do not hold."""
    old = json.loads(path.read_text()) if path.exists() else {"architectures": {}, "not_built": {}}
    seen = {r.kind for r in records}
    rows = {k: v for k, v in old["architectures"].items() if k not in seen}
    unbuilt = {k: v for k, v in old["not_built"].items() if k not in seen}
    for r in records:
        if r.unbuilt:
            unbuilt[r.kind] = r.unbuilt
        else:
            checks = {n: asdict(o) for n, o in r.checks.items() if o.status not in (HOLDS, NOT_APPLICABLE)}
            rows[r.kind] = {"model": r.model, "holds": r.holds, "seconds": r.seconds, "checks": checks}
    out = {
        **{"date": datetime.now(UTC).strftime("%Y-%m-%d"), "versions": versions()},
        **{"hold": sum(row["holds"] for row in rows.values()), "built": len(rows)},
        **{"architectures": dict(sorted(rows.items())), "not_built": dict(sorted(unbuilt.items()))},
    }
    path.write_text(json.dumps(out, indent=1, ensure_ascii=False) + "\n")


def main() -> int:
    p = argparse.ArgumentParser(prog="make zoo", description=__doc__)
    p.add_argument("kinds", nargs="*", help="those of transformers' model_type, or of rows.MADE; all if none is given")
    p.add_argument("--workers", type=int, default=1)
    p.add_argument("--limit", type=int, default=90, help="CPU seconds a kind")
    p.add_argument("--write", action="store_true", help="write known.json from what is seen")
    o = p.parse_args()
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    record("llama")  # imports what is imported late, once for all children
    records, complaints, listed = [], [], known.read()
    for r in sweep(o.kinds or list(dict.fromkeys([*CHOSEN, *kinds()])), o.workers, o.limit):
        records.append(r)
        print(r, flush=True)
        write_results(records, RESULTS)  # each time, so that a run that is cut short is not lost
        if not r.unbuilt:
            complaints += known.complaints(r.kind, r.checks, listed)
            if o.write:
                listed = known.updated(listed, r.kind, r.checks)
                known.write(listed)
    if not o.write:
        print(*complaints, sep="\n")
    built = [r for r in records if not r.unbuilt]
    print(f"{sum(r.holds for r in built)} of {len(built)} hold; {len(records) - len(built)} could not be built")
    return bool(complaints) and not o.write


if __name__ == "__main__":
    sys.exit(main())
