"""Dropout whose mask is a function of (seed, step, which call, place): of one adapter, whatever runs beside it.

Under `vmap`, torch draws the masks of all adapters in one go, so that an adapter's mask depends on its neighbours and
its slot. Here the mask is a hash, made of plain operations on integers, in which the seed may be batched.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

GOLDEN, FIRST, SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""splitmix64's constants, as signed integers."""


def mixed(z: Tensor) -> Tensor:
    """splitmix64's finaliser of an int64; products wrap around."""
    z = (z ^ _shifted(z, 30)) * FIRST
    z = (z ^ _shifted(z, 27)) * SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, n: int) -> Tensor:
    """z ≫ n of the unsigned number: torch's shift repeats the sign."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def key_of(seed: Tensor, step: Tensor) -> Tensor:
    """An int64 for one adapter's step."""
    return mixed(mixed(seed + GOLDEN) + step * GOLDEN)


def uniform(key: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    """In [0, 1), of 24 bits, in fp32."""
    places = torch.arange(1, torch.Size(shape).numel() + 1, device=device).view(*shape)
    return _shifted(mixed(key.to(device) + places * GOLDEN), 40).to(torch.float32) * 2.0**-24


class Keyed(TorchFunctionMode):
    """Inside, dropout takes its mask from a key; None turns dropout off.

    Every other draw is vmap's to refuse, and so is dropout in a rematerialised layer: torch turns modes off there, and
    the key would be of an outer `vmap`.
    """

    def __init__(self, key: Tensor | None):
        super().__init__()
        self.key, self.calls = key, count()

    def __torch_function__(
        self, f: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if f is F.dropout or f is torch.dropout:
            return self._dropout(*args, **kwargs)
        if f is F.scaled_dot_product_attention and _dropped(*args, **kwargs):
            if self.key is None:
                return f(*args[:4], **{**kwargs, "dropout_p": 0.0}, **dict(zip(("is_causal",), args[5:], strict=False)))
            raise ValueError(
                "sweep: fused attention draws its dropout itself, and not for each configuration: build the model with "
                'attn_implementation="eager", or without attention dropout'
            )
        return f(*args, **kwargs)

    def _dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, train: bool = True
    ) -> Tensor:
        if self.key is None or not (training and train) or not p:
            return input
        if p == 1:
            return input * 0
        keep = uniform(mixed(self.key + next(self.calls)), input.shape, input.device) >= p
        return input * keep.to(input.dtype) / (1 - p)


def _dropped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0, *more: Any, **rest: Any
) -> bool:
    return dropout_p > 0
