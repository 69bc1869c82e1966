"""The table of rules, and the functions that need none: they tell of a tensor, or make one that has no rows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.slots.track import Rule, Seen

RULES: dict[Any, Rule] = {}
_SPACES = (torch, Tensor, torch._C.TensorBase, F, torch._C._nn, torch.special, torch.linalg)


def _forms(names: str, in_place: bool) -> Iterator[Any]:
    """The functions of these names: of torch and of tensors, as operators, and those that write to their input."""
    for n in names.split():
        forms = [n, f"__{n}__", f"__r{n}__", *([f"{n}_", f"__i{n}__"] if in_place else [])]
        for space in _SPACES:
            for form in forms:
                f = getattr(space, form, None)
                if callable(f) and not isinstance(f, type):
                    yield f


def rule(names: str, *, attributes: str = "", in_place: bool = False) -> Callable[[Rule], Rule]:
    def register(r: Rule) -> Rule:
        for f in _forms(names, in_place):
            RULES.setdefault(f, r)
        for n in attributes.split():
            RULES[getattr(Tensor, n).__get__] = r
        return r

    return register


_READ = "shape dtype device ndim requires_grad is_cuda layout grad_fn is_leaf is_sparse is_quantized is_meta is_nested "
_READ += "grad _version _base itemsize nbytes"
_NO_ROWS = """
size dim numel stride is_floating_point is_contiguous tolist item __len__ __bool__ __int__ __index__ __hash__ __repr__
__format__ data_ptr storage_offset get_device element_size is_complex __float__ is_inference __contains__ nonzero histc
bincount zeros_like ones_like empty_like full_like rand_like randn_like equal allclose new_zeros new_empty new_ones
new_full new_tensor unique unique_consecutive _assert_async _assert is_tensor argwhere
"""
SILENT = frozenset([getattr(Tensor, n).__get__ for n in _READ.split()]) | frozenset(_forms(_NO_ROWS, False))
"""What tells of a tensor, or makes one whose positions are nobody's: that of `empty_like` is yet to be filled."""
LEAKS = frozenset(
    [Tensor.data.__get__, Tensor.untyped_storage, Tensor.numpy, Tensor.__array__, Tensor.__dlpack__]  # type: ignore[attr-defined]
)
"""What hands out the memory of a tensor, to be written to unseen."""


def without_input(seen: Seen) -> dict[str, Any]:
    return {k: v for k, v in seen.kwargs.items() if k != "input"}
