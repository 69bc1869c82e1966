"""Stacks of experts in a mixed batch: one expert's matrix, and products of many positions with all of them.

Experts see positions of many rows. Inside a routed module their tags say whose they are (track.py); a position then
uses its expert's part of its row's adapter.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from peftfn.core.method import LowRank
from peftfn.kernels import choose
from peftfn.slots import batch
from peftfn.slots.gates import Gates, Index
from peftfn.slots.part import Part
from peftfn.slots.slot import Slot
from peftfn.slots.weight import AdaptedWeight, Expert
from peftfn.tensors.arguments import hidden, mapped, visit
from peftfn.tensors.transform import eager, exactly


class Routed(NamedTuple):
    """Positions sorted by expert."""

    order: Tensor | None  # which position comes where; None: they are sorted
    pieces: list[tuple[int, int, Gates]]  # expert, how many positions it has, their gates
    beyond: int  # positions of no expert


class MixedStack(Slot):
    """A mixed stack on its way to a product with all experts: `weight[ids]` for bmm, `weight.transpose(-2, -1)`.

    of: the stack's `MixedWeight`. ids: the expert of each matrix; None: the stack as it is. turned: its last two
    dimensions change places. Its values are never read.
    """

    __slots__ = ("ids", "inside", "of", "turned")
    multiplies = False

    def __init__(self, of: Any, ids: Tensor | None = None, turned: bool = False):
        self.of, self.ids, self.turned, self.entry = of, ids, turned, of.entry
        self.task, self.inside = of.task, of.inside
        w = of.w if ids is None else of.w[:1].expand(len(ids), *of.w.shape[1:])
        self.w = w.mT if turned else w

    def attribute(self, name: str) -> Any:
        if name == "transpose":
            return self._transpose
        if name == "mT":
            return MixedStack(self.of, self.ids, not self.turned)
        if name == "contiguous":
            return lambda: self
        if name in ("to", "type", "float"):
            return same(self, name)
        raise self.of.lost(f"the model uses weight.{name} of all experts")

    def _transpose(self, a: int, b: int) -> "MixedStack":
        if {a % 3, b % 3} != {1, 2}:
            raise self.of.lost("the model transposes the experts")
        return MixedStack(self.of, self.ids, not self.turned)

    def item_at(self, index: Any) -> Any:
        raise self.of.lost("the model indexes the weight")

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        found: list[MixedStack] = []
        visit((args, kwargs), lambda v: found.append(v) if isinstance(v, MixedStack) else None)
        return found[0].multiply(func, args, kwargs)

    def multiply(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of torch with this stack among its arguments: a product of positions with their experts."""
        name = getattr(func, "__name__", str(func))
        if name == "transpose":
            return self._transpose(*args[1:], **kwargs)
        if name in ("to", "type", "float", "contiguous"):
            return self.attribute(name)(*args[1:], **kwargs)
        if kwargs.get("out") is not None:
            raise self.of.lost(f"{name} writes to out=")
        x = next((v for v in args if isinstance(v, Tensor)), None)
        inward = self.turned != (self.entry.site.kind == "stack_t")  # the matrices are [in, out]
        t = self.of.tracking()
        if x is not None and name in ("bmm", "matmul", "__matmul__") and len(args) == 2 and x.dim() == 3:
            left = isinstance(args[0], Tensor)
            ids = torch.arange(x.shape[0], device=x.device) if self.ids is None else self.ids
            tag = self.of.tag(t, x)
            if not left:  # matrices times [n, in, positions]
                x, tag = x.mT, None if tag is None else tag.mT
            y, tag = self._experts(t, x, tag, ids[:, None].expand(x.shape[:2]), left == inward)
            return _tagged(t, y if left else y.mT, tag if left or tag is None else tag.mT)
        offs = kwargs.get("offs", args[2] if len(args) > 2 else None)
        grouped = "grouped_mm" in name and isinstance(offs, Tensor) and self.ids is None
        if x is not None and grouped and x.dim() == 2 and isinstance(args[0], Tensor):
            if (fast := self._grouped(t, x, func, args, kwargs)) is not None:
                return fast
            positions = torch.arange(x.shape[0], device=x.device)
            ids = (positions[:, None] >= offs.long()).sum(1)  # beyond the last one: of no expert
            with exactly(x):  # autocast does not know this function
                return _tagged(t, *self._experts(t, x, self.of.tag(t, x), ids, inward))
        if t is None or self.of.rows.size is None:
            raise self.of.lost(f"{name} of all experts")

        def swap(v: Any) -> Any:
            return v.as_table() if isinstance(v, MixedStack) or v is self.of else v

        return func(*mapped(args, swap), **mapped(kwargs, swap))

    def as_table(self) -> Tensor:
        """What stands here, for any other function: another stack for each row."""
        table = self.of.as_table() if self.ids is None else self.of.as_table()[self.ids]
        return table.mT if self.turned else table

    def _grouped(self, t: Any, x: Tensor, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """A grouped product: the model's function of the base's stack, and of all adapters' factors side by side.

        Nobody looks at which expert or adapter a position has. None where that is no way to compute it: torch's
        function has no forward-mode and no second derivatives, and wants vectors of whole 16 bytes."""
        inward = self.turned != (self.entry.site.kind == "stack_t")
        if not inward or any(v is not None for k, v in kwargs.items() if k != "offs"):
            return None
        gates, tag = self.of.placed(t, x, self.of.tag(t, x), 1)
        lows = _side_by_side(self.of, gates, x)
        if lows is None or not isinstance(gates, Index) or any(low.up.stride(1) * x.itemsize % 16 for low in lows):
            return None

        def product(x: Tensor, m: Tensor) -> Tensor:
            y: Tensor = func(x, m, *args[2:], **kwargs)
            return y

        y = product(x, self.w)
        for part, low in zip(self.of.parts, lows, strict=True):
            s = product(x, low.down.mT) * batch.own_factors(gates, part, low.up.shape[2], y)
            y.add_(product(s, low.up.mT), alpha=low.scale)
        return _tagged(t, y, tag)

    def _experts(
        self, t: Any, x: Tensor, tag: Tensor | None, ids: Tensor, forward: bool
    ) -> tuple[Tensor, Tensor | None]:
        """([…, in] → […, out], each position with its own expert, and zeros where it has none; their tag)."""
        flat, ids = x.reshape(-1, x.shape[-1]), ids.reshape(-1)
        gates, tag = self.of.placed(t, x, tag, x.dim() - 1)
        if hidden(ids) or (isinstance(gates, Index) and gates.known is None):
            return self._gathered(flat, ids, gates).view(*x.shape[:-1], -1), tag
        known = ids.tolist()
        key, made = ("experts", id(gates), tuple(known)), {} if t is None else t.made
        if key not in made:
            made[key] = self._routed(ids, known, gates), gates
        routed = made[key][0]
        if routed.order is None:
            y = self._by_expert(flat, routed, forward)
        else:
            y = self._by_expert(flat[routed.order], routed, forward)[routed.order.argsort()]
        return y.view(*x.shape[:-1], -1), tag

    def _routed(self, ids: Tensor, known: list[int], gates: Gates) -> Routed:
        order = torch.argsort(ids, stable=True)
        pieces, start, counts = [], 0, Counter(known)
        for e, n in sorted(counts.items()):
            if e < len(self.of.w):
                own = order[start : start + n]
                pieces.append((e, n, gates if gates.size is None else gates.of_positions(own, None)))
            start += n
        beyond = len(known) - sum(n for _, n, _ in pieces)
        return Routed(None if known == sorted(known) else order, pieces, beyond)

    def _by_expert(self, x: Tensor, routed: Routed, forward: bool) -> Tensor:
        parts = x.split([n for _, n, _ in routed.pieces] + [routed.beyond])
        out = [self._one(e, part, gates, forward) for (e, _, gates), part in zip(routed.pieces, parts, strict=False)]
        if routed.beyond or not out:
            width = out[0].shape[-1] if out else sum(self.entry.site.matrix_shape()) - x.shape[-1]
            out.append(x.new_zeros(routed.beyond, width))
        return torch.cat(out)

    def _one(self, e: int, x: Tensor, gates: Gates, forward: bool) -> Tensor:
        expert = self.of.expert(e)
        if forward and (y := at_once(expert, gates, x)) is not None:
            return y
        if forward:
            return batch.product(gates, expert.layer("linear", AdaptedWeight.linear), x)

        def run(k: int, cut: Callable[[Tensor], Tensor]) -> Tensor:  # the matrix the other way round: no fast form
            v = expert.value(k)
            return cut(x) @ (v.mT if self.entry.site.kind == "stack_t" else v)

        return batch.each(gates, run)

    def _gathered(self, x: Tensor, ids: Tensor, gates: Gates) -> Tensor:
        """Where nobody can look at which expert a position has: each with a copy of its matrix and its leaf."""
        if not isinstance(gates, Index):
            raise self.of.lost("gates that are no index, and experts that nobody can look at (a vmap is over them)")
        w = self.of.w[ids]
        y = torch.bmm(x[:, None], self.entry.site.canonical(w).mT)[:, 0]
        for part in self.of.parts:
            local, mine = batch.own_adapters(gates, part, y)
            p, axes = _gathered(part, local, ids)

            def one(p: Any, w: Tensor, x: Tensor, part: Part = part) -> Tensor:
                return Expert(part.entry, part.method, p, w).linear(x[None])[0]

            new: Tensor = vmap(one, (axes, 0, 0), randomness="different")(p, w, x)
            y = torch.where(mine, new.to(y.dtype), y)
        return y


def at_once(expert: Any, gates: Gates, x: Tensor) -> Tensor | None:
    """One expert's product with positions x [n, in]: all adapters' D are one product, of which each position keeps its
    own part, and all U are one. None where that is no way to compute it, or a kernel does it."""
    lows = None if choose.fits(x) else _side_by_side(expert.of, gates, x)
    if lows is None or not isinstance(gates, Index):
        return None
    y = F.linear(x, expert.canonical())
    for part, low in zip(expert.of.parts, lows, strict=True):
        up = low.up[expert.number].mT
        s = F.linear(x, low.down[expert.number]).mul_(batch.own_factors(gates, part, len(up), y))
        y.addmm_(s, up, alpha=low.scale)
    return y


def _side_by_side(stack: Any, gates: Gates, x: Tensor) -> list[LowRank] | None:
    """The factors of each part of a mixed stack; None where they are not to be used so: a gradient is asked for, or a
    transform or the compiler looks on."""
    if torch.is_grad_enabled() or not eager(x) or not isinstance(gates, Index) or hidden(gates.index):
        return None
    if not isinstance(stack.w, Tensor) or stack.w.dtype != x.dtype:
        return None
    lows = [low for part in stack.parts if (low := part.side_by_side(x.dtype)) is not None]
    return lows if len(lows) == len(stack.parts) else None


def _gathered(part: Part, local: Tensor, ids: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the tensors of each position's adapter and expert, which of them differ)."""
    over, p, axes = part.entry.axes(part.p), {}, {}
    for k, t in part.p.items():
        varies, of_expert = part.axes[k] is not None, over[k] is not None
        p[k] = t[local, ids] if varies and of_expert else t[local] if varies else t[ids] if of_expert else t
        axes[k] = 0 if varies or of_expert else None
    return p, axes


def _tagged(t: Any, y: Tensor, tag: Tensor | None) -> Tensor:
    if t is not None and tag is not None:
        t.put(y, tag if tag.dim() == y.dim() else tag[..., None])
    return y


def same(operand: Any, name: str) -> Callable[..., Any]:
    """A cast of an operand to what it is already; others are refused."""

    def cast(*args: Any, **kwargs: Any) -> Any:
        wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
        dtype = torch.float32 if name == "float" else wanted[0] if wanted else operand.dtype
        if dtype != operand.dtype:
            raise getattr(operand, "of", operand).lost(f"the model casts the weight from {operand.dtype} to {dtype}")
        return operand

    return cast
