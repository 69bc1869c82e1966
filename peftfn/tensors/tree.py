"""Nested dicts of tensors, in the order they are written in (optree sorts the keys, so the two are never zipped)."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any


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
