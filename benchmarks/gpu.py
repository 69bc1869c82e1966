"""python -m benchmarks.gpu: the kernels on a GPU. First that they are right, then how fast, next to the references.

Writes benchmarks/results/gpu/<device>-<date>.json after every row, and the tables of docs/kernels.md from it. A row
has microseconds (median and quartiles of paired samples, the ways taking turns), what comes on top of the base product,
the share of the bound, peak memory, the error against fp64 and whether two runs agree bitwise. It stops starting rows
in time (--seconds) and lists what it left out. What fails, a gate or a way, is told and ends nothing else; a reference
whose package is missing is told as such. --dry: the same code on a CPU with Triton's interpreter and tiny sizes.
"""

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

RESULTS = Path(__file__).parent / "results" / "gpu"
DOCS = Path(__file__).parents[1] / "docs" / "kernels.md"
MARKS = "<!-- figures: begin -->", "<!-- figures: end -->"
REPEATS = 31
BANDWIDTH, FLOPS = 4.2e12, 700e12  # what an H200 sustains: bytes and bf16 operations a second
Json = dict[str, Any]
Call = Callable[[], Any]


class Clock:
    """Times a call in microseconds, on the GPU by events, elsewhere by the wall."""

    def __init__(self, dry: bool):
        import torch

        self.dry, self.torch = dry, torch
        self.device = "cpu" if dry else "cuda"
        self.cache = None if dry else torch.empty(256 << 20, dtype=torch.int8, device="cuda")

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
        self.record: Json = {
            "environment": environment(args.dry),
            "gates": [],
            "rows": [],
            "left_out": [],
            "raised": [],
        }
        name = re.sub(r"[^a-z0-9]+", "-", self.record["environment"]["device"].lower()).strip("-")
        self.path = args.out or RESULTS / f"{name}-{self.record['environment']['date']}.json"

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
    ) -> None:
        """Time the ways of one case. want: the exact result, of all but the base; bound: seconds that any way needs."""
        if perf_counter() - self.start > self.args.seconds:
            self.record["left_out"].append(f"{section}: {case}")
            return
        calls, row = {}, {"section": section, "case": case, "failed": {}, "error": {}, "repeatable": {}, "peak_mib": {}}
        for name, make in ways.items():
            try:
                call = make()
                got = call()
                if want is not None and name != "base":
                    got = got if isinstance(got, tuple) else (got,)
                    row["error"][name] = error(got, want)
                    again = call()
                    again = again if isinstance(again, tuple) else (again,)
                    row["repeatable"][name] = all(bool((p == q).all()) for p, q in zip(got, again, strict=True))
                row["peak_mib"][name] = self.clock.peak(call)
                calls[name] = call
            except Exception as e:  # mostly another's code: told in the table, and our own fails the run
                row["failed"][name] = why(e)
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
        "bandwidth": BANDWIDTH,
        "flops": FLOPS,
    }


def gates(run: Run) -> None:
    """Everything that must hold before a time means anything."""
    import torch

    from peftfn.kernels import use
    from peftfn.kernels.dora_norm import dora_norm, dora_norms
    from peftfn.kernels.dora_norm import reference as norm_reference
    from peftfn.kernels.lora_fused import fused_linear, reference
    from peftfn.kernels.mixed_lora import Low, Stack, mixed_embedding, mixed_lora, pack
    from peftfn.kernels.mixed_lora import reference as mixed_reference
    from peftfn.kernels.segments import segments

    dry, device = run.args.dry, run.clock.device
    g = torch.Generator(device).manual_seed(0)

    def t(*size: int, dtype: torch.dtype = torch.float32) -> Any:
        return torch.randn(size, generator=g, device=device).div_(max(1, size[-1]) ** 0.5).to(dtype)

    def wide(ts: list[Any]) -> list[Any]:
        return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in ts]

    limits = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
    if dry:  # the interpreter's product of bf16 is no number; the tests have the rest
        limits = {torch.float16: 2e-3}
    odd = [(7, 13, 5, 3)] if dry else [(1023, 1023, 1021, 17)]
    more = [] if dry else [(512, 768, 1024, 64), (257, 1536, 1531, 256), (1, 64, 64, 16)]
    seed = torch.tensor([2**61 + 12345], device=device)

    def linear(size: tuple[int, ...], dtype: torch.dtype, c: bool, bias: bool, p: float) -> None:
        m, n, k, r = size
        x = t(k, m, dtype=dtype).mT if m in (7, 257) else t(m, k, dtype=dtype)  # once not contiguous
        ts = [x, t(n, k, dtype=dtype), t(r, k), t(n, r), t(n) if c else None, t(n, dtype=dtype) if bias else None]
        ts = [None if v is None else v.requires_grad_() for v in ts]
        dy = t(m, n, dtype=dtype)

        def once(f: Any, us: list[Any], dy: Any) -> list[Any] | None:
            x, w, a, b, rows, bias = us
            y = f(x, w, a, b, 0.7, c=rows, bias=bias, dropout=p, seed=seed)
            return None if y is None else [y, *torch.autograd.grad(y, [u for u in us if u is not None], dy)]

        want = once(reference, wide(ts), dy.double())
        for mode in ("triton", "auto"):
            with use(mode):  # type: ignore[arg-type]
                got, again = once(fused_linear, ts, dy), once(fused_linear, ts, dy)
            if got is None and mode == "auto":  # the rules leave it to plain torch
                continue
            name = f"linear {size} {dtype} c={c} dropout={p}, {mode}"
            run.gate(name, error(got, want), limits[dtype])
            run.gate(f"{name}, twice", float(sum((u != v).sum().item() for u, v in zip(got, again, strict=True))), 0)

    def norm(n: int, k: int, r: int, dtype: torch.dtype) -> None:
        w, a, b = t(n, k, dtype=dtype), t(r, k).requires_grad_(), t(n, r).requires_grad_()
        with use("triton"):
            v = dora_norm(w, a, b, 0.7)
            got = [v, *torch.autograd.grad(v.sum(), [a, b])]
            many = dora_norms([w, w], [a, a], [b, b], [0.7, 0.7])
        _, ad, bd = us = wide([w, a, b])
        v = norm_reference(*us, 0.7)
        want = [v, *torch.autograd.grad(v.sum(), [ad, bd])]
        limit = 1e-3 if dtype != torch.float32 else 2e-5
        run.gate(f"norm {(n, k, r)} {dtype}", error([*got, *many], [*want, v, v]), limit)

    def batch(kind: str, what: str, rows: int, dtype: torch.dtype) -> None:
        k, outs, ranks = (37, (65, 40), (3, 17, 1)) if dry else (1023, (1024, 257), (3, 512, 16, 1, 64))
        if kind == "packed":
            each = [
                [Low(t(r, k), t(n, r), 0.5 + i, t(n) if i % 2 else None) for i, r in enumerate(ranks)] for n in outs
            ]
            groups: list[Any] = [pack(each)]
        else:
            groups = [Stack(t(3, r, k), t(3, sum(outs), r), 0.7, t(3, sum(outs))) for r in ranks[:2]]
            groups = groups if kind == "groups" else groups[:1]
        groups = [a._replace(**{f: getattr(a, f).requires_grad_() for f in ("down", "up", "rows")}) for a in groups]
        index = torch.randint(-1, sum(a.slots for a in groups), (rows,), generator=g, device=device)
        index = index if what == "mixed" else torch.full_like(index, -1 if what == "all the base" else 1)
        x, w = t(rows, k, dtype=dtype).requires_grad_(), t(sum(outs), k, dtype=dtype)
        leaves, dy = [x, *(v for a in groups for v in (a.down, a.up, a.rows))], t(rows, sum(outs), dtype=dtype)
        own, start = [], 0
        for a in groups:
            own.append(torch.where((index >= start) & (index < start + a.slots), index - start, -1))
            start += a.slots
        with use("triton"):
            y = mixed_lora(x, w, *[(a, segments(i, a.slots)) for a, i in zip(groups, own, strict=True)])
            got = [y, *torch.autograd.grad(y, leaves, dy)]
        exact = wide(leaves)
        y = exact[0] @ w.double().mT
        for j, (a, i) in enumerate(zip(groups, own, strict=True)):
            alone = a._replace(**dict(zip(("down", "up", "rows"), exact[1 + 3 * j :], strict=False)))
            y = torch.where((i < 0)[:, None], y, mixed_reference(exact[0], w.double(), alone, i))
        want = [y, *torch.autograd.grad(y, exact, dy.double(), materialize_grads=True)]
        run.gate(f"{kind} {what} {rows} rows {dtype}", error(got, want), limits[dtype])

    def embedding(dtype: torch.dtype) -> None:
        ids, index = torch.randint(0, 50, (20,), generator=g, device=device), torch.arange(20, device=device) % 4 - 1
        look, w = Stack(t(3, 5, 50), t(3, 18, 5), 0.7), t(18, 50, dtype=dtype)
        with use("triton"), torch.no_grad():
            got = [mixed_embedding(ids, w, (look, segments(index, 3)))]
        hot = torch.nn.functional.one_hot(ids, 50).double()
        want = [mixed_reference(hot, w.double(), look._replace(down=look.down.double(), up=look.up.double()), index)]
        run.gate(f"embedding {dtype}", error(got, want), limits[dtype])

    def offsets() -> None:
        far = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 64), (2**30, 1))
        far.copy_(t(3, 64))
        w, a, b = t(48, 64, dtype=torch.float16), t(4, 64), t(48, 4)
        with use("triton"), torch.no_grad():
            got = [fused_linear(far, w, a, b, 0.7)]
        want = [reference(far.double(), w.double(), a.double(), b.double(), 0.7)]
        run.gate("offsets beyond 2³¹", error(got, want), 2e-3)

    for dtype in limits:
        half = dtype is torch.bfloat16
        for size in odd + (more if half else []):
            for c, bias, p in [(False, True, 0.0), (True, False, 0.0), (True, True, 0.3)]:
                with run.trying(f"gate of linear {size} {dtype} c={c} dropout={p}"):
                    linear(size, dtype, c, bias, p)
            with run.trying(f"gate of norm {size} {dtype}"):
                norm(*size[1:], dtype)
        for rows in (21,) if dry else (5, 64, 1023) if half else (64,):
            for kind in ("packed", "stacked", "groups"):
                for what in ("mixed", "all the base", "one"):
                    with run.trying(f"gate of {kind} {what} {rows} rows {dtype}"):
                        batch(kind, what, rows, dtype)
        with run.trying(f"gate of embedding {dtype}"):
            embedding(dtype)
    with run.trying("gate of offsets beyond 2³¹"):
        offsets()
    if not dry:
        graph_gates(run, t)


def graph_gates(run: Run, t: Any) -> None:
    """What only a captured graph and autograd's own thread can show."""
    import torch

    from peftfn.kernels import use
    from peftfn.kernels.lora_fused import fused_linear
    from peftfn.kernels.mixed_lora import Stack, mixed_lora
    from peftfn.kernels.mixed_lora import reference as mixed_reference
    from peftfn.kernels.segments import segments

    bf16 = torch.bfloat16
    index = torch.zeros(64, dtype=torch.int64, device="cuda")
    x, w, stack = t(64, 512, dtype=bf16), t(768, 512, dtype=bf16), Stack(t(8, 16, 512), t(8, 768, 16), 0.7)

    def mixed() -> Any:
        with use("triton"), torch.no_grad():
            return mixed_lora(x, w, (stack, segments(index, 8)))

    with run.trying("gate of a replayed mixed batch"):
        replay = run.clock.graph(mixed)
        index.copy_(torch.arange(64, device="cuda") % 9 - 1)
        replay()
        exact = stack._replace(down=stack.down.double(), up=stack.up.double())
        want = [mixed_reference(x.double(), w.double(), exact, index)]
        run.gate("a graph replayed with other segments", error([run.clock.kept], want), 1.5e-2)
    a, b = t(16, 512).requires_grad_(), t(768, 16).requires_grad_()

    def dropped() -> Any:
        with use("triton"), torch.no_grad():
            return fused_linear(x, torch.zeros_like(w), a, b, dropout=0.5)

    with run.trying("gate of replayed dropout"):
        replay = run.clock.graph(dropped)
        replay()
        first = run.clock.kept.clone()
        replay()
        run.gate("a replayed graph draws a new mask", float(torch.equal(first, run.clock.kept)), 0)
    with run.trying("gate of backward in autograd's thread"):
        with use("triton"):
            y = fused_linear(x, w, a, b)
        assert y is not None, "no kernel was taken"
        y.float().square().sum().backward()
        plain = (x @ w.mT + (x @ a.to(bf16).mT) @ b.to(bf16).mT).float()
        want = [v.double() for v in torch.autograd.grad(plain.square().sum(), [a, b])]
        run.gate("backward in autograd's thread", error([a.grad, b.grad], want), 2e-2)


def linears(run: Run) -> None:
    import torch

    from benchmarks.gpu_ways import Job, dora_ways, lora_ways

    dry = run.args.dry
    dtype = torch.float16 if dry else torch.bfloat16
    cases = [(16, 24, 3, 0.0), (16, 24, 3, 0.05)] if dry else [
        (4096, 4096, 16, 0.0), (8192, 4096, 16, 0.0), (4096, 4096, 16, 0.05), (4096, 4096, 64, 0.0),
        (8192, 4096, 64, 0.0), (8192, 4096, 16, 0.05), (4096, 4096, 256, 0.0), (4096, 8192, 16, 0.0),
        (4096, 14336, 16, 0.0), (8192, 8192, 16, 0.0), (4096, 8192, 64, 0.05),
    ]  # fmt: skip
    for i, (m, d, r, p) in enumerate(cases):
        with run.trying(f"d={d}, M={m}, r={r}, dropout={p:g}"):
            job = Job(m, d, d, r, p, dtype, run.clock.device)
            size = m * d * job.x.element_size()
            flops = 4 * m * d * d / FLOPS
            modes = ("graph", "eager") if d <= 4096 else ("graph",)
            want = None if p or m * d * d > 2**38 else job.exact(False)
            run.row(
                "LoRA, forward and backward", f"d={d}, M={m}, r={r}, dropout={p:g}",
                lora_ways(job, compiled=i == 0 and not dry), want=want, bound=flops + 3 * size / BANDWIDTH, modes=modes,
            )  # fmt: skip
            if not p:
                want = None if m * d * d > 2**38 else job.exact(True)
                run.row(
                    "DoRA, forward and backward", f"d={d}, M={m}, r={r}", dora_ways(job), want=want,
                    bound=flops + 6 * size / BANDWIDTH + d * d * job.x.element_size() / BANDWIDTH, modes=modes,
                )  # fmt: skip


def norms(run: Run) -> None:
    import torch

    from peftfn.kernels import use
    from peftfn.kernels.dora_norm import dora_norm, dora_norms, reference

    device, dtype = run.clock.device, torch.float16 if run.args.dry else torch.bfloat16
    for d, r in [(40, 5)] if run.args.dry else [(4096, 16), (8192, 16), (4096, 64)]:
        w = torch.randn(d, d, device=device).div_(d**0.5).to(dtype)
        a, b = torch.randn(r, d, device=device).div_(d**0.5), torch.randn(d, r, device=device)

        def forced(f: Callable[[], Any]) -> Callable[[], Call]:
            def call() -> Any:
                with use("triton"), torch.no_grad():
                    return f()

            return lambda: call

        def factored(w: Any = w, a: Any = a, b: Any = b) -> Any:
            u = w @ a.to(w.dtype).mT
            return ((w * w).sum(1).float() + 4 * (u * b).sum(1) + 4 * ((b @ (a @ a.mT)) * b).sum(1)).sqrt()

        want = [reference(w.double(), a.double(), b.double(), 2.0)]
        bound = d * d * w.element_size() / BANDWIDTH
        ways = {
            "peftfn": forced(lambda w=w, a=a, b=b: dora_norm(w, a, b, 2.0)),  # type: ignore[misc]
            "dense B A": lambda w=w, a=a, b=b: lambda: reference(w, a, b, 2.0),
            "factored": lambda f=factored: f,
        }
        run.row("DoRA's norm", f"{d}×{d}, r={r}", ways, want=want, bound=bound, base=None)
        many = {"peftfn": forced(lambda w=w, a=a, b=b: dora_norms([w] * 8, [a] * 8, [b] * 8, [2.0] * 8))}  # type: ignore[misc]
        run.row("DoRA's norm", f"8 sites of {d}×{d} at once, r={r}", many, base=None, modes=("eager",))


def mixed(run: Run) -> None:
    import torch

    from benchmarks.gpu_ways import Batch

    dry = run.args.dry
    dtype = torch.float16 if dry else torch.bfloat16
    cases = [(5, 3, 3, 24)] if dry else [
        (1, 1, 16, 4096), (8, 8, 16, 4096), (32, 32, 16, 4096), (64, 64, 16, 4096), (256, 256, 16, 4096),
        (256, 8, 16, 4096), (64, 64, 64, 4096), (64, 64, 256, 4096), (64, 32, 16, 8192), (8192, 8, 16, 4096),
        (8192, 8, 256, 4096),
    ]  # fmt: skip
    for rows, slots, r, d in cases:
        name = f"{rows} rows, {slots} adapters, r={r}, d={d}"
        with run.trying(name), torch.no_grad():
            batch = Batch(rows, slots, r, d, dtype, run.clock.device)
            size = batch.x.element_size()
            pair = (slots * 2 * r * d + 3 * rows * d) * size / BANDWIDTH
            run.row("Mixed batch, shrink and expand", name, batch.ways(False), bound=pair, base=None)
            whole = pair + max(d * d * size / BANDWIDTH, 2 * rows * d * d / FLOPS)
            exact = [batch.exact()] if rows * r * d <= 2**26 else None
            run.row("Mixed batch, with the base product", name, batch.ways(True), want=exact, bound=whole)


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
    """The figures as Markdown."""
    e = record["environment"]
    lines = [
        f"Measured on {e['device']}, {e['date']}, torch {e['torch']}, triton {e['triton']}, peft {e['peft']}, "
        f"lycoris-lora {e['lycoris-lora']}; {len(record['gates'])} gates, "
        f"{sum(not g['ok'] for g in record['gates'])} failed; {record['seconds']} s in all.",
        *(f"\n{line}" for line in complaints(record)),
    ]
    for section in dict.fromkeys(row["section"] for row in record["rows"]):
        lines += ["", f"### {section}"]
        for row in (r for r in record["rows"] if r["section"] == section):
            modes = list(row["us"])
            lines += ["", f"**{row['case']}**, µs (over the base)", "", f"| way | {' | '.join(modes)} | of the bound | "
                      "peak MiB | error | repeatable |", "|---" * (len(modes) + 5) + "|"]  # fmt: skip
            for way in row["peak_mib"]:
                cells = []
                for mode in modes:
                    v = row["us"][mode].get(way)
                    over = "" if v is None or "over_base" not in v else f" ({100 * v['over_base']:+.1f} %)"
                    cells.append("" if v is None else f"{v['median']:.1f}{over}")
                share = row["us"][modes[0]].get(way, {}).get("of_bound")
                wrong, same = row["error"].get(way), row["repeatable"].get(way)
                cells += ["" if share is None else f"{100 * share:.0f} %", f"{row['peak_mib'][way]:.0f}"]
                cells += ["" if wrong is None else f"{wrong:.1e}", "" if same is None else "yes" if same else "no"]
                lines.append(f"| {way} | {' | '.join(cells)} |")
            lines += [f"\nNot run: {way}: {reason}" for way, reason in row["failed"].items()]
    if record["left_out"]:
        lines += ["", "Left out for lack of time: " + "; ".join(record["left_out"]) + "."]
    return "\n".join(lines) + "\n"


def into(page: str, text: str) -> str:
    """The page with `text` between the marks."""
    begin, end = (page.index(mark) for mark in MARKS)
    return page[: begin + len(MARKS[0])] + "\n\n" + text + "\n" + page[end:]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--dry", action="store_true", help="on a CPU, in Triton's interpreter, at tiny sizes")
    parser.add_argument("--seconds", type=float, default=450, help="start no row after so many seconds")
    parser.add_argument("--out", type=Path, help="where the results go")
    parser.add_argument("--docs", type=Path, help=f"the page whose figures are replaced; {DOCS.name} unless dry")
    args = parser.parse_args(argv)
    if args.dry and args.out is None:
        parser.error("--dry needs --out: its figures are none")
    if args.docs is None and not args.dry:
        args.docs = DOCS
    return args


def sections() -> Iterator[Callable[[Run], None]]:
    yield from (gates, norms, linears, mixed)


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
    torch.backends.cuda.matmul.allow_tf32 = False
    run = Run(args)
    print(f"gates on {run.record['environment']['device']}", flush=True)
    for section in sections():
        with run.trying(section.__name__):
            section(run)
        run.write()
    if args.docs:
        args.docs.write_text(into(args.docs.read_text(), tables(run.record)))
    print(f"written: {run.path.name}, {run.record['seconds']} s")
    return int(bool(complaints(run.record)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
