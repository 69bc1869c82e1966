"""Functions that see the same positions in another shape or order."""

from typing import Any

import torch
from torch import Tensor

from peftfn.slots.following.table import rule, without_input
from peftfn.slots.tags import Unfollowed, constant, lifted, reshaped
from peftfn.slots.track import Seen, Tags
from peftfn.tensors.arguments import batched


@rule("view reshape flatten unflatten view_as reshape_as")
def _reshape(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    tag = seen.rows(x)
    if tag is None:
        return None  # only what it is to look like has rows
    if out.numel() != x.numel():
        raise Unfollowed("it changes the dtype")
    key, made = (id(tag), x.shape, out.shape), seen.tracking.made
    if key not in made:
        made[key] = tag, reshaped(tag, x.shape, out.shape)
    return made[key][1]  # type: ignore[no-any-return]


@rule(
    "permute transpose swapaxes swapdims movedim moveaxis t unsqueeze flip roll adjoint rot90 fliplr flipud",
    attributes="T mT H mH",
)
def _moved(seen: Seen, out: Any) -> Tags:
    """What treats a dimension of size 1 as one of any other size."""
    tag = seen.must(seen.arg(0, "input"))
    if seen.name in ("roll", "rot90") and seen.arg(2, "dims", None) is None:
        raise Unfollowed("it names no dimension")
    moved: Tensor = seen.f(tag, *seen.args[1:], **without_input(seen))
    return moved


@rule("squeeze")
def _squeeze(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    dim = seen.arg(1, "dim")
    dims = range(x.dim()) if dim is None else dim if isinstance(dim, list | tuple) else [dim]
    return seen.must(x).squeeze([d for d in dims if x.shape[d] == 1])


@rule("expand expand_as broadcast_to")
def _expand(seen: Seen, out: Any) -> Tags:
    tag = seen.rows(seen.arg(0, "input"))
    return None if tag is None else lifted(tag, out.dim())


@rule("repeat tile")
def _repeat(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    tag = lifted(seen.must(x), out.dim())
    shape = (1,) * (out.dim() - x.dim()) + tuple(x.shape)
    times = [n // s if s else 1 for n, s in zip(out.shape, shape, strict=True)]
    return tag.repeat([n if tag.shape[d] > 1 else 1 for d, n in enumerate(times)])


@rule("as_strided")
def _strided(seen: Seen, out: Any) -> Tags:
    """The same memory with other strides: so is the tag, laid out in memory as its tensor is."""
    x = seen.arg(0, "input")
    tag, at = seen.must(x), (x.storage_offset(), out.storage_offset())
    if batched(x) or batched(tag):
        raise Unfollowed("a vmap is over what it sees with other strides")
    ends = [1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) for t in (x, out)]
    first = min(at)
    laid = torch.full([max(a + n for a, n in zip(at, ends, strict=True)) - first], _UNSEEN, device=tag.device)
    laid.as_strided(x.shape, x.stride(), at[0] - first).copy_(tag.expand(x.shape))
    new = laid.as_strided(out.shape, out.stride(), at[1] - first)
    if out.numel() and bool((new == _UNSEEN).any()):
        raise Unfollowed("it sees memory that its input does not")
    for d in range(new.dim()):
        one = constant(new, [d])
        new = new if one is None else one
    return new


_UNSEEN = -2
