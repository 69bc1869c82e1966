"""Tags: which row of a batch each position of a tensor belongs to, and arithmetic with them.

A tag is a tensor of integers with as many dimensions as its tensor, and broadcastable to it: [rows, 1, 1] of
[rows, tokens, d], [n, 1] after flattening, [tokens, rows, 1] with the sequence first. −1: a position of no row.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from peftfn.tensors.arguments import batched


class Lost:
    """What stands in the place of a tag where the rows are not known any more, and why."""

    def __init__(self, why: str):
        self.why = why


class Unfollowed(Exception):
    """Raised by a rule: the rows of the output are not known. Its text says why."""


class RowsLost(ValueError):
    """Raised by a site of a mixed batch that does not know whose the positions of its input are.

    text: what it says without the advice to name a routed module.
    """

    def __init__(self, message: str, text: str = ""):
        super().__init__(message)
        self.text = text or message


def full(tag: Tensor, shape: Sequence[int], upto: int) -> Tensor:
    """The tag with its dimensions before `upto` expanded to the tensor's."""
    return tag.expand(*shape[:upto], *tag.shape[upto:])


def small(tag: Tensor) -> Tensor:
    """The tag, cut to 1 in dimensions along which it is one value by construction."""
    for d in range(tag.dim()):
        if tag.shape[d] > 1 and tag.stride(d) == 0:
            tag = tag.narrow(d, 0, 1)
    return tag


def constant(tag: Tensor, dims: Iterable[int]) -> Tensor | None:
    """The tag cut to 1 in `dims`; None if it differs along one of them."""
    tag = small(tag)
    for d in dims:
        if tag.shape[d] == 0:
            tag = tag.new_full([1 if i == d % tag.dim() else n for i, n in enumerate(tag.shape)], -1)
        elif tag.shape[d] != 1:
            first = tag.narrow(d, 0, 1)
            if not alike(tag, first):
                return None
            tag = first
    return tag


def alone(tag: Tensor, dims: Iterable[int]) -> Tensor:
    """The tag, of one row along `dims`, over which the function joins values."""
    one = constant(tag, dims)
    if one is None:
        raise Unfollowed("it joins positions of different rows")
    return one


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tags are certain to say the same: of those that a `vmap` is over, in all samples."""
    if a is b:
        return True
    if batched(a) or batched(b):
        (a, over), (b, too) = _bare(a), _bare(b)
        return over == too and a.shape == b.shape and torch.equal(a, b)
    return torch.equal(*torch.broadcast_tensors(a, b))


def _bare(t: Tensor) -> tuple[Tensor, list[tuple[int, int]]]:
    """(the values of all samples, which dimension each `vmap` is over)."""
    over = []
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        over.append((torch._C._functorch.maybe_get_level(t), torch._C._functorch.maybe_get_bdim(t)))
        t = torch._C._functorch.get_unwrapped(t)
    return t, over


def joined(a: Tensor, b: Tensor) -> Tensor | None:
    """The tag of what is made of two tensors, position by position; None where they belong to different rows."""
    if alike(a, b):
        return a if a.numel() >= b.numel() else b
    if batched(a) or batched(b):
        return None
    a, b = torch.broadcast_tensors(a, b)
    agree = (a == b) | (a < 0) | (b < 0)
    return torch.maximum(a, b) if bool(agree.all()) else None


def lifted(tag: Tensor, dims: int) -> Tensor:
    return tag.view(*[1] * (dims - tag.dim()), *tag.shape) if tag.dim() < dims else tag


def reshaped(tag: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The tag of a tensor of shape `old`, row-major, seen with shape `new`."""
    old, new, tag = list(old), list(new), small(tag)
    if 0 in old:
        return tag.new_zeros([1] * len(new))
    first = max((d + 1 for d, n in enumerate(tag.shape) if n > 1), default=0)  # what it varies in is before this
    before = 1
    for n in old[:first]:
        before *= n
    ends, product = {1: 0}, 1
    for j, n in enumerate(new):
        product *= n
        ends.setdefault(product, j + 1)
    while before not in ends:
        if first == len(old) - 1 and new and new[-1] % old[-1] == 0:  # several vectors side by side in the new one
            out = full(tag, old, first).reshape(*new[:-1], new[-1] // old[-1])
            one = constant(out, [len(new) - 1])
            return one if one is not None else out.repeat_interleave(old[-1], -1)
        before, first = before * old[first], first + 1
    end = ends[before]
    return full(tag, old, first).reshape(*new[:end], *[1] * (len(new) - end))
