"""y = c ⊙ (x Wᵀ + s·drop(x) Aᵀ Bᵀ) + bias on a GPU: LoRA with seeded dropout, and DoRA, whose c = m/n is [out].

One autograd.Function over the kernels of lora_triton.py; each product runs as a kernel or by the vendor's library, as
choose.py says. Kept for backward: x, S = drop(x) Aᵀ [m, r], a seed; and v, what c multiplies, where c is trained.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from peftfn.kernels.choose import Products, Target, kernels_for, products
from peftfn.kernels.philox import fresh_seed, keep


class _Fused(Function):
    # No functorch transform comes here (choose.py), so forward takes ctx itself. What runs as a kernel is decided
    # before, and kept: backward runs in a thread of its own, which knows nothing of `use`.

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        w: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        bias: Tensor | None,
        scale: float,
        p: float,
        seed: Tensor | None,
        there: Target,
        by: Products,
        graded: bool,
    ) -> Tensor:
        import peftfn.kernels.lora_triton as ops

        needs_v = graded and c is not None and ctx.needs_input_grad[4]
        down, up = a.to(x.dtype), b.to(x.dtype)  # masters are cast once, for backward too
        s = ops.shrink(there, x, down, p, seed) if p else torch.mm(x, down.mT)
        if by.large:
            y, v = ops.gemm(there, x, w, s, up, scale, c=c, bias=bias, keep_v=needs_v)
        else:
            y, v = _by_library(there, x, w, s, up, c, bias, scale)
            v = v if needs_v else None
        ctx.save_for_backward(x, w, a, b, c, s, v, seed, down, up)
        ctx.scale, ctx.p, ctx.there, ctx.by = scale, p, there, by
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, a, b, c, s, v, seed, down, up = ctx.saved_tensors
        need = ctx.needs_input_grad
        if torch.is_grad_enabled():  # to be differentiated again: plain operations, from the inputs alone
            grads = gradients(dy, x, w, a, b, c, ctx.scale, ctx.p, seed)
        elif ctx.by.thin:
            grads = _by_kernels(ctx, dy, x, w, down, up, c, s, v, seed, (a.dtype, b.dtype))
        else:
            grads = gradients(dy, x, w, a, b, c, ctx.scale, ctx.p, seed, s=s, v=v, need=need)
        dbias = dy.sum(0) if need[5] else None
        return *(g if n else None for g, n in zip(grads, need, strict=False)), dbias, *[None] * 6


def _by_library(
    there: Target, x: Tensor, w: Tensor, s: Tensor, b: Tensor, c: Tensor | None, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(y, v) as `gemm` gives them, in the fewest passes: what is added to the large product is there before it."""
    if c is None and bias is not None:
        y = torch.addmm(bias.to(x.dtype), s, b.mT, alpha=scale).addmm_(x, w.mT)
        return y, y
    v = torch.mm(s, b.mT).addmm_(x, w.mT, beta=scale)
    if c is None:
        return v, v
    import peftfn.kernels.lora_triton as ops

    return ops.rowwise(there, v, c, bias), v


def _by_kernels(
    ctx: Any,
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    s: Tensor,
    v: Tensor | None,
    seed: Tensor | None,
    masters: tuple[torch.dtype, torch.dtype],
) -> tuple[Tensor | None, ...]:
    """a and b in x's dtype; `masters` are the dtypes of their gradients."""
    import peftfn.kernels.lora_triton as ops

    there, scale, p, need = ctx.there, ctx.scale, ctx.p, ctx.needs_input_grad
    need_x, need_w, need_a, need_b = need[:4]
    dx = dw = da = db = dc = ds = None
    if c is not None and v is None:  # c takes no gradient: only c ⊙ dy is wanted
        dy, c = ops.rowwise(there, dy, c), None
    if need_b:
        db = torch.empty(b.shape, dtype=masters[1], device=b.device)
    one_pass = b.shape[1] <= 32 and (need_a or need_x)  # above, the planes of dS cost more than a second pass
    dv = dy
    if need_b or one_pass or c is not None:
        up = b if one_pass else None
        swept = ops.sweep(there, dy, s if need_b else None, up, c=c, v=v, scale=scale, down=db, dtype=x.dtype)
        ds, dv = swept.across, dy if swept.scaled is None else swept.scaled
        dc = None if c is None or swept.sums is None else swept.sums.to(c.dtype)
    if ds is None and (need_a or need_x):
        ds = torch.mm(dv, b).mul_(scale)
    if need_a:
        da = torch.empty(a.shape, dtype=masters[0], device=a.device)
        ops.sweep(there, x, ds, None, p=p, seed=seed, down=da.mT)
    if need_x and ds is not None:
        if ctx.by.large:
            dx = ops.gemm(there, dv, w.mT, ds, a.mT, 1.0, p=p, seed=seed)[0]
        else:
            dx = ops.expand(there, ds, a.mT, p, seed) if p else torch.mm(ds, a)
            dx.addmm_(dv, w)
    if need_w:
        dw = torch.mm(dv.mT, x)
    return dx, dw, da, db, dc


def gradients(
    dy: Tensor,
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    scale: float,
    p: float,
    seed: Tensor | None,
    *,
    s: Tensor | None = None,
    v: Tensor | None = None,
    need: tuple[bool, ...] = (True,) * 5,
) -> tuple[Tensor | None, ...]:
    """dx, dW, dA, dB, dc in plain torch, differentiable themselves. s, v: what forward kept, if it may be used."""
    down, up = a.to(x.dtype), b.to(x.dtype)

    def drop(t: Tensor) -> Tensor:
        return t * keep(seed, *t.shape, p) / (1 - p) if p and seed is not None else t

    dropped = drop(x)
    s = dropped @ down.mT if s is None else s
    dv = dy if c is None else dy * c.to(dy.dtype)
    ds = scale * (dv @ up)
    dx = drop(ds @ down).addmm_(dv, w) if need[0] else None  # in place: addmm copies what it adds to
    dw = dv.mT @ x if need[1] else None
    da = (ds.mT @ dropped).to(a.dtype) if need[2] else None
    db = (scale * (dv.mT @ s)).to(b.dtype) if need[3] else None
    dc = None
    if c is not None and need[4]:
        v = (scale * (s @ up.mT)).addmm_(x, w.mT) if v is None else v
        dc = (dy * v).sum(0).to(c.dtype)
    return dx, dw, da, db, dc


def fused_linear(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    *,
    c: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor | None:
    """c ⊙ (x Wᵀ + scale·drop(x) Aᵀ Bᵀ) + bias, or None where plain torch has to run it.

    x [..., in] and w [out, in] of one dtype; a [r, in], b [out, r], c [out] of that or fp32 → [..., out].
    seed: one int64 on x's device, which the dropout mask is a function of; None draws one from torch's generator.
    """
    there = kernels_for(x, w, a, b, c, bias)
    if there is None or x.dtype != w.dtype:
        return None
    n, k = w.shape
    by = products(there, x.numel() // max(k, 1), n, k, len(a), x.dtype, plain=c is None and not dropout)
    if by is None or (dropout and not by.thin):
        return None
    if dropout and seed is None:
        seed = fresh_seed(x.device)
    flat = x.reshape(-1, k)
    args = (flat, w, a, b, c, bias, float(scale), dropout, seed, there, by, torch.is_grad_enabled())
    y: Tensor = _Fused.apply(*args)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], n)


def reference(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    *,
    c: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """What `fused_linear` means."""
    dropped = x
    if dropout and seed is not None:
        kept = keep(seed, x.numel() // x.shape[-1], x.shape[-1], dropout).view(x.shape)
        dropped = x * kept.to(x.dtype) / (1 - dropout)
    v = F.linear(x, w) + scale * F.linear(F.linear(dropped, a.to(x.dtype)), b.to(x.dtype))
    v = v if c is None else v * c.to(v.dtype)
    return v if bias is None else v + bias
