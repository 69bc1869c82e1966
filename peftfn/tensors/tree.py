"""Nested dicts of tensors, in the order they are written in (optree sorts the keys, so the two are never zipped)."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor


def leaves(tree: Any) -> list[Any]:
    """Return the tensors of an adapter, or of any nested dict, in order. An optimizer takes such a list.

    Args:
        tree: an adapter, a stack, a gradient.

    Returns:
        Its tensors: the objects themselves.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        a = net.init()
        optimizer = torch.optim.AdamW([t.requires_grad_() for t in pf.leaves(a)], lr=1e-3)
    """
    return [t for v in tree.values() for t in leaves(v)] if isinstance(tree, Mapping) else [tree]


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
