"""Writes: the positions written to belong to the rows of what is written."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from peftfn.slots.following.indexing import looked_at
from peftfn.slots.following.table import rule
from peftfn.slots.tags import Lost, Unfollowed, alone, constant, full, lifted, small
from peftfn.slots.track import Seen, Tags
from peftfn.tensors.arguments import batched


def _blank(x: Tensor, before: Tensor | None, upto: int, like: Tensor) -> Tensor:
    """A tag of x to write into, as it was before."""
    if before is not None:
        return full(before, x.shape, upto).clone()
    return torch.full((*x.shape[:upto], *[1] * (x.dim() - upto)), -1, device=like.device)


@rule("setitem")
def _setitem(seen: Seen, out: Any) -> Tags:
    x, index, value = seen.args
    before, tag = seen.rows(x), seen.rows(value)
    if tag is None:
        return before
    n = looked_at(x, index)
    if before is not None and any(s > 1 for s in before.shape[n:]):
        raise Unfollowed("it writes across positions of different rows")
    target = torch.empty((*x.shape[:n], *[1] * (x.dim() - n)), device=tag.device)[index]
    tag = alone(lifted(tag, target.dim()), range(target.dim() - (x.dim() - n), target.dim()))
    new = _blank(x, before, n, tag)
    if batched(tag) or any(
        batched(i) for i in (index if isinstance(index, tuple) else (index,)) if isinstance(i, Tensor)
    ):
        raise Unfollowed("a vmap is over where it writes")
    new[index] = tag
    if bool((new[index] != tag).any()):
        raise Unfollowed("positions of different rows are written to one place")
    return new


@rule("index_add index_copy", in_place=True)
def _index_add(seen: Seen, out: Any) -> Tags:
    x, dim, index, source = (seen.arg(i, n) for i, n in enumerate(("input", "dim", "index", "source")))
    before, tag = seen.rows(x), seen.rows(source)
    if tag is None:
        return before
    dim %= x.dim()
    tag = full(small(tag), source.shape, dim + 1)
    if any(n > 1 for n in tag.shape[dim + 1 :]):
        raise Unfollowed("positions of different rows in later dimensions")
    if batched(tag) or batched(index):
        raise Unfollowed("a vmap is over where it writes")
    new = _blank(x, before, dim + 1, tag)
    return _checked(new.index_copy(dim, index, tag), new, lambda t: t.index_select(dim, index), tag)


def _checked(new: Tensor, old: Tensor, read: Callable[[Tensor], Tensor], tag: Tensor) -> Tensor:
    """The new tag, if what was written is there, and nothing of another row was there before."""
    same = read(new) == tag
    if not bool(same.all()) or not bool(((old == new) | (old < 0)).all()):
        raise Unfollowed("positions of different rows are written to one place")
    return new


@rule("scatter scatter_add scatter_reduce", in_place=True)
def _scatter(seen: Seen, out: Any) -> Tags:
    x, dim, index = (seen.arg(i, n) for i, n in enumerate(("input", "dim", "index")))
    src = seen.arg(3, "src", seen.kwargs.get("value"))
    before, tag, dim = seen.rows(x), seen.rows(src), dim % x.dim()
    if tag is None:
        rows = seen.rows(index)
        if before is not None or rows is None:
            return before
        mine = constant(rows, [dim])  # constants where indices say that have rows: a mask of chosen experts
        fits = all(a == b for d, (a, b) in enumerate(zip(index.shape, x.shape, strict=True)) if d != dim)
        return mine if fits else Lost("scatter writes to some of its positions")
    if batched(tag) or batched(index):
        raise Unfollowed("a vmap is over where it writes")
    tag = tag.expand(src.shape)[tuple(slice(0, n) for n in index.shape)]
    new = _blank(x, before, x.dim(), tag)
    new = _checked(new.scatter(dim, index, tag), new, lambda t: t.gather(dim, index), tag)
    return new if (one := constant(new, [x.dim() - 1])) is None else one


@rule("masked_scatter", in_place=True)
def _masked_scatter(seen: Seen, out: Any) -> Tags:
    """Values that are put into places of x, which are x's rows' places: features of images among those of tokens."""
    return seen.must(seen.arg(0, "input"))
