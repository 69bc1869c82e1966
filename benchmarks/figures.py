"""python -m benchmarks.figures [--quick] [--workers 2]: remake the comparison and the reproductions: records, pictures
and pages.

Pairs of a method and a task, and the claims, run in processes side by side, one for each CPU unless you say otherwise.
What is there stays until all is done. Run it again after an interrupt, and it goes on.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from time import perf_counter

from benchmarks import comparison
from benchmarks.comparison.__main__ import write_page
from benchmarks.reproductions import __main__ as reproductions
from benchmarks.reproductions import claim
from benchmarks.reproductions.claims import CLAIMS, READS_RECORDS

BUILD = Path(__file__).parents[1] / "build" / "figures"
Job = Callable[[], None]
FEW = ("LoRA", "IA3")
"""Methods of the quick form."""


def main(argv: Sequence[str] | None = None, build: Path = BUILD) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="to see in minutes that it runs; write nothing")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes, of one thread each")
    args = parser.parse_args(argv)
    start = perf_counter()
    if args.quick:
        quick()
    else:
        everything(build, args.workers)
    print(f"all figures: {(perf_counter() - start) / 60:.0f} minutes", flush=True)


def quick() -> None:
    from peftfn.compare import page, run

    one_thread()
    with TemporaryDirectory() as folder:
        few = run.Settings(rates=(1e-3, 1e-2), seeds=1, steps=3)
        print(page.page(run.compare(Path(folder), FEW, settings=few), picture=False), flush=True)
    reproductions.main(["--quick"])


def everything(build: Path, workers: int) -> None:
    """All records anew in `build`, then in the place of the old ones."""
    from peftfn.compare import run

    compared, reproduced = build / "comparison", build / "reproductions"
    longest_first = [*reversed(run.TASKS)]
    pairs = sorted(run.pairs(), key=lambda pair: longest_first.index(pair[1]))
    jobs: list[Job] = [
        *(partial(try_claim, name, reproduced) for name in CLAIMS if name not in READS_RECORDS),
        *(partial(compare_pair, method, task, compared) for method, task in pairs),
    ]
    side_by_side(jobs, workers)
    _replace(compared, comparison.HERE)
    write_page()
    for name in READS_RECORDS:
        try_claim(name, reproduced)
    _replace(reproduced, claim.RECORDS)
    reproductions.write_page()


def side_by_side(jobs: Sequence[Job], workers: int) -> None:
    """Run all jobs in so many processes; in this one, if it is one."""
    one_thread()
    if workers == 1:
        for job in jobs:
            job()
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), one_thread) as pool:
        futures: list[Future[None]] = [pool.submit(job) for job in jobs]
        try:
            for n, future in enumerate(as_completed(futures), 1):
                future.result()
                print(f"{n} of {len(jobs)} done", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def one_thread() -> None:
    """Of torch, in this process."""
    import torch

    torch.set_num_threads(1)


def compare_pair(method: str, task: str, build: Path) -> None:
    from peftfn.compare import run

    run.compare(build, (method,), (task,))


def try_claim(name: str, build: Path) -> None:
    if claim.read(name, build) is None:
        print(f"{name}: {CLAIMS[name].title}", flush=True)
        claim.save(CLAIMS[name].record(name), build)
        rmtree(claim.RUNNING / name, ignore_errors=True)


def _replace(new: Path, old: Path) -> None:
    """The records of a folder by those of another, if there are any."""
    for path in old.glob("*.json") if new.exists() else ():
        path.unlink()
    for path in new.glob("*.json"):
        path.rename(old / path.name)
    rmtree(new, ignore_errors=True)


if __name__ == "__main__":
    main()
