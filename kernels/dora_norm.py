"""n = ‖W + s·B A‖, row by row: the norm that DoRA divides by.

On a GPU a kernel makes it without the sum (dora_triton.py). Up to rank 16, or beside an fp32 weight, its B A is exact
in fp32; above, the factors are rounded to the weight's dtype before, as they are for the layer's own products. Its
gradient, for an attached norm, is exact in thin products, with e = dn/n:

    dB = s·e ⊙ (W Aᵀ + s·B (A Aᵀ))      dA = s·(e ⊙ B)ᵀ W + s²·(Bᵀ (e ⊙ B)) A      dW = e ⊙ (W + s·B A)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from peftfn.kernels.choose import Target, kernels_for, memory_bound


class _Norm(Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, a: Tensor, b: Tensor, scale: float, there: Target) -> Tensor:  # type: ignore[override]
        from peftfn.kernels.dora_triton import norm

        n = norm(there, w, *rounded(w, a, b), scale)
        ctx.save_for_backward(w, a, b, n)
        ctx.scale = scale
        return n

    @staticmethod
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        w, a, b, n = ctx.saved_tensors
        need_w, need_a, need_b, _, _ = ctx.needs_input_grad
        scale, wide = ctx.scale, w.to(a.dtype)
        if torch.is_grad_enabled():  # to be differentiated again, n must depend on its inputs
            n = reference(w, a, b, scale)
        e = torch.where(n == 0, 0.0, dn / n).to(a.dtype)[:, None]
        eb = e * b
        db = scale * e * (wide @ a.mT + scale * (b @ (a @ a.mT))) if need_b else None
        da = scale * (eb.mT @ wide) + scale**2 * ((b.mT @ eb) @ a) if need_a else None
        dw = (e * torch.addmm(wide, b, a, alpha=scale)).to(w.dtype) if need_w else None
        return dw, da, db, None, None


def dora_norm(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖w + scale·b a‖ row by row, [out]: w [out, in], a [r, in], b [out, r], a and b at least as wide as w."""
    there = kernels_for(w, a, b) if a.dtype == b.dtype else None
    if there is None or not memory_bound(*w.shape):
        return reference(w, a, b, scale)
    n: Tensor = _Norm.apply(w, a, b, float(scale), there)  # type: ignore[no-untyped-call]
    return n.to(b.dtype)


def dora_norms(
    ws: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]
) -> Sequence[Tensor]:
    """The norms of many sites, [out] each, as constants for the gradient: in one launch if they are all alike."""
    sites = list(zip(ws, downs, ups, scales, strict=True))
    there = kernels_for(*ws, *downs, *ups)
    alike = there is not None and len({(w.shape, w.stride(), w.dtype, a.shape, a.stride(), a.dtype, b.stride(), b.dtype)
                                       for w, a, b, _ in sites}) == 1  # fmt: skip
    with torch.no_grad():
        if there is None or not alike or downs[0].dtype != ups[0].dtype or not memory_bound(*ws[0].shape):
            return [dora_norm(*site) for site in sites]
        from peftfn.kernels.dora_triton import norms

        factors = [rounded(w, a, b) for w, a, b in zip(ws, downs, ups, strict=True)]
        return norms(there, ws, [a for a, _ in factors], [b for _, b in factors], scales).to(ups[0].dtype).unbind()


EXACT = 16
"""Up to this rank, exact products take no longer than reading a half-precision weight does."""


def rounded(w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The factors as the kernel multiplies them."""
    return (a, b) if len(a) <= EXACT or w.dtype is torch.float32 else (a.to(w.dtype), b.to(w.dtype))


def reference(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """What `dora_norm` means."""
    if w.dtype == b.dtype:
        return torch.linalg.vector_norm(torch.addmm(w, b, a, alpha=scale), dim=1)
    return torch.linalg.vector_norm(w + scale * (b @ a), dim=1)
