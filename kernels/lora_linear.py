"""y = c ⊙ (x Wᵀ + s·drop(x) Aᵀ Bᵀ) + bias, for a frozen W: what LoRA, DoRA and every other low-rank change computes.

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

from peftfn.kernels import choose
from peftfn.kernels.lora_fused import fused_linear
from peftfn.tensors.transform import autocast, eager


def accumulated(x: Tensor, s: Tensor, w: Tensor, b: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """x w + scale·s b + bias: x [m, in], w [in, out], s [m, r], b [r, out]."""
    if bias is None:
        return torch.mm(s, b).addmm_(x, w, beta=scale)
    return torch.addmm(bias, s, b, alpha=scale).addmm_(x, w)


class _LoRALinear(Function):
    # forward takes ctx itself: torch binds the arguments of a `setup_context` form anew at each call, which costs more
    # than a small product; and no functorch transform ever comes here.
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, scale: float
    ) -> Tensor:
        s = torch.mm(x, a.mT)
        need_x, need_w, need_a, need_b, *_ = ctx.needs_input_grad
        saved = (  # what the gradients read, and no more: factors may be large, as RandLoRA's are
            x if need_w or need_a or need_b else None,
            w if need_x else None,
            a if need_x or need_b else None,
            b if need_x or need_a else None,
            s if need_b else None,
        )
        ctx.save_for_backward(*saved)
        ctx.scale = scale
        return accumulated(x, s, w.mT, b.mT, bias, scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, a, b, s = ctx.saved_tensors
        need_x, need_w, need_a, need_b, need_bias, _ = ctx.needs_input_grad
        if need_b and torch.is_grad_enabled():  # to be differentiated again, S must depend on x and A
            s = torch.mm(x, a.mT)
        ds: Any = ctx.scale * torch.mm(dy, b) if need_x or need_a else None
        dx = torch.mm(ds, a).addmm_(dy, w) if need_x else None  # in place: addmm copies what it adds to
        dw = torch.mm(dy.mT, x) if need_w else None
        da = torch.mm(ds.mT, x) if need_a else None
        db = torch.mm(dy.mT, ctx.scale * s) if need_b else None
        return dx, dw, da, db, dy.sum(0) if need_bias else None, None


def lora_linear(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    *,
    c: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """c ⊙ (x Wᵀ + scale·drop(x) Aᵀ Bᵀ) + bias, without c for ones; any transform may be active.

    x [..., in], w [out, in], a [r, in], b [out, r], c and bias [out] → [..., out]. w may be any operand that `F.linear`
    takes. dropout: probability of dropping a feature of x on its way to A.
    """
    if choose.fits(x):
        fused = fused_linear(x, w, a, b, scale, c=c, bias=bias, dropout=dropout)
        if fused is not None:
            return fused
        if a.dtype != x.dtype and isinstance(w, Tensor) and not autocast(x):  # masters, where no kernel reads them
            a, b, c = a.to(x.dtype), b.to(x.dtype), None if c is None else c.to(x.dtype)
    if dropout or not isinstance(w, Tensor) or not w.dtype == x.dtype == a.dtype or not eager(x):
        y = reference(x, w, a, b, scale, dropout)
    elif c is None:
        return lora_first(x, w, a, b, scale, bias)
    else:
        y = lora_first(x, w, a, b, scale)
    y = y if c is None else c * y
    return y if bias is None else y + bias.to(y.dtype)


def lora_first(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + scale·(x Aᵀ) Bᵀ + bias in the fewest passes; for plain eager autograd, all operands of one dtype."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    graded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad or x.requires_grad or w.requires_grad)
    if not graded and (bias is None or not bias.requires_grad):
        y = accumulated(flat, torch.mm(flat, a.mT), w.mT, b.mT, bias, scale)
    elif a.requires_grad:
        y = _LoRALinear.apply(flat, w, a, b, bias, scale)  # type: ignore[no-untyped-call]
    else:  # LoRA-FA: plain autograd then keeps S alone, and no x
        y = reference(flat, w, a, b, scale)
        y = y if bias is None else y + bias
    return y if flat is x else y.view(*x.shape[:-1], w.shape[0])


def reference(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float = 1.0, dropout: float = 0.0) -> Tensor:
    """What `lora_linear` means."""
    return F.linear(x, w) + F.linear(scale * F.linear(F.dropout(x, dropout) if dropout else x, a), b)
