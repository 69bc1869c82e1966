"""The ways of doing one job that benchmarks/gpu.py compares: ours, and the references, each as a `step`.

A step runs forward and backward once and returns the output and the gradients, in one order for all ways. A reference
that needs a package which is not there raises ImportError, and is listed as missing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftfn as pf
from peftfn.kernels import use
from peftfn.kernels.dora_norm import dora_norm
from peftfn.kernels.dora_norm import reference as dense_norm
from peftfn.kernels.lora_fused import fused_linear
from peftfn.kernels.lora_linear import lora_first, lora_linear

Step = Callable[[], tuple[Tensor, ...]]


@dataclass
class Job:
    """One linear layer: x [m, k], W [n, k] in `dtype`; A, B and the magnitude in fp32, as masters are."""

    m: int
    n: int
    k: int
    r: int
    dropout: float
    dtype: torch.dtype
    device: str

    def __post_init__(self) -> None:
        g = torch.Generator(self.device).manual_seed(0)

        def t(*size: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(size, generator=g, device=self.device).mul_(std).to(dtype)

        self.x = t(self.m, self.k, dtype=self.dtype).requires_grad_()
        self.w = t(self.n, self.k, std=self.k**-0.5, dtype=self.dtype)
        self.a = t(self.r, self.k, std=self.k**-0.5).requires_grad_()
        self.b = t(self.n, self.r, std=self.r**-0.5).requires_grad_()
        self.scale = 2.0
        self.mag = dense_norm(self.w.float(), self.a, self.b, self.scale).detach().requires_grad_()
        self.dy = t(self.m, self.n, dtype=self.dtype)

    def exact(self, dora: bool) -> tuple[Tensor, ...]:
        """Output and gradients in fp64; DoRA's norm is a constant, as in every way here."""
        x, a, b, m = (t.detach().double().requires_grad_() for t in (self.x, self.a, self.b, self.mag))
        y = x @ self.w.double().mT + self.scale * (x @ a.mT) @ b.mT
        if dora:
            y = y * (m / dense_norm(self.w.double(), a.detach(), b.detach(), self.scale))
        return y.detach(), *torch.autograd.grad(y, [x, a, b, *([m] if dora else [])], self.dy.double())

    def step(self, f: Callable[[], Tensor], *leaves: Tensor) -> Step:
        def step() -> tuple[Tensor, ...]:
            y = f()
            return y.detach(), *torch.autograd.grad(y, [self.x, *leaves], self.dy)

        return step


def base(job: Job) -> Step:
    return job.step(lambda: F.linear(job.x, job.w))


def ours(job: Job, method: pf.Method) -> Step:
    """net.apply, as a user calls it."""
    layer = nn.Linear(job.k, job.n, bias=False, device="meta")
    layer.weight = nn.Parameter(job.w, requires_grad=False)
    net = pf.adapt(layer, {"weight": method})
    leaf = {"a": job.a, "b": job.b} | ({"m": job.mag} if isinstance(method, pf.DoRA) else {})
    return job.step(lambda: net.apply({"weight": leaf}, job.x), *leaf.values())


def forced(job: Job, dora: bool) -> Step:
    """Every product a Triton kernel."""

    def f() -> Tensor:
        with use("triton"):
            c = None
            if dora:
                with torch.no_grad():
                    n = dora_norm(job.w, job.a, job.b, job.scale)
                c = job.mag / n
            y = fused_linear(job.x, job.w, job.a, job.b, job.scale, c=c, dropout=job.dropout)
        assert y is not None, "no kernel was taken"
        return y

    return job.step(f, job.a, job.b, *([job.mag] if dora else []))


def tier0(job: Job) -> Step:
    """The low-rank product first, the library's product added onto it; no Triton."""
    return job.step(lambda: lora_first(job.x, job.w, job.a.to(job.dtype), job.b.to(job.dtype), job.scale), job.a, job.b)


def base_first(job: Job) -> Step:
    """The order that Unsloth and axolotl use: the base product first, LoRA added onto it; gradients by hand."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:  # type: ignore[override]
            ctx.save_for_backward(x, w, a, b)
            ctx.scale = scale
            return (x @ w.mT).addmm_(x @ a.mT, b.mT, alpha=scale)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
            x, w, a, b = ctx.saved_tensors
            ds = dy @ b
            dx = (dy @ w).addmm_(ds, a, alpha=ctx.scale)
            return dx, None, ctx.scale * (ds.mT @ x), ctx.scale * (dy.mT @ (x @ a.mT)), None

    def f() -> Tensor:
        return Function.apply(job.x, job.w, job.a.to(job.dtype), job.b.to(job.dtype), job.scale)  # type: ignore[no-any-return, no-untyped-call]

    return job.step(f, job.a, job.b)


def dense_dora(job: Job) -> Step:
    """c from a materialised W + s·B A, the rest as LoRA: what a plain, good implementation does."""

    def f() -> Tensor:
        with torch.no_grad():
            n = dense_norm(job.w, job.a.to(job.dtype), job.b.to(job.dtype), job.scale)
        y = lora_first(job.x, job.w, job.a.to(job.dtype), job.b.to(job.dtype), job.scale)
        return y * (job.mag / n).to(job.dtype)

    return job.step(f, job.a, job.b, job.mag)


def peft(job: Job, *, dora: bool = False, half: bool = False, compiled: bool = False) -> Step:
    """PEFT: by default its adapters are fp32, `half` has them in the model's dtype. DoRA's norm goes through eye(k)."""
    from peft import LoraConfig, get_peft_model

    model = nn.Sequential(nn.Linear(job.k, job.n, bias=False, device="meta"))
    model[0].weight = nn.Parameter(job.w, requires_grad=False)
    config = LoraConfig(
        r=job.r, lora_alpha=job.scale * job.r, target_modules=["0"], lora_dropout=job.dropout, use_dora=dora
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=not half)
    layer = adapted.base_model.model[0]
    leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    if dora:
        leaves.append(layer.lora_magnitude_vector["default"].weight)
    with torch.no_grad():
        for leaf, value in zip(leaves, (job.a, job.b, job.mag), strict=False):
            leaf.copy_(value)
    adapted.train()
    call = torch.compile(adapted) if compiled else adapted
    return job.step(lambda: call(job.x), *leaves)


def lycoris(job: Job, *, dora: bool = False) -> Step:
    """lycoris-lora's LoCon, which picks its fused kernels where it finds them."""
    from lycoris.modules.locon import LoConModule

    layer = nn.Linear(job.k, job.n, bias=False, device=job.device, dtype=job.dtype)
    with torch.no_grad():
        layer.weight.copy_(job.w)
    layer.requires_grad_(False)
    module = LoConModule(
        "site", layer, 1.0, job.r, job.scale * job.r, job.dropout, weight_decompose=dora, bypass_mode=not dora
    ).to(job.device)
    with torch.no_grad():
        module.lora_down.weight.copy_(job.a)
        module.lora_up.weight.copy_(job.b)
        if dora:
            module.dora_scale.copy_(job.mag.view_as(module.dora_scale))
    module.to(job.dtype)
    module.apply_to()
    leaves = [module.lora_down.weight, module.lora_up.weight] + ([module.dora_scale] if dora else [])
    return job.step(lambda: layer(job.x), *leaves)


def lora_ways(job: Job, *, compiled: bool) -> dict[str, Callable[[], Step]]:
    ways: dict[str, Callable[[], Step]] = {
        "base": lambda: base(job),
        "peftfn": lambda: ours(job, pf.LoRA(job.r, alpha=job.scale * job.r, dropout=job.dropout)),
        "peftfn, all Triton": lambda: forced(job, False),
        "PEFT in half precision": lambda: peft(job, half=True),
        "PEFT": lambda: peft(job),
        "lycoris-lora": lambda: lycoris(job),
    }
    if not job.dropout:
        ways |= {"peftfn, no Triton": lambda: tier0(job), "base first (Unsloth)": lambda: base_first(job)}
    if compiled:
        ways["PEFT, compiled"] = lambda: peft(job, compiled=True)
    return ways


def dora_ways(job: Job) -> dict[str, Callable[[], Step]]:
    return {
        "base": lambda: base(job),
        "peftfn": lambda: ours(job, pf.DoRA(job.r, alpha=job.scale * job.r)),
        "peftfn, all Triton": lambda: forced(job, True),
        "dense B A": lambda: dense_dora(job),
        "PEFT (eye)": lambda: peft(job, dora=True),
        "PEFT (eye) in half precision": lambda: peft(job, dora=True, half=True),
        "lycoris-lora": lambda: lycoris(job, dora=True),
    }


class Batch:
    """A mixed batch of `rows` tokens over `slots` adapters of rank r: a [slots, r, k], b [slots, n, r] in `dtype`."""

    def __init__(self, rows: int, slots: int, r: int, d: int, dtype: torch.dtype, device: str):
        from peftfn.kernels.mixed_lora import Stack
        from peftfn.kernels.segments import segments

        g = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(rows, d, generator=g, device=device).to(dtype)
        self.w = torch.randn(d, d, generator=g, device=device).mul_(d**-0.5).to(dtype)
        self.a = torch.randn(slots, r, d, generator=g, device=device).mul_(d**-0.5).to(dtype)
        self.b = torch.randn(slots, d, r, generator=g, device=device).to(dtype)
        self.index = torch.arange(rows, device=device) % slots
        self.rows = segments(self.index, slots)
        self.stack = Stack(self.a, self.b, 2.0)
        self.y = torch.zeros(rows, d, dtype=dtype, device=device)

    def exact(self) -> Tensor:
        x, w, a, b = (t.double() for t in (self.x, self.w, self.a, self.b))
        change = torch.einsum("tk,trk->tr", x, a[self.index])
        return x @ w.mT + 2.0 * torch.einsum("tr,tnr->tn", change, b[self.index])

    def ways(self, base: bool) -> dict[str, Callable[[], Callable[[], Tensor]]]:
        """name → maker of a call. base: with the base product; else the low-rank pair alone, added onto a y."""
        from peftfn.kernels import mixed_lora as op

        def kernels() -> Callable[[], Tensor]:
            from peftfn.kernels import mixed_triton as kernel
            from peftfn.kernels.choose import target

            there = target(self.x.device)
            assert there is not None, "no kernels on this device"
            down, up = self.stack.sides(self.a, self.b)

            def pair() -> Tensor:
                kernel.wide(there, kernel.thin(there, self.x, down, self.rows), up, self.rows, self.y)
                return self.y

            def whole() -> Tensor:
                with use("triton"), torch.no_grad():
                    return op.mixed_lora(self.x, self.w, (self.stack, self.rows))

            return whole if base else pair

        def gathered() -> Callable[[], Tensor]:
            def pair() -> Tensor:
                s = torch.bmm(self.a[self.index], self.x[:, :, None])
                return torch.bmm(self.b[self.index], s).squeeze(2).mul_(2.0)

            return (lambda: torch.mm(self.x, self.w.mT).add_(pair())) if base else pair

        def atomics() -> Callable[[], Tensor]:
            from benchmarks.gpu_atomics import pair as run

            def pair() -> Tensor:
                return run(self.x, self.a, self.b, self.index, self.y, 2.0)

            def whole() -> Tensor:
                return run(self.x, self.a, self.b, self.index, torch.mm(self.x, self.w.mT), 2.0)

            return whole if base else pair

        def one_by_one() -> Callable[[], Tensor]:
            known = sorted(set(self.index.tolist()))
            rows = [(self.index == k).nonzero()[:, 0] for k in known]

            def pair() -> Tensor:
                y = torch.zeros_like(self.y)
                for k, mine in zip(known, rows, strict=True):
                    y[mine] = self.x[mine] @ self.a[k].mT @ self.b[k].mT * 2.0
                return y

            return (lambda: torch.mm(self.x, self.w.mT).add_(pair())) if base else pair

        made: dict[str, Callable[[], Callable[[], Tensor]]] = {
            "peftfn": kernels, "gathered bmm": gathered, "split-K with atomics": atomics,
            "a loop over adapters": one_by_one,
        }  # fmt: skip
        if len(self.index) * self.a[0].numel() > 2**31:  # every row's own copy of A and B would be many GB
            del made["gathered bmm"]
        if base:
            made["base"] = lambda: lambda: torch.mm(self.x, self.w.mT)
        return made


LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
"""Llama-8B: q, k, v, o, gate, up, down, as [out, in]."""


class Layer:
    """A mixed batch of `rows` tokens through one layer's products, each on an input of its width."""

    def __init__(self, rows: int, slots: int, r: int, dtype: torch.dtype, device: str, *, small: bool):
        from peftfn.kernels.mixed_lora import Stack
        from peftfn.kernels.segments import segments

        g = torch.Generator(device).manual_seed(0)
        shapes = tuple((n // 256, k // 256) for n, k in LAYER) if small else LAYER

        def t(*size: int, std: float = 1.0) -> Tensor:
            return torch.randn(size, generator=g, device=device, dtype=torch.float32).mul_(std).to(dtype)

        self.xs = {k: t(rows, k) for _, k in shapes}
        self.ws = [t(n, k, std=k**-0.5) for n, k in shapes]
        self.stacks = [Stack(t(slots, r, k, std=k**-0.5), t(slots, n, r), 2.0) for n, k in shapes]
        self.rows = segments(torch.arange(rows, device=device) % slots, slots)

    def ways(self) -> dict[str, Callable[[], Callable[[], tuple[Tensor, ...]]]]:
        from peftfn.kernels.mixed_lora import mixed_lora

        def base() -> tuple[Tensor, ...]:
            return tuple(torch.mm(self.xs[w.shape[1]], w.mT) for w in self.ws)

        def adapted(mode: str) -> Callable[[], tuple[Tensor, ...]]:
            def call() -> tuple[Tensor, ...]:
                with use(mode), torch.no_grad():  # type: ignore[arg-type]
                    each = zip(self.ws, self.stacks, strict=True)
                    return tuple(mixed_lora(self.xs[w.shape[1]], w, (stack, self.rows)) for w, stack in each)

            return call

        made: dict[str, Callable[[], Callable[[], tuple[Tensor, ...]]]] = {
            "base": lambda: base,
            "peftfn": lambda: adapted("auto"),
            "peftfn, all Triton": lambda: adapted("triton"),
        }
        return made


class Tenants:
    """k tenants with so many tokens each: one batch, or one call after another."""

    def __init__(self, k: int, tokens: int, r: int, d: int, dtype: torch.dtype, device: str):
        self.batch, self.k, self.tokens = Batch(k * tokens, k, r, d, dtype, device), k, tokens
        self.index = torch.arange(k, device=device).repeat_interleave(tokens)

    def ways(self) -> dict[str, Callable[[], Callable[[], Tensor | tuple[Tensor, ...]]]]:
        from peftfn.kernels.mixed_lora import mixed_lora
        from peftfn.kernels.segments import segments

        b = self.batch
        rows = segments(self.index, self.k)

        def together() -> Tensor:
            with torch.no_grad():
                return mixed_lora(b.x, b.w, (b.stack, rows))

        def one_by_one() -> tuple[Tensor, ...]:
            with torch.no_grad():
                each = zip(b.x.split(self.tokens), b.a, b.b, strict=True)
                return tuple(lora_linear(x, b.w, down, up, 2.0) for x, down, up in each)

        return {
            "base": lambda: lambda: torch.mm(b.x, b.w.mT),
            "peftfn": lambda: together,
            "peftfn, one tenant after another": lambda: one_by_one,
        }


def composed(m: int, n: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], Callable[[], Tensor]]]:
    """c ⊙ v, where v is base + s·change already; PEFT makes it of the two, in eager operations."""
    from peftfn.kernels.choose import target
    from peftfn.kernels.lora_triton import rowwise

    v, change = torch.randn(m, n, device=device).to(dtype), torch.randn(m, n, device=device).to(dtype)
    c, there = torch.rand(n, device=device) + 0.5, target(torch.device(device))
    assert there is not None, "no kernels on this device"
    return {
        "peftfn": lambda: lambda: rowwise(there, v, c),
        "torch.mul": lambda: lambda: torch.mul(v, c, out=torch.empty_like(v)),
        "PEFT's operations": lambda: lambda: v + ((c - 1).to(dtype) * v + c.to(dtype) * change * 2.0),
    }
