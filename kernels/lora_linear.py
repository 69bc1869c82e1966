"""y = x Wᵀ + (x Aᵀ) Bᵀ, for a frozen W: the low-rank product first, then the base product added onto it.

The order saves a full-size pass: y = S Bᵀ is written once and the base product accumulates into it (`addmm_`), where
adding a low-rank result to a base result reads and writes both. Only x and S = x Aᵀ [m, r] are kept for backward:

    dS = dy B      dB = dyᵀ S      dA = dSᵀ x      dx = dS A + dy W
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F


class _LoRALinear(Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        s = x @ a.mT
        return (s @ b.mT).addmm_(x, w.mT), s

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w, a, b = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, w, a, b, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, w, a, b, s = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second differentiation runs through S as well
            s = x @ a.mT
        need_x, need_w, need_a, need_b = ctx.needs_input_grad
        ds = dy @ b if need_x or need_a else None
        dx = torch.addmm(ds @ a, dy, w) if need_x and ds is not None else None
        dw = dy.mT @ x if need_w else None
        da = ds.mT @ x if need_a and ds is not None else None
        db = dy.mT @ s if need_b else None
        return dx, dw, da, db


def lora_linear(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x Wᵀ + (x Aᵀ) Bᵀ with the fewest passes; eager autograd only, see `peftfn.transform.eager`.

    x [..., in], w [out, in], a [r, in], b [out, r] (the scale folded in), all of one dtype → [..., out].
    """
    flat = x.reshape(-1, x.shape[-1])
    y: Tensor = _LoRALinear.apply(flat, w, a, b)[0]  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], w.shape[0])


def reference(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """What `lora_linear` means."""
    return F.linear(x, w) + F.linear(F.linear(x, a), b)
