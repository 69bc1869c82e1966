"""What one adapter puts into the slots of a call, kept for its next call.

An adapter that serves many calls makes the same values each time: the same tensors, transposed for the same products.
A `Kept` is an adapted weight that has them transposed already. It is for calls without gradients; where a forward turns
gradients on, it is the adapted weight that it was made of.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from peftfn.core.method import LowRank
from peftfn.kernels import choose
from peftfn.kernels.lora_linear import accumulated
from peftfn.slots.keeper import alive, unmade
from peftfn.slots.values import Given
from peftfn.slots.weight import AdaptedWeight
from peftfn.tensors.operand import Operand
from peftfn.tensors.transform import in_function, lasting


class Kept(AdaptedWeight):
    """An adapted weight that serves several calls: a low-rank change of a plain matrix, of one dtype throughout."""

    __slots__ = ("down", "gain", "kind", "scale", "tensors", "up", "wide")

    def __init__(self, v: AdaptedWeight, low: LowRank):
        self.entry, self.method, self.fast, self.w = v.entry, v.method, v.fast, v.w
        self.tensors = {k: weakref.ref(t) for k, t in v.p.items()}
        self.scale, self.kind = low.scale, v.w.dtype
        with lasting(), torch.no_grad():
            self.down, self.up, self.wide = low.down.mT, low.up.mT, v.canonical().mT
            self.gain = None if low.gain is None else low.gain.detach()

    @property
    def p(self) -> dict[str, Any]:  # type: ignore[override]
        """What it was made of: the caller's adapter holds these tensors for the length of the call."""
        return alive(self.tensors, self.name)

    @property
    def low(self) -> LowRank | None:  # type: ignore[override]
        return self.method.low_rank(self.p)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.held["bias"]
        if (
            self.task != torch._C._current_graph_task_id()
            or torch.is_grad_enabled()
            or forward_ad._current_level >= 0
            or torch._C._functorch.maybe_current_level() is not None
            or torch._C._is_any_autocast_enabled()
            or not isinstance(x, Tensor)
            or x.dtype is not self.kind
            or not (bias is None or (bias.dtype is self.kind and not isinstance(bias, Operand)))
            or choose.fits(x)
            or not (torch._C._is_fwd_grad_enabled() or not in_function())
        ):
            return super().forward(x)
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        s = torch.mm(flat, self.down)
        if self.gain is None:
            y = accumulated(flat, s, self.wide, self.up, bias, self.scale)
        else:
            y = self.gain * accumulated(flat, s, self.wide, self.up, None, self.scale)
            y = y if bias is None else y + bias
        return y if flat is x else y.view(*x.shape[:-1], y.shape[-1])


def kept(v: Any, given: Sequence[Given]) -> Kept | None:
    """What stands for v in the next calls of its adapter; None if it must be made each time."""
    if type(v) is not AdaptedWeight or (low := v.low) is None or low.dropout:
        return None
    plain = len(v.w.shape) == low.down.dim() == low.up.dim() == 2
    return Kept(v, low) if plain and unmade(low, v.entry, v.p, v.w, given[0].adapter) else None
