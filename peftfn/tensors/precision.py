"""In which precision values are computed."""

from typing import Any

import torch
from torch import Tensor

from peftfn.tensors.transform import autocast


def wide(t: Tensor) -> Tensor:
    """A floating tensor in fp32, or in its own dtype if that is wider; anything else as it is."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def cast(p: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """p with its floating tensors in `dtype`; p itself if they are."""
    for v in p.values():
        if v.dtype != dtype:
            return {k: v.to(dtype) if v.is_floating_point() else v for k, v in p.items()}
    return p


def operand_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with x runs: x's own, or autocast's."""
    if x.dtype != torch.float64 and autocast(x):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
