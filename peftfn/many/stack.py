"""Stacks of adapters: k of one structure as one tree."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfn.tensors.tree import stack_size, unstacked


def stack(adapters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """k adapters of one structure as one tree whose tensors are [k, …]: for `vmap`, `mixed`, or training many at once.

    Raises ValueError naming the first place where they differ.
    """
    if isinstance(adapters, Mapping) or not isinstance(adapters, Sequence):
        raise TypeError(f"stack: give a list of adapters, not {type(adapters).__name__}")
    if not adapters:
        raise ValueError("stack: give at least one adapter")
    return _joined(adapters, "")


def _joined(trees: Sequence[Mapping[str, Any]], path: str) -> dict[str, Any]:
    first, out = trees[0], {}
    for i, other in enumerate(trees):
        if not isinstance(other, Mapping):
            raise TypeError(f"stack: {path or 'it'} is a {type(other).__name__} in adapter {i}; give a dict of tensors")
        if other.keys() != first.keys():
            odd = path + next(k for k in [*first, *other] if (k in first) != (k in other))
            raise ValueError(
                f"stack: adapters 0 and {i} differ at {odd}, which only one of them has: they must be of one net"
            )
    for k, t in first.items():
        values = [tree[k] for tree in trees]
        out[k] = _joined(values, f"{path}{k}/") if isinstance(t, Mapping) else _stacked(values, f"{path}{k}")
    return out


def _stacked(ts: list[Any], path: str) -> Tensor:
    for i, t in enumerate(ts):
        if not isinstance(t, Tensor):
            raise TypeError(f"stack: {path} is a {type(t).__name__} in adapter {i}; give a tensor")
        if t.shape != ts[0].shape:
            raise ValueError(
                f"stack: {path} has shape {list(ts[0].shape)} in adapter 0 and {list(t.shape)} in adapter {i}: "
                "adapters of different ranks do not stack; peftfn.conform makes them of one"
            )
        if t.dtype != ts[0].dtype or t.device != ts[0].device:
            raise ValueError(
                f"stack: {path} is {ts[0].dtype} on {ts[0].device} in adapter 0 and {t.dtype} on {t.device} in adapter "
                f"{i}: convert them to one"
            )
    return torch.stack(ts)


def unstack(stacked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The adapters of a stack, as views."""

    return [unstacked(stacked, i) for i in range(stack_size(stacked))]
