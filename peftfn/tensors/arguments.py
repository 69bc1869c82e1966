"""Tensors in the arguments of a call: nested lists, tuples and dicts of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftfn.tensors.sharded import is_sharded


def tensors(tree: Any) -> list[Tensor]:
    """The tensors, of at least one dimension, in nested arguments."""
    found: list[Tensor] = []
    visit(tree, lambda v: found.append(v) if isinstance(v, Tensor) and v.dim() else None)
    return found


def visit(tree: Any, see: Callable[[Any], Any]) -> None:
    """see(v) for each value, in order."""
    mapped(tree, lambda v: (see(v), v)[1])


def mapped(tree: Any, f: Callable[[Any], Any]) -> Any:
    """The arguments with f of each value; lists and tuples of classes of their own are values."""
    if isinstance(tree, dict):
        return {k: mapped(v, f) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(mapped(v, f) for v in tree)
    return f(tree)


def storages(given: list[Tensor]) -> frozenset[int]:
    """Where the tensors of indices have their values."""
    found = []
    for t in given:
        if not t.is_floating_point():
            while torch._C._functorch.is_functorch_wrapped_tensor(t):
                t = torch._C._functorch.get_unwrapped(t)
            found.append(memory(t))
    return frozenset(found)


def memory(t: Tensor) -> int:
    """Where t's storage is. It is only looked at, which nobody who watches functions of torch needs to know."""
    with torch._C.DisableTorchFunction():
        return t.untyped_storage().data_ptr()


def batched(t: Tensor) -> bool:
    """Whether a `vmap` is over t, so that nobody can look at its values."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def hidden(t: Tensor) -> bool:
    """Whether nobody can look at t's values now: while compiling, under a vmap over it, or in the capture of a graph,
    whose replays have other values in it."""
    if torch.compiler.is_compiling() or batched(t):
        return True
    if t.device.type == "cpu":
        return False
    capturing = getattr(torch.get_device_module(t.device), "is_current_stream_capturing", None)
    return capturing is not None and bool(capturing())


def picked(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of x that `rows` names."""
    return x[rows] if is_sharded(x) else x.index_select(0, rows)  # whose gradient torch gives a wrong size there
