"""Operands: values that stand for a tensor in a parameter's slot, or for w in a method's formula.

An operand has a tensor's metadata and a dense value, and may know a faster product than the dense one. torch hands it
every function that has it among the arguments (`__torch_function__`): those it has a form of its own for go there, and
**every other function, attribute and operator sees the dense value**. It is a plain object, no tensor subclass: there
is no storage that a kernel could read in its place, so what does not know it fails loudly.

Kinds: the adapted weight and the weight of a mixed batch (slots), the quantised weight (quantised_weight.py).
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor


class Operand:
    """A kind defines `shape`, `dtype`, `device` and `dense`; and `call`, where it has forms of functions of its own."""

    __slots__ = ()
    shape: Size
    dtype: torch.dtype
    device: torch.device
    layout, is_sparse, is_quantized, is_nested = torch.strided, False, False, False

    def dense(self) -> Tensor:
        """The value, as a tensor."""
        raise NotImplementedError

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        """func(*args, **kwargs), with an operand of this kind among the arguments."""
        return func(*dense(args), **dense(kwargs))

    def attribute(self, name: str) -> Any:
        """An attribute or method of tensors that is not metadata."""
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return cls.call(func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return self.attribute(name)

    def __getitem__(self, index: Any) -> Any:
        return self.dense()[dense(index)]

    ndim = property(lambda self: len(self.shape))
    is_meta = property(lambda self: self.device.type == "meta")
    is_cuda = property(lambda self: self.device.type == "cuda")

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def _operators() -> None:
    """Python's operators go the way of torch's functions."""

    def make(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
        def operate(self: Operand, *others: Any) -> Any:
            return self.__torch_function__(function, (), (*others, self) if reflected else (self, *others))

        return operate

    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul"]:
        setattr(Operand, f"__{name}__", make(getattr(operator, name), False))
        setattr(Operand, f"__r{name}__", make(getattr(operator, name), True))
    for name in ["neg", "pos", "abs", "eq", "ne", "lt", "le", "gt", "ge"]:
        setattr(Operand, f"__{name}__", make(getattr(operator, name), False))
    Operand.__hash__ = object.__hash__  # type: ignore[method-assign]


_operators()


def dense(tree: Any) -> Any:
    """Nested arguments with every operand in them made dense."""
    if isinstance(tree, Operand):
        return tree.dense()
    if type(tree) is dict:
        return {k: dense(v) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(dense(v) for v in tree)
    return tree
