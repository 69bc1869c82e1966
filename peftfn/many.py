"""Stacks of adapters: k of one structure as one tree."""

from collections.abc import Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor


def stack(adapters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """k adapters of one structure as one tree whose tensors are [k, …]: for `vmap`, `mixed`, or training many at once.

    Raises ValueError naming the first place where they differ.
    """
    if not adapters:
        raise ValueError("stack: give at least one adapter")
    for i, other in enumerate(adapters):
        a, b = (optree.tree_paths(t) for t in (adapters[0], other))  # type: ignore[arg-type]
        if a != b:
            odd = "/".join(map(str, next(iter(set(a) ^ set(b)))))
            raise ValueError(
                f"stack: adapters 0 and {i} differ at {odd}, which only one of them has: they must be of one net"
            )

    def join(path: tuple[Any, ...], *ts: Tensor) -> Tensor:
        for i, t in enumerate(ts):
            if t.shape != ts[0].shape:
                raise ValueError(
                    f"stack: {'/'.join(map(str, path))} has shape {list(ts[0].shape)} in adapter 0 and {list(t.shape)} "
                    f"in adapter {i}: adapters of different ranks do not stack"
                )
        return torch.stack(ts)

    return optree.tree_map_with_path(join, *adapters)  # type: ignore[arg-type, return-value]


def unstack(stacked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The adapters of a stack, as views."""

    def view(i: int) -> Any:
        return optree.tree_map(lambda t: t[i], stacked)  # type: ignore[arg-type]

    return [view(i) for i in range(stack_size(stacked))]


def stack_size(stacked: Mapping[str, Any]) -> int:
    tensors: list[Tensor] = optree.tree_leaves(stacked)  # type: ignore[arg-type]
    sizes = {t.shape[0] if t.dim() else -1 for t in tensors}
    if len(sizes) != 1 or sizes == {-1}:
        raise ValueError(
            f"this is no stack of adapters: the first dimensions of its tensors are {sorted(sizes)[:4]}, not one. "
            "Make one with peftfn.stack([…])"
        )
    return sizes.pop()
