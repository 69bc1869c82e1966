"""Nested dicts of tensors, in the order they are written in (optree sorts the keys, so the two are never zipped)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def leaves(tree: Any) -> Iterator[Any]:
    """The values, one after the other."""
    if isinstance(tree, Mapping):
        for v in tree.values():
            yield from leaves(v)
    else:
        yield tree


def mapped(tree: Any, f: Callable[[Any], Any]) -> Any:
    """The tree with f of each value; any mapping becomes a dict."""
    return {k: mapped(v, f) for k, v in tree.items()} if isinstance(tree, Mapping) else f(tree)


def stack_size(stacked: Mapping[str, Any]) -> int:
    """How many adapters a stack holds. ValueError if its tensors differ in their first dimension."""
    sizes = {t.shape[0] if isinstance(t, Tensor) and t.dim() else -1 for t in leaves(stacked)}
    if len(sizes) != 1 or sizes == {-1}:
        raise ValueError(
            f"this is no stack of adapters: the first dimensions of its tensors are {sorted(sizes)[:4]}, not one. "
            "Make one with peftfn.stack([…])"
        )
    return sizes.pop()


def unstacked(stacked: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Adapter i of a stack, as views."""
    return {k: unstacked(t, i) if isinstance(t, Mapping) else t.select(0, i) for k, t in stacked.items()}
