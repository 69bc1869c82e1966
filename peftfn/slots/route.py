"""Which adapters each row of a batch uses, and the order in which that is computed."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from peftfn.kernels import choose
from peftfn.kernels.mixed_lora import mixed_rows
from peftfn.model.names import matches, near
from peftfn.tensors.sharded import is_sharded

if TYPE_CHECKING:
    from peftfn.slots.mixed import MixedWeight
    from peftfn.slots.part import Part

Cut = Callable[[Tensor], Tensor]
"""x [rows, …] ↦ [some rows, …]"""
Run = Callable[[int, Cut], Tensor]
"""(adapter, −1 the base; cut) ↦ the output of the rows that cut takes"""


@dataclass(frozen=True, eq=False)
class Route:
    """Which adapters each row of a batch uses. Adapters are numbered through all parts of a site."""

    count: int  # adapters
    inputs: frozenset[int] = field(default=frozenset(), kw_only=True)  # storages of the call's own indices
    fixed: frozenset[int] = field(default=frozenset(), kw_only=True)  # the model's tensors, which have no rows
    copies: int = field(default=1, kw_only=True)  # how often `generate` repeats each row: beams, sampled sequences
    common: frozenset[str] | None = field(default=None, kw_only=True)  # sites whose input has no rows; None: not told

    def told(self, common: Sequence[str] | None, sites: Iterable[str]) -> Self:
        """This route with the sites that `common`'s patterns find. ValueError for a pattern that finds none."""
        if common is None:
            return self
        names = list(sites)
        patterns = [common] if isinstance(common, str) else common
        for pattern in patterns:
            if not any(matches(pattern, n) for n in names):
                raise ValueError(f"common: {pattern!r} matches none of the {len(names)} sites{near(pattern, names)}")
        return replace(self, common=frozenset(n for n in names if any(matches(p, n) for p in patterns)))

    def owned(self, t: Tensor) -> bool:
        """Whether t is the model's own: a parameter or a buffer, or a view of one, which has no rows."""
        if not self.fixed:  # also while compiling, where an id would become a guard on this very tensor
            return False
        return id(t) in self.fixed or (t._base is not None and id(t._base) in self.fixed)

    @classmethod
    def of(cls, gates: Any, count: int, inputs: Any = (), copies: int = 1, stepwise: bool = False) -> "Route":
        """The route of what a caller gives. ValueError where it fits neither the adapters nor the inputs."""
        raise NotImplementedError

    @property
    def only(self) -> int | None:
        """The adapter that all rows use, with weight 1; None if there are several, or the base, or nobody knows."""
        return None

    @property
    def size(self) -> int | None:
        """Rows of the batch; None where all rows are alike."""
        raise NotImplementedError

    def at(self, rows: int) -> "Route | None":
        """The route of a tensor with so many rows; None if it is none of the batch's."""
        if self.size is None or rows == self.size:
            return self
        return self.repeated if self.copies > 1 and rows == self.copies * self.size else None

    @cached_property
    def repeated(self) -> "Route":
        """The route of a batch in which each row stands `copies` times, next to itself."""
        raise NotImplementedError

    def uses(self, start: int, size: int) -> bool:
        """Whether any row may use one of these adapters."""
        return True

    def each(self, run: Run) -> Tensor:
        """The output of any function, from its outputs with single adapters."""
        raise NotImplementedError

    def product(self, weight: "MixedWeight", x: Tensor, kind: str, adapted: Any, base: Cut) -> Tensor:
        """The output of a linear layer, an embedding or a convolution: x [rows, …] → [rows, …, out]."""
        raise NotImplementedError

    def bias(self, values: Tensor, base: Tensor, y: Tensor) -> Tensor:
        """What a bias adds to y: of adapter k values[k] [out], of the base `base` [out]."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Bucket:
    """Rows whose adapters occur equally often, sorted by adapter: one batched product."""

    adapters: slice | Tensor  # of the part
    number: int
    each: int  # rows of each

    @property
    def rows(self) -> int:
        return self.number * self.each


@dataclass(frozen=True)
class Share:
    """The rows of a batch that use the adapters of one part, in the order of their buckets."""

    rows: Tensor | None  # positions in the batch; None: all of them as they stand
    size: int
    buckets: list[Bucket]
    by_row: Bucket | None  # all rows of the batch as they stand, each with a copy of its adapter's factors

    def as_it_stands(self, tokens: int, rank: int) -> Bucket | None:
        """One bucket of all rows, if there is one or copying the factors costs less than moving the rows (measured on
        a CPU: from twice as many tokens a row as the rank)."""
        if self.rows is None and len(self.buckets) == 1:
            return self.buckets[0]
        return self.by_row if tokens >= 2 * rank else None

    def take(self, x: Tensor) -> Tensor:
        return x if self.rows is None else picked(x, self.rows)


@dataclass(frozen=True, eq=False)
class Rows(Route):
    """Row i uses adapter index[i]; −1 is the base."""

    index: Tensor  # [rows]
    known: list[int] | None  # the index on the host; None while compiling
    _shares: dict[bool, dict[Any, Any]] = field(default_factory=dict, kw_only=True)  # inference mode → what it made

    @classmethod
    def of(cls, index: Any, count: int, inputs: Any = (), copies: int = 1, stepwise: bool = False) -> "Rows":
        """Raise ValueError for an index that names no adapter, or has not one entry for each row of the inputs."""
        t = index if isinstance(index, Tensor) else torch.tensor(index)
        t = t if isinstance(index, Tensor) or t.numel() else t.long()  # [] makes a tensor of floats
        if t.dim() != 1 or t.is_floating_point() or t.dtype == torch.bool:
            raise ValueError(
                f"mixed: index is a {t.dtype} tensor of shape {list(t.shape)}; give one integer a row, [rows]"
            )
        t = t.long()  # uint8 would select as a mask does
        if torch.compiler.is_compiling() or batched(t):
            # nobody can look at it now; taking from a table raises for an adapter there is none of
            table = torch.arange(-1, count, device=t.device)
            return cls(count, table[torch.where(t < -1, count, t) + 1], None, copies=copies)
        known = t.tolist()
        for row, k in enumerate(known):
            if not -1 <= k < count:
                raise ValueError(f"mixed: row {row} asks for adapter {k}; the stack has {count} (−1 is the base)")
        given = tensors(inputs)
        check_rows("mixed", f"index has {len(known)} entries", len(known), given)
        return cls(count, t, known, inputs=storages(given), copies=copies)

    @property
    def size(self) -> int:
        return self.index.shape[0]

    @property
    def only(self) -> int | None:
        """The adapter that all rows use; None if there are several, or the base among them, or nobody knows."""
        known = self.known
        return known[0] if known and known[0] >= 0 and known.count(known[0]) == len(known) else None

    @cached_property
    def repeated(self) -> "Rows":
        known = None if self.known is None else [k for k in self.known for _ in range(self.copies)]
        index = self.index.repeat_interleave(self.copies)
        return replace(self, index=index, known=known, copies=1, _shares={})

    def uses(self, start: int, size: int) -> bool:
        return self.known is None or any(start <= k < start + size for k in self.known)

    @property
    def _kept(self) -> dict[Any, Any]:
        """What is made once for all sites. Indices that are made in inference mode can be in no graph later."""
        return self._shares.setdefault(torch.is_inference_mode_enabled(), {})

    def share(self, part: "Part", device: torch.device) -> Share | None:
        """The rows of a part's adapters; None if there are none. Made once for all sites."""
        key, kept = (part.start, part.size, device), self._kept
        if key not in kept:
            kept[key] = self._share(*key)
        return kept[key]

    def _share(self, start: int, size: int, device: torch.device) -> Share | None:
        rows_of = defaultdict(list)
        for row, k in enumerate(self.known or ()):
            if start <= k < start + size:
                rows_of[k - start].append(row)
        by_count = defaultdict(list)
        for k in sorted(rows_of):
            by_count[len(rows_of[k])].append(k)
        order = [row for ks in by_count.values() for k in ks for row in rows_of[k]]
        if not order:
            return None
        buckets = []
        for each, ks in by_count.items():
            run = ks[-1] - ks[0] + 1 == len(ks)
            chosen = slice(ks[0], ks[-1] + 1) if run else torch.tensor(ks, device=device)
            buckets.append(Bucket(chosen, len(ks), each))
        rows = None if order == list(range(self.size)) else torch.tensor(order, device=device)
        by_row = None
        if len(order) == self.size:
            local = [k - start for k in self.known or ()]
            by_row = Bucket(torch.tensor(local, device=device), self.size, 1)
        return Share(rows, len(order), buckets, by_row)

    def each(self, run: Run) -> Tensor:
        if self.known is None:
            every = torch.stack([run(k, lambda x: x) for k in range(-1, self.count)])
            return every[self.index.to(every.device) + 1, torch.arange(self.size, device=every.device)]
        if not self.known:
            return run(-1, lambda x: x)
        order = sorted(range(len(self.known)), key=self.known.__getitem__)
        parts, start = [], 0
        while start < len(order):
            k, stop = self.known[order[start]], start
            while stop < len(order) and self.known[order[stop]] == k:
                stop += 1
            mine = torch.tensor(order[start:stop])
            parts.append(run(k, lambda x, mine=mine: picked(x, mine.to(x.device))))  # type: ignore[misc]
            start = stop
        back = torch.tensor(order).argsort()
        out = torch.cat(parts)
        return picked(out, back.to(out.device))

    def product(self, weight: "MixedWeight", x: Tensor, kind: str, adapted: Any, base: Cut) -> Tensor:
        if self.known is None:
            return self._masked(weight, x, kind, adapted, base)
        y, parts = self._fused(weight, x, kind)
        shares = [(part, share) for part in parts if (share := self.share(part, x.device)) is not None]
        if y is None and len(shares) == 1 and shares[0][1].size == self.size:
            part, share = shares[0]
            if not part.is_low_rank(kind):
                y = part.run(share, x, kind, adapted)
                return y if share.rows is None else picked(y, share.rows.argsort())
            if kind == "linear":
                tokens = x.numel() // max(1, self.size * x.shape[-1])
                bucket = share.as_it_stands(tokens, part.low.down.shape[-2])  # type: ignore[union-attr]
                if bucket is not None:
                    return part.linear(bucket, x, weight, base)
        y = base(x) if y is None else y
        for part, share in shares:
            if part.is_low_rank(kind):
                y = part.add_low_rank(y, share, x, kind)
            else:
                new = part.run(share, x, kind, adapted)
                y = new if share.rows is None else y.index_copy(0, share.rows, new.to(y.dtype))
        return y

    def _fused(self, weight: "MixedWeight", x: Tensor, kind: str) -> "tuple[Tensor | None, list[Part]]":
        """(what kernels give: the base's product with the changes of some parts; None for nothing, the other parts)."""
        if not (x.is_cuda or choose.INTERPRETED):
            return None, weight.parts
        fast = [part for part in weight.parts if part.low is not None and self._short(part, x, kind)]
        if not fast:
            return None, weight.parts
        y = mixed_rows(x, weight.canonical(), [(p.low, p.start) for p in fast], self.index, kind, self._kept)
        return y, weight.parts if y is None else [part for part in weight.parts if part not in fast]

    def _short(self, part: "Part", x: Tensor, kind: str) -> bool:
        """Whether the part has rows, and not so many for each of its adapters that these should be taken one by one."""
        key, kept = ("rows each", part.start, part.size), self._kept
        if key not in kept:
            mine = [k for k in self.known or () if part.start <= k < part.start + part.size]
            kept[key] = len(mine) / max(1, len(set(mine)))
        rows: float = kept[key]
        if not rows or kind != "linear":
            return rows > 0
        out, r = part.low.up.shape[-2:]  # type: ignore[union-attr]
        tokens = x.numel() // max(1, x.shape[0] * x.shape[-1])
        return not choose.by_segment(x, rows * tokens, out, x.shape[-1], r)

    def _masked(self, weight: "MixedWeight", x: Tensor, kind: str, adapted: Any, base: Cut) -> Tensor:
        """Without knowing the index: each row with its own copy of its leaf, or every adapter on all rows."""
        y, every = base(x), torch.arange(self.size, device=x.device)
        for part in weight.parts:
            local = self.index.to(x.device) - part.start
            mine = ((local >= 0) & (local < part.size)).view(-1, *[1] * (y.dim() - 1))
            local = local.clamp(0, part.size - 1)
            if part.is_low_rank(kind) or part.vmaps(kind):
                new = part.vmapped(local, x, adapted)
            else:
                new = torch.stack([adapted(part.one(k), x) for k in range(part.size)])[local, every]
            y = torch.where(mine, new.to(y.dtype), y)
        return y

    def bias(self, values: Tensor, base: Tensor, y: Tensor) -> Tensor:
        index = self.index.to(values.device)
        rows = values[index.clamp(min=0)]
        if self.known is None or -1 in self.known:
            rows = torch.where((index < 0)[:, None], base, rows)
        return y + rows.to(y.dtype).view(self.size, *[1] * (y.dim() - 2), y.shape[-1])


def picked(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of x that `rows` names."""
    return x[rows] if is_sharded(x) else x.index_select(0, rows)  # whose gradient torch gives a wrong size there


def check_rows(what: str, have: str, rows: int, given: list[Tensor]) -> None:
    """Raise unless one of the call's tensors has so many rows (or columns, for models with the batch second)."""
    if given and not any(rows in t.shape[:2] for t in given):
        shapes = ", ".join(str(list(t.shape)) for t in given[:4])
        raise ValueError(f"{what}: {have}, and none of the inputs has as many rows: {shapes}. Give one entry a row.")


def storages(given: list[Tensor]) -> frozenset[int]:
    """Where the tensors of indices have their values."""
    found = []
    for t in given:
        if not t.is_floating_point():
            while torch._C._functorch.is_functorch_wrapped_tensor(t):
                t = torch._C._functorch.get_unwrapped(t)
            found.append(t.untyped_storage().data_ptr())
    return frozenset(found)


def batched(t: Tensor) -> bool:
    """Whether a `vmap` is over t, so that nobody can look at its values."""
    while torch._C._functorch.is_functorch_wrapped_tensor(t):
        if torch._C._functorch.is_batchedtensor(t):
            return True
        t = torch._C._functorch.get_unwrapped(t)
    return False


def tensors(tree: Any) -> list[Tensor]:
    """The tensors, of at least one dimension, in nested arguments."""
    found: list[Tensor] = []
    visit(tree, lambda v: found.append(v) if isinstance(v, Tensor) and v.dim() else None)
    return found


def visit(tree: Any, see: Callable[[Any], Any]) -> None:
    mapped(tree, lambda v: (see(v), v)[1])


def mapped(tree: Any, f: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {k: mapped(v, f) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(mapped(v, f) for v in tree)
    return f(tree)
