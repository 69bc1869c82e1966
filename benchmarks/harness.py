"""How everything is timed: the ways of doing one job take turns in one process, and only their ratios count.

An absolute time on a shared CPU says little; the ratio of two runs a few milliseconds apart says much more. So:

* every repetition runs each way once, in an order that rotates, and gives one ratio for each pair of ways;
* of these paired ratios the median and the quartiles are reported;
* the number of threads is fixed (one, unless told otherwise: two that wait for each other at every product are slowed
  down manifold by any neighbour on the machine);
* Python's garbage collector runs between the repetitions and not inside them;
* glibc's malloc thresholds are pinned before the process starts, since otherwise the same operation is several times
  slower or faster depending on what was freed before it (`pin` starts the process anew for that).
"""

import gc
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

RESULTS = Path(__file__).parent / "results"
PINNED = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(4 << 30)}
REPEATS, QUICK = 31, 5
CLOCKS = {"wall": perf_counter, "cpu": process_time}

OURS, BASE = "peftfn", "base"
Way = Callable[..., Any]
Times = dict[str, list[float]]
"""way → seconds of each repetition"""
Json = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line says about timing."""

    repeats: int = REPEATS
    threads: int = 1
    clock: str = "wall"

    def compare(self, ways: Mapping[str, Way], **more: Any) -> Times:
        return compare(ways, **{"repeats": self.repeats, "clock": CLOCKS[self.clock], **more})


def pin(threads: int) -> None:
    """Start this process anew with malloc's thresholds and the thread counts pinned, unless they are."""
    wanted = PINNED | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


def compare(
    ways: Mapping[str, Way],
    *,
    repeats: int = REPEATS,
    warmup: int = 2,
    at_least: float = 2e-3,
    fresh: Way | None = None,
    clock: Callable[[], float] = perf_counter,
) -> Times:
    """Seconds that each way takes, `repeats` times, the ways taking turns.

    Args:
        ways: name → function that does the job.
        warmup: rounds that are run and not counted.
        at_least: a sample shorter than this many seconds is a mean over several calls (the same number for all ways).
        fresh: makes what a way consumes, before each call and outside the time; each way is then called with it, once
            a sample.
        clock: what tells the seconds.
    """
    names = list(ways)

    def sample(name: str, calls: int) -> float:
        given = () if fresh is None else (fresh(),)
        start = clock()
        for _ in range(calls):
            ways[name](*given)
        return (clock() - start) / calls

    fastest = min(sample(name, 1) for _ in range(max(1, warmup)) for name in names)
    calls = 1 if fresh is not None else max(1, round(at_least / max(fastest, 1e-9)))
    times: Times = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for i in range(repeats):
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                times[name].append(sample(name, calls))
            gc.collect()
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return times


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of paired ratios."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, ours: list[float], theirs: list[float], base: list[float] | None = None) -> "Ratio":
        """ours/theirs, repetition by repetition; with `base`, of what each takes beyond it."""
        less = [0.0] * len(ours) if base is None else base
        each = [(a - c) / (b - c) for a, b, c in zip(ours, theirs, less, strict=True)]
        q1, median, q3 = statistics.quantiles(each, n=4, method="inclusive") if len(each) > 1 else each * 3
        return cls(median, q1, q3)


@dataclass(frozen=True)
class Target:
    """The ratio to `against` should be at most `at_most`, and at best `stretch`."""

    against: str
    at_most: float
    stretch: float | None = None

    def met(self, value: float) -> str:
        if value > self.at_most:
            return "no"
        return "yes" if self.stretch is None or value > self.stretch else "yes, stretch"


def row(
    case: str,
    times: Times,
    *,
    target: Target | None = None,
    beyond: str | None = None,
    note: str = "",
    reason: str = "",
) -> Json:
    """One line of a table: our ratio to every other way of `times`, and the target with whether it is met.

    Args:
        beyond: the way whose time is taken off both sides of a ratio, so that only what comes on top of it is compared.
        note: what the reader must know about this line.
        reason: why the target is out of reach; told only if it is.
    """
    ratios = {
        name: asdict(Ratio.of(times[OURS], t, times[beyond] if beyond else None))
        for name, t in times.items()
        if name not in (OURS, beyond)
    }
    line: Json = {
        "case": case,
        "repeats": len(times[OURS]),
        "ratio_to": ratios,
        "median_ms": {name: 1e3 * statistics.median(t) for name, t in times.items()},
    }
    if beyond:
        line["beyond"] = beyond
    if target is not None:
        met = target.met(ratios[target.against]["median"])
        line["target"] = {**asdict(target), "met": met}
        if BASE in times and not beyond:  # what an adapter that costs nothing would reach
            line["floor"] = asdict(Ratio.of(times[BASE], times[target.against]))
        note = " ".join(filter(None, (note, reason if met == "no" else "")))
    if note:
        line["note"] = note
    show(line)
    return line


def show(line: Json) -> None:
    """The line on the terminal, as soon as it is measured."""
    ratios = "  ".join(
        f"{r['median']:.3f} [{r['q1']:.3f} {r['q3']:.3f}] of {name}" for name, r in line["ratio_to"].items()
    )
    target = line.get("target")
    goal = f"  target {target['at_most']:g} of {target['against']}: {target['met']}" if target else ""
    ms = ", ".join(f"{name} {t:.3g}" for name, t in line["median_ms"].items())
    print(f"  {line['case']}: {ratios}{goal}  (ms: {ms})", flush=True)


def environment(options: Options) -> Json:
    """What the figures depend on. No names of hosts, no paths."""
    from peftfn.compare.environment import environment as plain  # torch, after `pin`

    own = {"cpu_count": os.cpu_count(), "threads": options.threads, "clock": options.clock, "malloc": PINNED}
    return plain("peft", "transformers") | own


def write(name: str, rows: list[Json], options: Options, seconds: float, folder: Path = RESULTS) -> Path:
    """benchmarks/results/<name>.json"""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = {"name": name, "environment": environment(options), "seconds": round(seconds), "rows": rows}
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return path
