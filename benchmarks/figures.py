"""python -m benchmarks.figures [--quick]: remake the comparison and the reproductions: records, pictures and pages.

What is there stays until its half is done. Run it again after an interrupt, and it goes on.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks import comparison
from benchmarks.comparison.__main__ import write_page
from benchmarks.reproductions import __main__ as reproductions
from benchmarks.reproductions import claim
from benchmarks.reproductions.claims import CLAIMS

BUILD = Path(__file__).parents[1] / "build" / "figures"
FEW = ("LoRA", "IA3")
"""Methods of the quick form."""


def main(argv: Sequence[str] | None = None, build: Path = BUILD) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="to see in minutes that it runs; write nothing")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    args = parser.parse_args(argv)

    import torch

    torch.set_num_threads(args.threads)
    start = perf_counter()
    if args.quick:
        quick()
    else:
        compared(build / "comparison")
        reproduced(build / "reproductions")
    print(f"all figures: {(perf_counter() - start) / 60:.0f} minutes", flush=True)


def quick() -> None:
    from peftfn.compare import page, run

    with TemporaryDirectory() as folder:
        few = run.Settings(rates=(1e-3, 1e-2), seeds=1, steps=3)
        print(page.page(run.compare(Path(folder), FEW, settings=few), picture=False), flush=True)
    reproductions.main(["--quick"])


def compared(build: Path) -> None:
    """The comparison first: a reproduction reads its records."""
    from peftfn.compare import run

    run.compare(build)
    _replace(build, comparison.HERE)
    write_page()


def reproduced(build: Path) -> None:
    for name, tried in CLAIMS.items():
        if claim.read(name, build) is None:
            print(f"{name}: {tried.title}", flush=True)
            claim.save(tried.record(name), build)
            rmtree(claim.RUNNING / name, ignore_errors=True)
    _replace(build, claim.RECORDS)
    reproductions.write_page()


def _replace(new: Path, old: Path) -> None:
    """The records of a folder by those of another."""
    for path in old.glob("*.json"):
        path.unlink()
    for path in new.glob("*.json"):
        path.rename(old / path.name)
    rmtree(new)


if __name__ == "__main__":
    main()
