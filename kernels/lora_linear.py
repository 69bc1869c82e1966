"""y = c ⊙ (x Wᵀ + s·drop(x) Aᵀ Bᵀ), for a frozen W: what LoRA, DoRA and every other low-rank change computes.

`lora_linear` chooses: kernels on a GPU (lora_fused.py), the plain operations under a transform, a compiler or autocast,
and `lora_first` where plain eager autograd is all there is: the low-rank product first, then the base product added
onto it. The order saves a full-size pass: y = S Bᵀ is written once and the base product accumulates into it (`addmm_`,
whose beta is s), where adding a low-rank result to a base result reads and writes both. Only x and S = x Aᵀ [m, r] are
kept for backward:

    dS = s·dy B      dB = s·dyᵀ S      dA = dSᵀ x      dx = dS A + dy W
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from peftfn.kernels.lora_fused import fused_linear
from peftfn.transform import eager


def _forward(x: Tensor, s: Tensor, w: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.mm(s, b.mT).addmm_(x, w.mT, beta=scale)


class _LoRALinear(Function):
    # forward takes ctx itself: torch binds the arguments of a `setup_context` form anew at each call, which costs more
    # than a small product; and no functorch transform ever comes here.
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        s = torch.mm(x, a.mT)
        ctx.save_for_backward(x, w, a, b, s)
        ctx.scale = scale
        return _forward(x, s, w, b, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, a, b, s = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again, S must depend on x and A
            s = torch.mm(x, a.mT)
        need_x, need_w, need_a, need_b, _ = ctx.needs_input_grad
        ds = ctx.scale * torch.mm(dy, b)
        dx = torch.mm(ds, a).addmm_(dy, w) if need_x else None  # in place: addmm copies what it adds to
        dw = torch.mm(dy.mT, x) if need_w else None
        da = torch.mm(ds.mT, x) if need_a else None
        db = torch.mm(dy.mT, ctx.scale * s) if need_b else None
        return dx, dw, da, db, None


def lora_linear(
    x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, *, c: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """c ⊙ (x Wᵀ + scale·drop(x) Aᵀ Bᵀ), without c for ones; any transform may be active.

    x [..., in], w [out, in], a [r, in], b [out, r], c [out] → [..., out]. w may be any operand that `F.linear` takes.
    dropout: probability of dropping a feature of x on its way to A.
    """
    if (y := fused_linear(x, w, a, b, scale, c=c, dropout=dropout)) is not None:
        return y
    if dropout or not isinstance(w, Tensor) or not w.dtype == x.dtype == a.dtype or not eager(x):
        y = reference(x, w, a, b, scale, dropout)
    else:
        y = lora_first(x, w, a, b, scale)
    return y if c is None else c * y


def lora_first(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """x Wᵀ + scale·(x Aᵀ) Bᵀ in the fewest passes; for plain eager autograd, all operands of one dtype."""
    if x.dim() != 2:
        return lora_first(x.reshape(-1, x.shape[-1]), w, a, b, scale).view(*x.shape[:-1], w.shape[0])
    if torch.is_grad_enabled():
        if not a.requires_grad:  # LoRA-FA: plain autograd then keeps S alone, and no x
            return reference(x, w, a, b, scale)
        return _LoRALinear.apply(x, w, a, b, scale)  # type: ignore[no-any-return, no-untyped-call]
    return _forward(x, torch.mm(x, a.mT), w, b, scale)


def reference(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, dropout: float = 0.0) -> Tensor:
    """What `lora_linear` means."""
    return F.linear(x, w) + F.linear(scale * F.linear(F.dropout(x, dropout) if dropout else x, a), b)
