"""Adapters of one method and shape at one site, and their outputs on the rows that use them."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.func import vmap

from peftfn.core.combine import is_expression, own_name
from peftfn.core.method import LowRank
from peftfn.core.plan import Entry, WeightEntry
from peftfn.slots.rows import Bucket, Share
from peftfn.slots.weight import AdaptedWeight, Expert
from peftfn.tensors.arguments import picked
from peftfn.tensors.narrow import half_of
from peftfn.tensors.precision import cast, operand_dtype
from peftfn.tensors.transform import eager, level

Cut = Callable[[Tensor], Tensor]
"""x [rows, …] ↦ [some rows, …]"""
Use = Callable[..., Tensor]
"""(prepared tensors of one adapter, inputs …) ↦ an output"""
One = Callable[..., Tensor]
"""(number of one adapter in its stack, inputs …) ↦ an output"""
Run = Callable[[int, Cut], Tensor]
"""(adapter, −1 the base; cut) ↦ the output of the rows that cut takes"""

SIDE_BY_SIDE = 512
"""Factors of all adapters of a part that are fewer cost less than to sort positions by adapter."""


class Stack:
    """Adapters start … start + size − 1 of a batch, all of one method and one shape, at one site."""

    __slots__ = ("axes", "entry", "method", "p", "seen", "size", "start", "w")
    seen: dict[str, Tensor]  # of a method at a module: what its companions found in this call

    def __init__(self, entry: Entry, leaf: Mapping[str, Any], bank: Mapping[str, Any], w: Any, start: int, size: int):
        self.entry, self.w, self.start, self.size = entry, w, start, size
        self.method, self.p, self.axes = _stacked(entry, leaf, bank, entry.site.canonical(w))
        self._derive()

    @classmethod
    def alone(cls, entry: Entry, method: Any, p: dict[str, Any], w: Any, start: int = 0) -> Self:
        """One adapter as a stack of itself. p: its prepared tensors, without an axis of adapters."""
        out = cls.__new__(cls)
        out.entry, out.method, out.w, out.start, out.size = entry, method, w, start, 1
        out.p, out.axes = {k: t[None] for k, t in p.items()}, dict.fromkeys(p, 0)
        out._derive()
        return out

    def _derive(self) -> None:
        """What follows from p."""

    def mapped(self, f: Callable[[Tensor], Tensor]) -> Self:
        """The same with f of each tensor in it."""
        out = copy.copy(self)
        out.w, out.p = f(self.w) if isinstance(self.w, Tensor) else self.w, {k: f(t) for k, t in self.p.items()}
        out._derive()
        return out

    def has(self, k: int) -> bool:
        """Whether the batch's adapter k is one of these."""
        return self.start <= k < self.start + self.size

    def tensors(self, k: int) -> dict[str, Any]:
        """The prepared tensors of this stack's adapter k."""
        return take(self.p, self.axes, lambda t: t[k])

    def vmapped(self, local: Any, xs: Sequence[Tensor], f: Use) -> Tensor:
        """f(tensors of adapter local[i], xs[i]) for all i."""
        p = take(self.p, self.axes, lambda t: t[local])
        out: Tensor = vmap(f, (self.axes, *[0] * len(xs)), randomness="different")(p, *xs)
        return out

    def by_bucket(self, share: Share, xs: Sequence[Tensor], f: Use | None, one: One) -> Tensor:
        """What the adapters make of their rows of xs, in the order of the share: f for many under one vmap, or, where
        it is None, `one` for each."""
        out, pieces = [], zip(*(share.take(x).split([b.rows for b in share.buckets]) for x in xs), strict=True)
        for bucket, piece in zip(share.buckets, pieces, strict=True):
            if bucket.number > 1 and f is not None:
                rows = [x.unflatten(0, (bucket.number, bucket.each)) for x in piece]
                out.append(self.vmapped(bucket.adapters, rows, f).flatten(0, 1))
            else:
                ks = (
                    range(self.size)[bucket.adapters]
                    if isinstance(bucket.adapters, slice)
                    else bucket.adapters.tolist()
                )
                each = zip(*(x.split(bucket.each) for x in piece), strict=True)
                out += [one(k, *rows) for k, rows in zip(ks, each, strict=True)]
        return out[0] if len(out) == 1 else torch.cat(out)


class Part(Stack):
    """Adapters of a batch that change one weight."""

    __slots__ = ("experts", "level", "low", "made", "wide")
    entry: WeightEntry
    weight: type[AdaptedWeight] = AdaptedWeight  # what one of its adapters is

    def _derive(self) -> None:
        low = self.method.low_rank(self.p) if self._is_matrix else None
        self.low = None if low is None or low.dropout else low  # with dropout it is no product of matrices
        self.experts: dict[int, ExpertPart]
        self.made: dict[tuple[Bucket, torch.dtype], LowRank]
        self.wide: dict[torch.dtype, LowRank | None]
        self.renew()
        self.level = level()

    def renew(self) -> None:
        """Forget what was made for one call."""
        self.experts, self.made, self.wide = {}, {}, {}

    @property
    def _is_matrix(self) -> bool:
        return not self.entry.site.stacked

    def expert(self, e: int) -> "ExpertPart":
        """These adapters at one expert of a stack."""
        if e not in self.experts:
            self.experts[e] = ExpertPart.of(self, e)
        return self.experts[e]

    def side_by_side(self, dtype: torch.dtype) -> LowRank | None:
        """Of all experts of a stack, the factors of all adapters beside one another: down [experts, adapters · r, in],
        up [experts, out, adapters · r]. None where these are no factors of each adapter and expert, or too many.

        For products without gradients: made once in a call."""
        if dtype not in self.wide:
            self.wide[dtype] = self._side_by_side(dtype)
        return self.wide[dtype]

    def _side_by_side(self, dtype: torch.dtype) -> LowRank | None:
        over = self.entry.axes(self.p)
        if not self.entry.low or (self.entry.fp32 and half_of(dtype)):
            return None
        if any(self.axes[k] is None or over[k] is None for k in self.p):
            return None
        low = self.method.low_rank({k: t.flatten(0, 1) for k, t in self.p.items()})  # experts, as more adapters
        if low is None or low.gain is not None or low.dropout or not low.down.dim() == low.up.dim() == 3:
            return None
        if self.size * low.down.shape[-2] > SIDE_BY_SIDE:
            return None
        down = low.down.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(1, 2)
        up = low.up.unflatten(0, (self.size, -1)).permute(1, 2, 0, 3).flatten(2, 3)
        return LowRank(down.to(dtype), up.to(dtype), low.scale)

    def one(self, k: int) -> AdaptedWeight:
        """This part's adapter k alone."""
        return self.weight(self.entry, self.method, self.tensors(k), self.w)

    def using(self, adapted: Any) -> Use:
        """`adapted`, a function of an adapted weight and x, as one of its tensors and x."""
        return lambda p, x: adapted(self.weight(self.entry, self.method, p, self.w), x)

    def runs(self, x: Tensor, adapted: Any) -> Run:
        """(adapter, cut) ↦ its output on the rows of x that cut takes."""
        return lambda k, cut: adapted(self.one(k - self.start), cut(x))

    def is_low_rank(self, kind: str) -> bool:
        return self.low is not None and (kind == "linear" or self.entry.site.kind == "embedding")

    def vmaps(self, kind: str) -> bool:
        """Whether to run many adapters under one vmap, and not one by one."""
        fast = self.method.fast_linear() if kind == "linear" else self.method.overrides("product")
        return fast and self.method.per_row

    def run(self, share: Share, x: Tensor, kind: str, adapted: Any) -> Tensor:
        """The adapters' outputs on their rows, in the order of the share."""
        many = self.using(adapted) if self.vmaps(kind) else None
        return self.by_bucket(share, (x,), many, lambda k, x: adapted(self.one(k), x))

    def factors(self, bucket: Bucket, dtype: torch.dtype) -> LowRank:
        """down [number, r, in], up [number, out, r] and gain [number, out] of a bucket, in `dtype`."""
        low: LowRank = self.low  # type: ignore[assignment]
        whole = bucket.number == self.size and bucket.adapters == slice(0, self.size)
        if whole and low.down.dtype == dtype and low.down.dim() == low.up.dim() == 3:
            return low
        key = bucket, dtype
        if key in self.made and not torch.is_grad_enabled():
            return self.made[key]

        def cut(t: Tensor, dim: int) -> Tensor:
            whole = t if t.dim() > dim else t.expand(self.size, *t.shape)
            return whole[bucket.adapters].to(dtype)

        gain = None if low.gain is None else cut(low.gain, 1)
        made = LowRank(cut(low.down, 2), cut(low.up, 2), low.scale, gain)
        # Kept for a layer's later uses in this call (the steps of `generate`) where no graph is recorded: what has none
        # would lose the gradient of a use that records one, and a rematerialisation must repeat each use as it was.
        if not torch.is_grad_enabled() and level() == self.level:
            self.made[key] = made
        return made

    def add_low_rank(self, y: Tensor, share: Share, x: Tensor, kind: str) -> Tensor:
        """diag(c) (y + s·U D x) on the rows of the share, with each row's own U, D and c; y is the base's output."""
        dtype = operand_dtype(x) if kind == "linear" else y.dtype
        lows = [self.factors(b, dtype) for b in share.buckets]
        scale, middle, change = lows[0].scale, y.shape[1:-1], []
        pieces = share.take(x).split([b.rows for b in share.buckets])
        for bucket, low, piece in zip(share.buckets, lows, pieces, strict=True):
            shrunk = self._shrink(bucket, low, piece, kind)
            change.append(torch.bmm(shrunk, low.up.mT).view(bucket.rows, *middle, low.up.shape[-2]))
        added = (change[0] if len(change) == 1 else torch.cat(change)).to(y.dtype)
        if lows[0].gain is None:
            if share.rows is None:
                return y.add(added, alpha=scale)
            return y.index_add(0, share.rows, added, alpha=scale)
        c = torch.cat([low.gain.repeat_interleave(b.each, 0) for b, low in zip(share.buckets, lows, strict=True)])  # type: ignore[union-attr]
        c = c.view(-1, *[1] * len(middle), c.shape[-1]).to(y.dtype)
        if share.rows is None:
            return c * y.add(added, alpha=scale)
        return y.index_copy(0, share.rows, c * picked(y, share.rows).add(added, alpha=scale))

    def _shrink(self, bucket: Bucket, low: LowRank, x: Tensor, kind: str) -> Tensor:
        """D x, [number, tokens, r]; of an embedding, the columns of D that the ids name."""
        if kind == "linear":
            rows = x.reshape(bucket.number, -1, x.shape[-1])
            if rows.shape[1] <= 4:  # the long operand first: about half the time on a CPU where a row has few tokens
                return torch.bmm(low.down, rows.mT).mT
            return torch.bmm(rows, low.down.mT)
        owner = torch.arange(bucket.number, device=x.device).repeat_interleave(bucket.each)
        picked = low.down.mT[owner.view(-1, *[1] * (x.dim() - 1)), x]
        return picked.reshape(bucket.number, -1, picked.shape[-1])

    def linear(self, bucket: Bucket, x: Tensor, w: Any, base: Cut) -> Tensor:
        """A linear layer whose rows are this bucket as they stand: no row is moved. w: the base's weight [out, in]."""
        dtype = operand_dtype(x)
        low = self.factors(bucket, dtype)
        s = self._shrink(bucket, low, x, "linear")
        if not torch.is_grad_enabled() and eager(x) and isinstance(w, Tensor) and w.dtype == dtype:
            y = torch.bmm(s, low.up.mT)  # the base's product goes onto the low-rank one: a pass less over the output
            y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), w.mT, beta=low.scale)
            if low.gain is not None:
                y.mul_(low.gain[:, None])
        else:
            y = base(x)
            y = torch.baddbmm(
                y.reshape(bucket.number, -1, y.shape[-1]), s.to(y.dtype), low.up.mT.to(y.dtype), alpha=low.scale
            )
            y = y if low.gain is None else y * low.gain[:, None].to(y.dtype)
        return y.view(*x.shape[:-1], y.shape[-1])


class ExpertPart(Part):
    """Adapters of a batch at one expert of a stack."""

    __slots__ = ()
    weight = Expert
    _is_matrix = True  # type: ignore[assignment]

    @classmethod
    def of(cls, stack: Part, e: int) -> "ExpertPart":
        out = cls.__new__(cls)
        out.entry, out.method, out.axes, out.start, out.size = (
            *(stack.entry, stack.method, stack.axes),
            *(stack.start, stack.size),
        )
        over = stack.entry.axes(stack.p)
        out.p = {k: t if over[k] is None else t[e] if stack.axes[k] is None else t[:, e] for k, t in stack.p.items()}
        out.w = stack.w[e]
        out._derive()
        return out


def _stacked(entry: Entry, leaf: Any, bank: Any, w: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(method, prepared tensors, their `in_dims`) of a stack of leaves: what differs between adapters has an axis."""
    leaf, bank = dict(leaf), dict(bank)  # torch.func maps over the values of no other mapping
    if not is_expression(leaf):
        ready = leaf.keys() == entry.prepared.keys() and leaf.keys() != entry.spec.keys()
        if ready or not entry.method.overrides("prepare"):
            p = cast({**entry.frozen, **bank, **leaf}, torch.promote_types(w.dtype, torch.float32))
            return entry.method, p, {k: 0 if k in leaf or k in bank else None for k in p}
    fixed: list[Any] = []

    def one(leaf: Any, bank: Any) -> Any:
        method, p = entry.tensors(leaf, bank, w)
        fixed[:] = [method, _split(p, entry, False)]
        return _split(p, entry, True)

    varying = vmap(one, randomness="different")(leaf, bank) if leaf or bank else one(leaf, bank)
    method, constant = fixed
    return method, constant | varying, dict.fromkeys(constant) | dict.fromkeys(varying, 0)


def _split(p: dict[str, Any], entry: Entry, varying: bool) -> dict[str, Any]:
    def varies(name: str) -> bool:
        return name == "scale" or name in entry.prepared or name not in entry.frozen

    return {k: v for k, v in p.items() if varies(own_name(k)) == varying}


def take(p: dict[str, Any], axes: dict[str, Any], f: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {k: v if axes[k] is None else f(v) for k, v in p.items()}
