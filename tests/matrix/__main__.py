"""python -m matrix SDIST [TEXT …]: what becomes of the rows of PEFT's test tables whose names have one of the texts."""

import argparse
import json
import os
import sys
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from .cases import cases
from .checks import outcomes

RESULTS = Path(__file__).parents[2] / "benchmarks" / "peft_tables.json"


def main() -> int:
    p = argparse.ArgumentParser(prog="make matrix", description=__doc__)
    p.add_argument("sdist", type=Path, help="PEFT's source distribution, unpacked")
    p.add_argument("texts", nargs="*", help="parts of names; all rows if none is given")
    p.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    p.add_argument("--details", action="store_true", help="print what each check that does not hold says")
    options = p.parse_args()
    torch.set_num_threads(1)
    rows = [c for c in cases(options.sdist) if not options.texts or any(t in c.name for t in options.texts)]
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
        if options.details:
            for check, v in bad.items():
                print(f"    {check}: {v['detail']}")
    for check, counter in counts.items():
        print(f"{check:9}", ", ".join(f"{n} {status}" for status, n in sorted(counter.items())))
    if options.write:
        packages = {n: version(n) for n in ("peftfn", "peft", "torch", "transformers")}
        record = {"date": datetime.now(UTC).strftime("%Y-%m-%d"), "versions": packages, "rows": len(rows)}
        record |= {"counts": {k: dict(v) for k, v in counts.items()}, "not_holding": found}
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return int(any(c["wrong"] or c["crash"] for c in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
