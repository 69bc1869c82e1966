"""python -m matrix SDIST [TEXT …]: what becomes of the rows of PEFT's tests whose names have one of the texts."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from .cases import Case, cases
from .outcomes import outcomes
from .recorded import recorded

RESULTS = Path(__file__).parents[2] / "benchmarks"
SOURCES: dict[str, Callable[[Path], Iterator[Case]]] = {"tables": cases, "tests": recorded}
"""The rows of PEFT's tables, and what its other tests adapt."""


def main() -> int:
    p = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    p.add_argument("sdist", type=Path, help="PEFT's source distribution, unpacked")
    p.add_argument("texts", nargs="*", help="parts of names; all rows if none is given")
    p.add_argument("--only", choices=SOURCES, help="one of the two sources of rows; both if it is not given")
    p.add_argument("--write", action="store_true", help="write benchmarks/peft_tables.json and peft_tests.json")
    p.add_argument("--details", action="store_true", help="print what each check that does not hold says")
    options = p.parse_args()
    torch.set_num_threads(1)
    bad = False
    for source in [options.only] if options.only else SOURCES:
        rows = [
            c for c in SOURCES[source](options.sdist) if not options.texts or any(t in c.name for t in options.texts)
        ]
        record = run(rows, options.details)
        if options.write:
            text = json.dumps(record, indent=1, ensure_ascii=False)
            (RESULTS / f"peft_{source}.json").write_text(text + "\n")
        bad |= any(c.get("wrong", 0) or c.get("crash", 0) for c in record["counts"].values())
    return int(bad)


def run(rows: list[Case], details: bool) -> dict[str, Any]:
    """What became of each check of some rows; a line for each."""
    found, counts = {}, dict[str, Counter[str]]()
    for i, case in enumerate(rows, 1):
        bad = {}
        for check, outcome in outcomes(case):
            counts.setdefault(check, Counter())[outcome.status] += 1
            if outcome.status != "holds":
                bad[check] = outcome._asdict()
        if bad:
            found[case.name] = bad
        told = ", ".join(f"{check} {v['status']}" for check, v in bad.items())
        print(f"{i}/{len(rows)} {case.name}: {told or 'holds'}", flush=True)
        if details:
            for check, v in bad.items():
                print(f"    {check}: {v['detail']}")
    for check, counter in counts.items():
        print(f"{check:9}", ", ".join(f"{n} {status}" for status, n in sorted(counter.items())))
    packages = {n: version(n) for n in ("peftfn", "peft", "torch", "transformers")}
    record = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "versions": packages, "rows": len(rows)}
    return record | {"counts": {k: dict(v) for k, v in counts.items()}, "not_holding": found}


if __name__ == "__main__":
    sys.exit(main())
