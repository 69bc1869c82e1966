"""The rows of benchmarks/gpu.py: what is timed, at which sizes, beside what."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import Call, Run
from benchmarks.gpu_ways import Batch, Job, Layer, Tenants, composed, dora_ways, lora_ways
from peftfn.kernels import use
from peftfn.kernels.dora_norm import dora_norm, dora_norms, reference


def half(run: Run) -> torch.dtype:
    return torch.float16 if run.args.dry else torch.bfloat16


def linears(run: Run) -> None:
    """LoRAFusion's shapes among them: 2048, 4096 and 8192 tokens of 4096, 5120 and 8192 features."""
    dry, dtype = run.args.dry, half(run)
    cases = [(16, 24, 3, 0.0), (16, 24, 3, 0.05)] if dry else [
        (4096, 4096, 16, 0.0), (8192, 4096, 16, 0.0), (4096, 4096, 16, 0.05), (4096, 4096, 64, 0.0),
        (2048, 4096, 16, 0.0), (8192, 4096, 384, 0.0), (8192, 8192, 16, 0.0), (4096, 4096, 256, 0.0),
        (512, 4096, 16, 0.0), (8192, 4096, 16, 0.05), (4096, 5120, 16, 0.0), (4096, 8192, 16, 0.0),
        (2048, 5120, 16, 0.0), (2048, 8192, 16, 0.0), (8192, 5120, 16, 0.0), (4096, 4096, 64, 0.05),
    ]  # fmt: skip
    for i, (m, d, r, p) in enumerate(cases):
        case = f"d={d}, M={m}, r={r}" + (f", dropout={p:g}" if p else "")
        with run.trying(case):
            job = Job(m, d, d, r, p, dtype, run.clock.device)
            size = m * d * job.x.element_size()
            flops = 4 * m * d * d / run.flops
            modes = ("graph", "eager") if d <= 4096 else ("graph",)
            small = not p and m * d * d <= 2**37  # fp64 products of this size are quick
            run.row(
                "LoRA, forward and backward", case, lora_ways(job, compiled=i == 0 and not dry),
                want=job.exact(False) if small else None, bound=flops + 3 * size / run.bandwidth, modes=modes,
            )  # fmt: skip
            if not p and (r > 16 or d != 5120):
                more = (6 * size + d * d * job.x.element_size()) / run.bandwidth
                run.row(
                    "DoRA, forward and backward", case, dora_ways(job), want=job.exact(True) if small else None,
                    bound=flops + more, modes=modes,
                )  # fmt: skip


def norms(run: Run) -> None:
    """The published sizes, and the product with c, which comes after a layer's own."""
    device, dtype = run.clock.device, half(run)
    sizes = [(40, 40, 5)] if run.args.dry else [
        (n, k, r) for n, k in ((4096, 4096), (8192, 8192), (28672, 8192)) for r in (16, 64, 384)
    ]  # fmt: skip
    for n, k, r in sizes:
        with run.trying(f"norm of {n}×{k}, r={r}"):
            w = torch.randn(n, k, device=device).div_(k**0.5).to(dtype)
            a, b = torch.randn(r, k, device=device).div_(k**0.5), torch.randn(n, r, device=device)

            def forced(f: Callable[[], Any]) -> Callable[[], Call]:
                def call() -> Any:
                    with use("triton"), torch.no_grad():
                        return f()

                return lambda: call

            def in_half(w: Any = w, a: Any = a, b: Any = b) -> Any:
                return reference(w, a.to(w.dtype), b.to(w.dtype), 2.0)

            def factored(w: Any = w, a: Any = a, b: Any = b) -> Any:
                u = w @ a.to(w.dtype).mT
                return ((w * w).sum(1).float() + 4 * (u * b).sum(1) + 4 * ((b @ (a @ a.mT)) * b).sum(1)).sqrt()

            want = [reference(w.double(), a.double(), b.double(), 2.0)] if n * k <= 2**26 else None
            ways = {
                "peftfn": forced(lambda w=w, a=a, b=b: dora_norm(w, a, b, 2.0)),  # type: ignore[misc]
                "dense B A": lambda w=w, a=a, b=b: lambda: reference(w, a, b, 2.0),
                "dense B A in half precision": lambda f=in_half: f,
                "factored": lambda f=factored: f,
                "of W alone": lambda w=w: lambda: torch.linalg.vector_norm(w, dim=1, dtype=torch.float32),
            }
            bound = n * k * w.element_size() / run.bandwidth
            run.row("DoRA's norm", f"{n}×{k}, r={r}", ways, want=want, bound=bound, base=None, other=("of W alone",))
            if r <= 16 and n <= 4096:
                many = {"peftfn": forced(lambda w=w, a=a, b=b: dora_norms([w] * 8, [a] * 8, [b] * 8, [2.0] * 8))}  # type: ignore[misc]
                run.row("DoRA's norm", f"8 sites of {n}×{k} at once, r={r}", many, base=None, modes=("eager",))
    for m, n in [(24, 40)] if run.args.dry else [(4096, 4096), (8192, 8192), (32768, 8192)]:
        with run.trying(f"c ⊙ v of {m}×{n}"):
            bound = 2 * m * n * 2 / run.bandwidth
            run.row("DoRA's product with c", f"{m}×{n}", composed(m, n, dtype, device), bound=bound, base=None)


def mixed(run: Run) -> None:
    dry, dtype = run.args.dry, half(run)
    cases = [(5, 3, 3, 24)] if dry else [
        (1, 1, 16, 4096), (8, 8, 16, 4096), (32, 32, 16, 4096), (64, 64, 16, 4096), (256, 256, 16, 4096),
        (64, 4, 16, 4096), (256, 8, 16, 4096), (64, 64, 64, 4096), (64, 64, 256, 4096), (64, 32, 16, 8192),
        (2048, 8, 16, 4096), (8192, 8, 16, 4096), (8192, 8, 64, 4096), (8192, 8, 256, 4096), (8192, 64, 64, 4096),
    ]  # fmt: skip
    for rows, slots, r, d in cases:
        name = f"{rows} rows, {slots} adapters, r={r}, d={d}"
        with run.trying(name), torch.no_grad():
            batch = Batch(rows, slots, r, d, dtype, run.clock.device)
            size = batch.x.element_size()
            pair = (slots * 2 * r * d + 3 * rows * d) * size / run.bandwidth
            run.row("Mixed batch, shrink and expand", name, batch.ways(False), bound=pair, base=None)
            whole = pair + max(d * d * size / run.bandwidth, 2 * rows * d * d / run.flops)
            exact = [batch.exact()] if rows * r * d <= 2**26 else None
            run.row("Mixed batch, with the base product", name, batch.ways(True), want=exact, bound=whole)


def curve(run: Run) -> None:
    """One layer's seven products, of the shapes of Llama-8B, adapted and not."""
    dry, dtype = run.args.dry, half(run)
    cases = [(5, 3, 3)] if dry else [
        (rows, slots, r)
        for r in (16, 64)
        for rows in (1, 8, 32, 128, 512, 2048, 8192)
        for slots in (1, 4, 16, 64)
        if slots <= rows
    ]  # fmt: skip
    for rows, slots, r in cases:
        name = f"{rows} rows, {slots} adapters, r={r}"
        with run.trying(name), torch.no_grad():
            layer = Layer(rows, slots, r, dtype, run.clock.device, small=dry)
            run.row("Mixed batch, a Llama-8B layer's products", name, layer.ways(), modes=("graph",))


def tenants(run: Run) -> None:
    """Whether tenants should share a batch: k of them with so many tokens each, in one batch and one after another."""
    dry, dtype = run.args.dry, half(run)
    for k, tokens in [(3, 2)] if dry else [(k, t) for k in (2, 8, 32) for t in (1, 16, 128, 1024)]:
        name = f"{k} tenants, {tokens} tokens each, r=16"
        with run.trying(name), torch.no_grad():
            d = 24 if dry else 4096
            many = Tenants(k, tokens, 16, d, dtype, run.clock.device)
            run.row("Tenants in one batch, d=4096", name, many.ways())
