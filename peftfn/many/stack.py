"""Stack k adapters of the same structure into one tree with a leading axis of size k."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfn.tensors.tree import stack_size, unstacked


def stack(adapters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack k adapters of the same structure into one tree with a leading axis of size k.

    The result is for `vmap`, `net.mixed`, `net.gated`, or training many adapters at once.

    Args:
        adapters: a list of adapters of one net.

    Returns:
        A tree like each adapter, whose tensors are [k, …]: copies.

    Raises:
        ValueError: the list is empty, or two adapters differ in their structure, a shape, a dtype or a device; it names
            the first place.
        TypeError: `adapters` is not a list of adapters.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        many = pf.stack([net.init(seed=s) for s in range(3)])
        assert many["0.weight"]["a"].shape == (3, 2, 8)
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
                f"stack: adapters 0 and {i} differ at {odd}, which only one of them has: stack adapters of one net"
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
                "adapters of different ranks do not stack; fit them to one net with peftfn.conform"
            )
        if t.dtype != ts[0].dtype or t.device != ts[0].device:
            raise ValueError(
                f"stack: {path} is {ts[0].dtype} on {ts[0].device} in adapter 0 and {t.dtype} on {t.device} in adapter "
                f"{i}: convert them to the same dtype and device"
            )
    return torch.stack(ts)


def unstack(stacked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Split a stack into its adapters.

    Args:
        stacked: what `stack` returned; each tensor is [k, …].

    Returns:
        A list of k adapters, whose tensors are views of the stack's.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        a, b = pf.unstack(pf.stack([net.init(seed=0), net.init(seed=1)]))
    """
    return [unstacked(stacked, i) for i in range(stack_size(stacked))]
