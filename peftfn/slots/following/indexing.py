"""Functions that take some positions, or put several tensors' together."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.slots.following.table import rule, without_input
from peftfn.slots.tags import Unfollowed, alike, constant, full, joined, lifted, small
from peftfn.slots.track import Seen, Tags


@rule(
    "select narrow index_select split split_with_sizes chunk tensor_split unbind unfold repeat_interleave diagonal "
    "hsplit vsplit dsplit narrow_copy masked_select"
)
def _taken(seen: Seen, out: Any) -> Tags:
    """The same function of the tag, expanded in the dimensions that the function looks at."""
    x = seen.arg(0, "input")
    tag, last, rest = seen.rows(x), x.dim(), without_input(seen)
    if tag is None:
        return None  # only its indices have rows
    if seen.name in ("index_select", "narrow", "select", "repeat_interleave", "unfold"):
        dim = seen.arg(2 if seen.name == "repeat_interleave" else 1, "dim" if seen.name != "unfold" else "dimension")
        last = x.dim() if dim is None else dim % x.dim() + 1
        rest.pop("output_size", None)
    elif seen.name in ("chunk", "split", "split_with_sizes", "tensor_split"):
        dim = seen.arg(2, "dim", 0)
        if tag.shape[dim] == 1:
            return [tag] * len(out)
    new = seen.f(full(small(tag), x.shape, last), *seen.args[1:], **rest)
    return small(new) if isinstance(out, Tensor) else [small(n) for n in new]


@rule("gather take_along_dim")
def _gathered(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    tag, at = seen.rows(x), ("dim", 1) if seen.name == "gather" else ("dim", 2)
    if tag is None:
        return None
    dim = seen.arg(at[1], at[0])
    tag = small(tag)
    same = zip(tag.shape, x.shape, out.shape, strict=True) if out.dim() == x.dim() else []
    if dim is not None and tag.shape[dim] == 1 and same and all(n == 1 or n == m == o for n, m, o in same):
        return tag
    found: Tensor = seen.f(tag.expand(x.shape), *seen.args[1:], **without_input(seen))
    return found


_MASKS = (torch.bool, torch.uint8)


def looked_at(x: Tensor, index: Any) -> int:
    """How many leading dimensions of x an index looks at."""
    looked = 0
    for i in index if isinstance(index, tuple) else (index,):
        if i is Ellipsis:
            return x.dim()
        if i is not None:
            looked += i.dim() if isinstance(i, Tensor) and i.dtype in _MASKS else 1
    return looked


def _asked(seen: Seen, index: Any, out: Tensor) -> Tags:
    """What has no rows, at indices that have: who asks owns what it gets, where that is in the order of the indices."""
    parts = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, Tensor) and i.dtype in (torch.long, torch.int) for i in parts):
        return None
    dims, tag = max(i.dim() for i in parts), None
    for i in parts:
        found = seen.rows(i)
        found = None if found is None else lifted(found, dims)
        tag = found if tag is None else tag if found is None else joined(tag, found)
        if tag is None and found is not None:
            raise Unfollowed("its indices belong to different rows")
    return None if tag is None else tag.view(*tag.shape, *[1] * (out.dim() - dims))


@rule("getitem")
def _getitem(seen: Seen, out: Any) -> Tags:
    x, index = seen.args
    tag, made = seen.rows(x), seen.tracking.made
    if tag is None:
        return _asked(seen, index, out)
    one = isinstance(index, Tensor) and not index.is_inference()
    key = ("item", id(tag), id(index), x.shape, index._version) if one else None
    if key is None or key not in made:
        found = small(full(small(tag), x.shape, looked_at(x, index))[index])
        if key is None:
            return found
        made[key] = tag, index, found
    return made[key][2]  # type: ignore[no-any-return]


@rule("cat concat concatenate stack")
def _cat(seen: Seen, out: Any) -> Tags:
    pieces, stacks = seen.arg(0, "tensors"), seen.name == "stack"
    dim = seen.arg(1, "dim", 0) % out.dim()
    known = [(p, tag) for p in pieces if (tag := seen.rows(p)) is not None]
    if not known:
        raise Unfollowed("none of its pieces has rows")
    tags = [tag.unsqueeze(dim) if stacks else tag for _, tag in known]
    thin = [constant(tag, [dim]) for tag in tags]
    first = thin[0]
    if any(t is not None and t.numel() > 1 for t in thin) and all(t is not None for t in thin):
        for t in thin[1:]:  # side by side, and yet of different rows: a model that takes one row's for another's
            if first is not None and t is not None and joined(first, t) is None:
                raise Unfollowed("it puts positions of different rows side by side")
    aligned = len(known) == len(pieces) or (first is not None and small(first).numel() > 1) or out.shape[0] == 1
    if aligned and first is not None and all(t is not None and alike(first, t) for t in thin[1:]):
        return first
    if len(known) < len(pieces):
        raise Unfollowed("some of its pieces have no rows")
    parts = [
        small(tag.expand((p.unsqueeze(dim) if stacks else p).shape)) for tag, (p, _) in zip(tags, known, strict=True)
    ]
    varies = [any(tag.shape[d] > 1 for tag in parts) for d in range(out.dim())]
    sizes = [[out.shape[d] if varies[d] else 1 for d in range(out.dim())] for _ in parts]
    for size, (p, _) in zip(sizes, known, strict=True):
        size[dim] = 1 if stacks else p.shape[dim]
    return torch.cat([tag.expand(size) for tag, size in zip(parts, sizes, strict=True)], dim)


@rule("pad")
def _pad(seen: Seen, out: Any) -> Tags:
    x, widths = seen.arg(0, "input"), seen.arg(1, "pad")
    tag, n = small(seen.must(x)), len(widths) // 2
    padded = [x.dim() - 1 - i for i in range(n) if widths[2 * i] or widths[2 * i + 1]]
    if (one := constant(tag, padded)) is not None:
        return one
    if seen.arg(2, "mode", "constant") != "constant":
        raise Unfollowed("it pads with positions of several rows")
    first = x.dim() - n
    return F.pad(tag.expand(*tag.shape[:first], *x.shape[first:]), widths, value=-1)
