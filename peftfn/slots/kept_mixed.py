"""What the stacks of a mixed batch put into the slots of a call, kept for their next call.

A bank serves many batches from the same slots, and each names other rows: what its stacks make of a layer does not
depend on them. As in kept.py, this is for calls without gradients.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from peftfn.core.functions import bank_of
from peftfn.kernels import choose
from peftfn.slots import batch
from peftfn.slots.gates import Gates, Index
from peftfn.slots.keeper import alive, unmade
from peftfn.slots.mixed import MixedWeight
from peftfn.slots.part import Part
from peftfn.slots.pertoken import PerToken
from peftfn.slots.rows import Bucket, Share
from peftfn.slots.slot import plus
from peftfn.slots.values import Given
from peftfn.tensors.operand import Operand
from peftfn.tensors.transform import in_function, lasting


class Rows(NamedTuple):
    """Where the rows of one stack's adapters are in a batch."""

    share: Share | None
    alone: bool  # whether all rows of the batch use this stack's adapters
    whole: Bucket | None  # all of its adapters, each on as many rows, in order: its factors and the rows as they stand


class KeptMixed(MixedWeight):
    """A mixed weight that serves several calls: low-rank changes of a plain matrix, of one dtype throughout."""

    __slots__ = ("kind", "leading", "quick", "source", "stands", "theirs", "turned", "wide")
    stands: Mapping[int, Rows]  # by the first adapter of a stack
    leading: tuple[int, ...]  # rows of the batch; rows and tokens, where each token has an adapter of its own

    def __init__(self, v: MixedWeight, source: Sequence[Any]):
        """source: of each part (entry, weak references to the tensors of leaf and bank, first adapter, number)"""
        self.entry, self.w, self.kind, self.source = v.entry, v.w, v.w.dtype, source
        with lasting(), torch.no_grad():
            self.quick = [part.mapped(lambda t: t.detach()) for part in v.parts]
            self.turned = [(part.low.down.mT, part.low.up.mT) for part in self.quick]  # type: ignore[union-attr]
            self.theirs = v.canonical()
            self.wide = self.theirs.mT
        for part in self.quick:
            part.w = v.w

    @property
    def parts(self) -> list[Part]:  # type: ignore[override]
        """Of the caller's own tensors, which may have gradients, where a forward turns these on."""
        if not torch.is_grad_enabled() and torch._C._functorch.maybe_current_level() is None:
            return self.quick
        return [
            Part(e, alive(leaf, e.site.name), alive(bank, e.site.name), self.w, *at)
            for e, leaf, bank, *at in self.source
        ]

    def forward(self, x: Tensor) -> Tensor:
        bias, rows = self.held["bias"], self.rows
        if (
            self.task != torch._C._current_graph_task_id()
            or torch.is_grad_enabled()
            or forward_ad._current_level >= 0
            or torch._C._functorch.maybe_current_level() is not None
            or torch._C._is_any_autocast_enabled()
            or type(x) is not Tensor
            or x.dtype is not self.kind
            or x.dim() <= len(self.leading)
            or x.shape[: len(self.leading)] != self.leading
            or rows.common is not None
            or id(x) in rows.fixed
            or (x._base is not None and id(x._base) in rows.fixed)
            or (rows.call is not None and self.tracking() is not None)
            or not (bias is None or (bias.dtype is self.kind and not isinstance(bias, Operand)))
            or choose.fits(x)
            or not (torch._C._is_fwd_grad_enabled() or not in_function())
        ):
            return super().forward(x)
        if len(self.leading) == 2:
            return self._rowed(x.flatten(0, 1), bias).unflatten(0, self.leading)
        return self._rowed(x, bias)

    def _rowed(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for x, whose first dimension counts what has an adapter of its own."""
        if len(self.quick) == 1 and (bucket := self.stands[self.quick[0].start].whole) is not None:
            return self._whole(x, bucket, bias)
        used = [(part, at.share) for part in self.quick if (at := self.stands[part.start]).share is not None]
        if len(used) == 1 and self.stands[used[0][0].start].alone:
            part, share = used[0]
            tokens = x.numel() // max(1, x.shape[0] * x.shape[-1])
            if (bucket := share.as_it_stands(tokens, part.low.down.shape[-2])) is not None:  # type: ignore[union-attr]
                return plus(part.linear(bucket, x, self.theirs, self._base), bias)
        y = self._base(x)
        for part, share in used:
            y = part.add_low_rank(y, share, x, "linear")  # type: ignore[arg-type]
        return plus(y, bias)

    def _whole(self, x: Tensor, bucket: Bucket, bias: Tensor | None) -> Tensor:
        """`Part.linear` of all adapters of the one part there is."""
        low, (down, up) = self.quick[0].low, self.turned[0]
        flat = x.reshape(-1, x.shape[-1])
        each = flat.view(bucket.number, -1, x.shape[-1])
        s = torch.bmm(low.down, each.mT).mT if each.shape[1] <= 4 else torch.bmm(each, down)  # type: ignore[union-attr]
        y = torch.bmm(s, up)
        y.view(-1, y.shape[-1]).addmm_(flat, self.wide, beta=low.scale)  # type: ignore[union-attr]
        if low.gain is not None:  # type: ignore[union-attr]
            y.mul_(low.gain[:, None])  # type: ignore[union-attr]
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y if bias is None else y.add_(bias)

    def _base(self, x: Tensor) -> Tensor:
        return F.linear(x, self.theirs)


def kept_mixed(v: Any, given: Sequence[Given]) -> KeptMixed | None:
    """What stands for v in the next calls of its stacks; None if it must be made each time."""
    return KeptMixed(v, _source(v, given)) if _alike(v, given) else None


def place(values: Mapping[str, KeptMixed], given: Sequence[Given], gates: Gates) -> None:
    """Tell kept values the rows of a batch."""
    index = index_of(gates)
    assert index is not None
    leading = gates.shape if isinstance(gates, PerToken) else (len(index.known or ()),)
    devices = dict.fromkeys(v.w.device for v in values.values())
    stands = {d: {g.start: _rows(index, g, d) for g in given} for d in devices}
    for v in values.values():
        v.rows, v.stands, v.leading = gates, stands[v.w.device], leading
        for part in v.quick:
            if part.made:
                part.renew()


def index_of(gates: Gates) -> Index | None:
    """The index of the rows, or of the tokens, if it is one and known on the host."""
    if type(gates) is PerToken and gates.steps is None:
        gates = gates.flat
    return gates if type(gates) is Index and gates.known is not None else None


def _rows(gates: Index, g: Given, device: torch.device) -> Rows:
    share = batch.share_of(gates, g.start, g.size, device)
    alone = share is not None and share.size == len(gates.known or ())
    bucket = (
        share.buckets[0] if share is not None and alone and share.rows is None and len(share.buckets) == 1 else None
    )
    every = bucket is not None and bucket.number == g.size and bucket.adapters == slice(0, g.size)
    return Rows(share, alone, bucket if every else None)


def _source(v: MixedWeight, given: Sequence[Given]) -> list[Any]:
    of, out = {g.start: g.adapter for g in given}, []
    for part in v.parts:
        leaf, bank = of[part.start][v.name], bank_of(part.entry, of[part.start])
        references = [{k: weakref.ref(t) for k, t in held.items()} for held in (leaf, bank)]
        out.append((part.entry, *references, part.start, part.size))
    return out


def _alike(v: Any, given: Sequence[Given]) -> bool:
    """Whether v is low-rank changes of one matrix, and nothing of them must be made."""
    if type(v) is not MixedWeight or v.w.dim() != 2 or v.entry.site.kind not in ("linear", "linear_t"):
        return False
    of = {g.start: g.adapter for g in given}
    for part in v.parts:
        low = part.low
        if low is None or not low.down.dim() == low.up.dim() == 3 or (low.gain is not None and low.gain.dim() != 2):
            return False
        if not unmade(low, part.entry, part.p, v.w, of[part.start]):
            return False
    return True
