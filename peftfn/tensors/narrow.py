"""A half-precision weight among fp32 operands: its own product stays in half precision, all else is fp32."""

from typing import Any

import torch
from torch import Size, Tensor
from torch.nn import functional as F

from peftfn.tensors.operand import Operand, dense

HALVES = (torch.bfloat16, torch.float16)


def half_of(*dtypes: torch.dtype) -> torch.dtype | None:
    """The first of them that is a half-precision dtype."""
    return next((d for d in dtypes if d in HALVES), None)


class Narrow(Operand):
    """W as fp32, for a method's formula: `F.linear(x, W)` runs in `half`, every other function sees W widened.

    W may be an operand itself, such as a quantised weight.
    """

    __slots__ = ("half", "w")
    dtype = torch.float32

    def __init__(self, w: Any, half: torch.dtype):
        self.w, self.half = w, half

    @property
    def shape(self) -> Size:  # type: ignore[override]
        return self.w.shape  # type: ignore[no-any-return]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.w.device  # type: ignore[no-any-return]

    def dense(self) -> Tensor:
        return dense(self.w.to(torch.float32))  # type: ignore[no-any-return]

    def linear(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.half), self.w.to(self.half)).float()

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if func is F.linear and not kwargs and len(args) == 2 and isinstance(args[0], Tensor):
            return args[1].linear(args[0])
        return super().call(func, args, kwargs)
