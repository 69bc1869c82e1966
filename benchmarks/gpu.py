"""python -m benchmarks.gpu: the kernels on a GPU. First that they are right, then how fast, next to the references.

Writes benchmarks/results/gpu/<device>-<date>.json after every section, and the tables of docs/kernels.md from it. A row
has microseconds (median and quartiles of paired samples, the ways taking turns), what comes on top of the base product,
the share of the bound (by the bandwidth and the rate that this device was measured to have), peak memory, the error
against fp64 and whether two runs agree bitwise. It stops starting rows in time (--seconds) and lists what it left out.

Each section runs in a process of its own, so that a CUDA error, which no later call of a process survives, ends one
section. All start at once to compile what they need (the gates then run in full), and the rest is timed one by one.
What fails, a gate or a way, is told and ends nothing else; a reference whose package is missing is told as such.
--dry: the same code on a CPU with Triton's interpreter and tiny sizes.
"""

import argparse
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu"
DOCS = Path(__file__).parents[1] / "docs" / "kernels.md"
MARKS = "<!-- figures: begin -->", "<!-- figures: end -->"
REPEATS = 31
SECTIONS = {  # in their order; what starts with "check" is gates, and times nothing
    "check-linears": "gpu_gates:linears",
    "check-sizes": "gpu_gates:linears_of_other_sizes",
    "check-fp32": "gpu_gates:linears_fp32",
    "check-norms": "gpu_gates:norms",
    "check-mixed": "gpu_gates:mixed",
    "check-mixed-fp32": "gpu_gates:mixed_fp32",
    "check-long": "gpu_gates:long",
    "check-graphs": "gpu_gates:graphs",
    "tune-thin": "gpu_tune:thin",
    "tune-wide": "gpu_tune:wide",
    "tune-norm": "gpu_tune:norm",
    "tune-lora": "gpu_tune:lora",
    "norms": "gpu_rows:norms",
    "mixed": "gpu_rows:mixed",
    "linears": "gpu_rows:linears",
    "curve": "gpu_rows:curve",
    "tenants": "gpu_rows:tenants",
    "methods": "gpu_methods:methods",
}
Json = dict[str, Any]
Call = Callable[[], Any]


class Clock:
    """Times a call in microseconds, on the GPU by events, elsewhere by the wall."""

    def __init__(self, dry: bool):
        import torch

        self.dry, self.torch = dry, torch
        self.device = "cpu" if dry else "cuda"
        self.cache = None if dry else torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def rates(self) -> tuple[float, float]:
        """Bytes a second that a copy moves, read and written, and bf16 operations a second of a large product."""
        if self.dry:
            return 1e10, 1e11
        a = self.torch.empty(2 << 30, dtype=self.torch.int8, device="cuda")
        b = self.torch.empty_like(a)
        x = self.torch.randn(8192, 8192, device="cuda", dtype=self.torch.bfloat16)

        def best(call: Call) -> float:
            return statistics.median(self.sample(call, False) for _ in range(10)) / 1e6

        return 2 * a.numel() / best(lambda: b.copy_(a)), 2 * 8192**3 / best(lambda: x @ x)

    def flush(self) -> None:
        if self.cache is not None:
            self.cache.zero_()

    def sync(self) -> None:
        if not self.dry:
            self.torch.cuda.synchronize()

    def graph(self, call: Call, copies: int = 1) -> Call:
        """So many calls captured in a CUDA graph."""
        if self.dry:
            return call
        stream = self.torch.cuda.Stream()
        stream.wait_stream(self.torch.cuda.current_stream())
        with self.torch.cuda.stream(stream):
            for _ in range(3):
                call()
        self.torch.cuda.current_stream().wait_stream(stream)
        captured = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(captured):
            for _ in range(copies):
                self.kept = call()
        return captured.replay

    def copies(self, call: Call) -> int:
        """How many calls a graph should hold for its own launch, some µs, to be little of its time."""
        if self.dry:
            return 1
        self.sample(call, False)
        return max(1, min(50, round(300 / self.sample(call, False))))

    def sample(self, call: Call, cold: bool) -> float:
        if cold:
            self.flush()
        if self.dry:
            start = perf_counter()
            call()
            return 1e6 * (perf_counter() - start)
        start, stop = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return float(1e3 * start.elapsed_time(stop))

    def peak(self, call: Call) -> float:
        """MiB that a call needs on top of what is there."""
        if self.dry:
            return 0.0
        self.sync()
        before = self.torch.cuda.memory_allocated()
        self.torch.cuda.reset_peak_memory_stats()
        call()
        self.sync()
        return float((self.torch.cuda.max_memory_allocated() - before) / 2**20)


def has_triton() -> bool:
    from peftfn.kernels.choose import installed

    return installed()


def why(e: Exception) -> str:
    """An exception in one line; a package that is not there in plain words."""
    if isinstance(e, ModuleNotFoundError):
        return f"{e.name} is not installed"
    return " ".join(f"{type(e).__name__}: {e}".split())[:240]


def error(got: Any, want: Any) -> float:
    """The largest relative error of the tensors, in the Frobenius norm; infinite where one is not finite."""
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        g = g.reshape(w.shape)
        size = w.norm().item()
        worst = max(worst, (g.double() - w).norm().item() / max(size, 1e-12) if g.isfinite().all() else float("inf"))
    return worst


class Run:
    """The record that grows, and the time that is left."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.clock, self.start = args, Clock(args.dry), perf_counter()
        self.record = empty(environment(args.dry))
        self.path = args.out or results_path(self.record)
        self.bandwidth, self.flops = 1.0, 1.0
        if not args.warm and not all(name.startswith("check") for name in args.only or SECTIONS):
            self.bandwidth, self.flops = self.clock.rates()
            self.record["environment"] |= {"bandwidth": self.bandwidth, "flops": self.flops}

    def write(self) -> None:
        self.record["seconds"] = round(perf_counter() - self.start)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What raises inside is told, and ends nothing else."""
        try:
            yield
        except Exception as e:
            self.record["raised"].append({"what": what, "why": why(e)})
            print(f"  FAILED {what}: {why(e)}", flush=True)
            self.write()

    def gate(self, name: str, value: float, limit: float) -> None:
        ok = value <= limit  # a NaN is not
        self.record["gates"].append({"gate": name, "value": value, "limit": limit, "ok": ok})
        if not ok:
            print(f"  FAILED {name}: {value:.2g} > {limit:g}", flush=True)
        self.write()

    def row(
        self,
        section: str,
        case: str,
        ways: dict[str, Callable[[], Call]],
        *,
        want: Any = None,
        bound: float | None = None,
        base: str | None = "base",
        modes: tuple[str, ...] = ("graph", "eager"),
        other: tuple[str, ...] = ("base",),
    ) -> None:
        """Time the ways of one case.

        want: the exact result, of all but `other`, which do another job. bound: seconds that any way needs.
        """
        if self.late(f"{section}: {case}"):
            return
        calls, row = {}, {"section": section, "case": case, "failed": {}, "error": {}, "repeatable": {}, "peak_mib": {}}
        for name, make in ways.items():
            try:
                call = make()
                got = call()
                if want is not None and name not in other:
                    got = got if isinstance(got, tuple) else (got,)
                    row["error"][name] = error(got, want)
                    again = call()
                    again = again if isinstance(again, tuple) else (again,)
                    row["repeatable"][name] = all(bool((p == q).all()) for p, q in zip(got, again, strict=True))
                row["peak_mib"][name] = self.clock.peak(call)
                calls[name] = call
            except Exception as e:  # mostly another's code: told in the table, and our own fails the run
                row["failed"][name] = why(e)
        if self.args.warm:
            return
        row["us"] = {}
        for mode in modes[-1:] if self.args.dry else modes:
            for cold in (True, False):
                timed = {}
                for name, call in calls.items():
                    try:
                        timed[name] = self.timed(call, mode, cold)
                    except Exception as e:
                        row["failed"][f"{name}, in a graph"] = why(e)
                row["us"][f"{mode}, L2 {'flushed' if cold else 'hot'}"] = self.times(timed, cold, base, bound)
        self.record["rows"].append(row)
        self.write()
        first = next(iter(row["us"].values()))
        print(f"  {section}: {case}: " + ", ".join(f"{n} {v['median']:.0f}" for n, v in first.items()), flush=True)

    def late(self, what: str) -> bool:
        """Whether there is no time left to start this."""
        late = perf_counter() - self.start > self.args.seconds
        if late:
            self.record["left_out"].append(what)
        return late

    def timed(self, call: Call, mode: str, cold: bool) -> tuple[Call, int]:
        """(what to time, how many calls that is). Many in one graph only where L2 may be hot."""
        if mode != "graph":
            return call, 1
        once = self.clock.graph(call)
        copies = 1 if cold else self.clock.copies(once)
        return (once if copies == 1 else self.clock.graph(call, copies)), copies

    def times(self, calls: dict[str, tuple[Call, int]], cold: bool, base: str | None, bound: float | None) -> Json:
        repeats = 2 if self.args.dry else REPEATS
        names, samples = list(calls), {name: [] for name in calls}
        if not names:
            return {}
        for name in () if self.args.dry else names:
            self.clock.sample(calls[name][0], cold)
        for i in range(repeats):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                call, n = calls[name]
                samples[name].append(self.clock.sample(call, cold) / n)
        out: Json = {}
        for name, times in samples.items():
            q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
            out[name] = {"median": median, "q1": q1, "q3": q3}
            if base in samples and name != base:
                out[name]["over_base"] = statistics.median(t / b - 1 for t, b in zip(times, samples[base], strict=True))
            if bound is not None and name != base:
                out[name]["of_bound"] = 1e6 * bound / median
        return out


def environment(dry: bool) -> Json:
    from importlib.metadata import PackageNotFoundError, version

    import torch

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": "dry run" if dry else torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        **{name: installed(name) for name in ("peftfn", "torch", "triton", "peft", "lycoris-lora")},
    }


def empty(environment: Json) -> Json:
    return {"environment": environment, "gates": [], "rows": [], "tune": [], "left_out": [], "raised": [], "done": [],
            "seconds": 0}  # fmt: skip


def results_path(record: Json) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", record["environment"]["device"].lower()).strip("-")
    return RESULTS / f"{name}-{record['environment']['date']}.json"


def merged(parts: list[Json]) -> Json:
    """One record of what several processes did."""
    record = empty({})
    for part in parts:
        record["environment"] |= part["environment"]
        for key in ("gates", "rows", "tune", "left_out", "raised", "done"):
            record[key] += part[key]
        record["seconds"] += part["seconds"]
    return record


def complaints(record: Json) -> list[str]:
    """What of ours is not as it must be, a line each."""
    lines = [
        f"Gate failed: {g['gate']}: {g['value']:.2g}, above {g['limit']:g}" for g in record["gates"] if not g["ok"]
    ]
    lines += [f"Raised: {r['what']}: {r['why']}" for r in record["raised"]]
    for row in record["rows"]:
        ours = [f"{way}: {reason}" for way, reason in row["failed"].items() if way.startswith("peftfn")]
        lines += [f"Failed: {row['section']}, {row['case']}, {line}" for line in ours]
    return lines


def tables(record: Json) -> str:
    """The figures as Markdown: a table for each section, of the first mode of its rows; the file has the others."""
    e = record["environment"]
    lines = [
        f"Measured on {e['device']}, {e['date']}, torch {e['torch']}, triton {e['triton']}, peft {e['peft']}, "
        f"lycoris-lora {e['lycoris-lora']}; {len(record['gates'])} gates, "
        f"{sum(not g['ok'] for g in record['gates'])} failed.",
        *([record["note"]] if "note" in record else []),
        *(f"\n{line}" for line in complaints(record)),
    ]
    if "bandwidth" in e:
        lines.append(f"This device: {e['bandwidth'] / 1e12:.2f} TB/s, {e['flops'] / 1e12:.0f} TFLOP/s in bf16.")
    for section in dict.fromkeys(row["section"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["section"] == section and row["us"]]
        modes = dict.fromkeys(next(iter(row["us"])) for row in rows)
        lines += ["", f"### {section}", "", f"µs (over the base); {'; '.join(modes)}", ""]
        lines += table(rows)
        absent = dict.fromkeys(f"{way}: {why}" for row in rows for way, why in row["failed"].items())
        lines += [f"\nNot run: {line}" for line in absent]
        wrong = [row["error"][way] for row in rows for way in row["error"] if way.startswith("peftfn")]
        same = [row["repeatable"][way] for row in rows for way in row["repeatable"] if way.startswith("peftfn")]
        if wrong:
            lines.append(f"\nOurs is off from fp64 by {max(wrong):.1e} at most; the same bits twice: "
                         f"{sum(same)} of {len(same)}.")  # fmt: skip
    if record["left_out"]:
        lines += ["", "Left out for lack of time: " + "; ".join(record["left_out"]) + "."]
    return "\n".join(lines) + "\n"


def table(rows: list[Json]) -> list[str]:
    """One line a case, one column a way."""
    first = [next(iter(row["us"].values())) for row in rows]
    ways = list(dict.fromkeys(way for times in first for way in times))
    lines = [f"| | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for row, times in zip(rows, first, strict=True):
        cells = []
        for way in ways:
            v = times.get(way)
            over = "" if v is None or "over_base" not in v else f" ({100 * v['over_base']:+.0f} %)"
            share = "" if v is None or "of_bound" not in v else f", {100 * v['of_bound']:.0f} % of the bound"
            cells.append("" if v is None else f"{v['median']:.0f}{over}{share if way == 'peftfn' else ''}")
        lines.append(f"| {row['case']} | {' | '.join(cells)} |")
    return lines


def into(page: str, text: str) -> str:
    """The page with `text` between the marks."""
    begin, end = (page.index(mark) for mark in MARKS)
    return page[: begin + len(MARKS[0])] + "\n\n" + text + "\n" + page[end:]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="on a CPU, in Triton's interpreter, at tiny sizes")
    parser.add_argument("--seconds", type=float, default=450, help="start no row after so many seconds")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section, in this process; may be given "
                        "several times")  # fmt: skip
    parser.add_argument("--skip", action="append", choices=SECTIONS, default=[], help="all sections but this")
    parser.add_argument("--warm", action="store_true", help="run each way once and time nothing: it compiles")
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--docs", type=Path, help=f"the page whose figures are replaced; {DOCS.name} unless dry")
    args = parser.parse_args(argv)
    if args.dry and args.out is None:
        parser.error("--dry needs --out: its figures are none")
    if args.docs is None and not args.dry and not args.only:
        args.docs = DOCS
    return args


def sections(run: Run, names: list[str]) -> None:
    """Run these sections in this process."""
    for name in names:
        module, function = SECTIONS[name].split(":")
        with run.trying(name):
            getattr(importlib.import_module(f"benchmarks.{module}"), function)(run)
        run.record["done"].append(name)
        run.write()
        print(f"{name}: {run.record['seconds']} s", flush=True)


class Processes:
    """Sections in processes of their own, and the record of what all of them did."""

    def __init__(self, args: argparse.Namespace, folder: str):
        self.args, self.folder, self.start = args, Path(folder), perf_counter()
        self.parts: list[Json] = []

    def command(self, *names: str, warm: bool = False) -> list[str]:
        left = max(1.0, self.args.seconds - (perf_counter() - self.start))
        only = [word for name in names for word in ("--only", name)]
        flags = ["--warm"] * warm + ["--dry"] * self.args.dry
        return [sys.executable, "-m", "benchmarks.gpu", *only, *flags, "--out", str(self.path(names[0], warm)),
                "--seconds", f"{left:.0f}"]  # fmt: skip

    def path(self, name: str, warm: bool = False) -> Path:
        return self.folder / f"{name}{'-warm' if warm else ''}.json"

    def take(self, path: Path, names: list[str], code: int) -> list[str]:
        """Add what a process wrote to the record; the sections that it did not finish."""
        part = json.loads(path.read_text()) if path.exists() else empty(environment(self.args.dry))
        left = [name for name in names if name not in part["done"]]
        if left:
            part["raised"].append({"what": left[0], "why": f"its process ended with {code}"})
        self.parts.append(part)
        self.write()
        return left

    def write(self, *more: Json) -> None:
        record = merged([*self.parts, *more]) | {"seconds": round(perf_counter() - self.start)}
        path = self.args.out or results_path(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def run(self, names: list[str]) -> list[str]:
        """Run these sections in one process, and keep what it has done so far; the sections that it did not finish."""
        process, path = subprocess.Popen(self.command(*names)), self.path(names[0])
        while True:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(5)
                return self.take(path, names, code)
            with suppress(FileNotFoundError, json.JSONDecodeError):  # it writes just now
                self.write(json.loads(path.read_text()))

    def record(self) -> Json:
        return merged(self.parts) | {"seconds": round(perf_counter() - self.start)}


def each_alone(args: argparse.Namespace, names: list[str]) -> Json:
    """All sections at once, each in its own process, to compile; then those that time, one after another."""
    with tempfile.TemporaryDirectory() as folder:
        all_of = Processes(args, folder)
        warm = {name: subprocess.Popen(all_of.command(name, warm=True)) for name in names}
        for name, process in warm.items():
            try:
                code = process.wait(max(1.0, args.seconds / 2 - (perf_counter() - all_of.start)))
            except subprocess.TimeoutExpired:  # half of the time is for timing
                process.kill()
                code = process.wait()
            if name.startswith("check"):
                all_of.take(all_of.path(name, warm=True), [name], code)
        print(f"gates and compilation: {perf_counter() - all_of.start:.0f} s", flush=True)
        timed = [name for name in names if not name.startswith("check")]
        while timed:  # what follows a process that died starts afresh
            timed = all_of.run(timed)[1:]
        return all_of.record()


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if not args.dry and not torch.cuda.is_available():
        print("no GPU: this benchmark needs one; --dry runs its code without", file=sys.stderr)
        return 2
    if not has_triton():
        print('Triton is not installed, and there is nothing to measure: pip install "peftfn[triton]"', file=sys.stderr)
        return 2
    names = args.only or [name for name in SECTIONS if name not in args.skip]
    if args.only:
        torch.backends.cuda.matmul.allow_tf32 = False
        run = Run(args)
        sections(run, names)
        record = run.record
    else:
        record = each_alone(args, names)
    if args.docs:
        args.docs.write_text(into(args.docs.read_text(), tables(record)))
    print(f"{', '.join(names)}: {record['seconds']} s, {len(record['gates'])} gates, {len(record['rows'])} rows")
    told = complaints(record)
    print("\n".join(told), flush=True)
    return int(bool(told))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
