"""The memory of what a function makes, counted operation by operation."""

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak(f: Callable[..., Any], *args: Any) -> int:
    """The most bytes that tensors made during f(*args) have at one time. Views of older tensors do not count."""
    with _Live() as live:
        f(*args)
    return live.most


class _Live(TorchDispatchMode):
    """Counts the memory of every tensor that an operation returns, until the last tensor that uses it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._see((args, kwargs), made=False)
        out = func(*args, **(kwargs or {}))
        self._see(out, made=True)
        return out

    def _see(self, tree: Any, made: bool) -> None:
        """Storages that are new here: what an operation made, or, among its inputs, what was there before f."""
        for t in tree_leaves(tree):
            if not isinstance(t, Tensor):
                continue
            storage = t.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if key in self.seen or not size:
                continue
            self.seen.add(key)
            counted = size if made else 0
            self.now += counted
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key, counted)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size
