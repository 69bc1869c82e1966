"""Products: an output belongs to what the left operand's position is."""

from typing import Any

from torch import Tensor

from peftfn.slots.following.table import rule
from peftfn.slots.tags import Unfollowed, alike, alone, constant, joined, lifted
from peftfn.slots.track import Seen, Tags


@rule("linear")
def _linear(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    if id(seen.arg(1, "weight")) in seen.tags:
        raise Unfollowed("its weight has rows")
    return alone(seen.must(x), [x.dim() - 1])


@rule("matmul mm bmm mv addmm baddbmm grouped_mm _grouped_mm", in_place=True)
def _product(seen: Seen, out: Any) -> Tags:
    start = 1 if seen.name.strip("_") in ("addmm", "baddbmm") else 0
    a, b = seen.args[start : start + 2] if len(seen.args) > start + 1 else (None, None)
    if seen.name == "__rmatmul__":
        a, b = b, a
    if not isinstance(out, Tensor) or a is None:
        raise Unfollowed("its operands are named")
    ta = seen.rows(a)
    tb = seen.rows(b) if ta is None else seen.maybe(b)
    if start and id(seen.args[0]) in seen.tags and ta is None:
        raise Unfollowed("what it adds to has rows")
    if not isinstance(b, Tensor) or a.dim() < 2 or b.dim() < 2 or "grouped" in seen.name:
        if ta is None or tb is not None or out.dim() != a.dim():
            raise Unfollowed("its right operand has rows, or is a vector")
        return alone(ta, [a.dim() - 1])
    left = None if ta is None else lifted(alone(ta, [a.dim() - 1]), out.dim())
    right = None if tb is None else constant(tb, [b.dim() - 2])
    if left is None:
        if right is None:
            raise Unfollowed("it sums over positions of different rows")
        return lifted(right, out.dim())
    if tb is not None:
        _meets(left, None if right is None else lifted(right, out.dim()), out.dim())
    return left


def _meets(left: Tensor, right: Tensor | None, dims: int) -> None:
    """Where the positions of the left operand are all of one row, so are those that they are multiplied with."""
    mine = constant(left, [dims - 2])
    theirs = None if right is None else constant(right, [dims - 1])
    if mine is not None and theirs is not None and joined(mine, theirs) is None:
        raise Unfollowed("its operands belong to different rows")


@rule("embedding")
def _embedded(seen: Seen, out: Any) -> Tags:
    first = seen.arg(0, "input")
    ids = first if isinstance(first, Tensor) and not first.is_floating_point() else seen.arg(1, "weight")
    return seen.must(ids).unsqueeze(-1)


@rule("one_hot")
def _one_hot(seen: Seen, out: Any) -> Tags:
    return seen.must(seen.arg(0, "tensor")).unsqueeze(-1)


@rule("einsum")
def _einsum(seen: Seen, out: Any) -> Tags:
    equation, *operands = seen.args
    operands = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if "." in equation or "->" not in equation:
        raise Unfollowed("its equation has an ellipsis, or no arrow")
    left, right = equation.replace(" ", "").split("->")
    result = None
    for letters, x in zip(left.split(","), operands, strict=True):
        tag = seen.rows(x)
        if tag is None:
            continue
        if len(set(letters)) < len(letters):
            raise Unfollowed("its equation has a letter twice")
        gone = [d for d, c in enumerate(letters) if c not in right]
        kept = [c for c in letters if c in right]
        tag = alone(tag, gone).squeeze(gone).permute([kept.index(c) for c in right if c in kept])
        for d, c in enumerate(right):
            if c not in kept:
                tag = tag.unsqueeze(d)
        if result is not None and not alike(result, tag):
            raise Unfollowed("its operands belong to different rows")
        result = tag
    return result
