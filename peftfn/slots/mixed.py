"""Mixed batches: every row of a batch uses its own adapter, or the base.

What stands in a parameter's slot is a `MixedWeight`: the adapters of the batch, in `Part`s of one method each, and
`Gates`, which say which of them act on which rows. It finds the rows in a layer's input; batch.py computes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from peftfn.core.method import Product, Weight
from peftfn.slots import batch, track
from peftfn.slots.byrow import ByRow, fitted
from peftfn.slots.experts import MixedStack, at_once, same
from peftfn.slots.gates import Gates
from peftfn.slots.part import Cut, Part, take
from peftfn.slots.pertoken import PerToken
from peftfn.slots.slot import plus
from peftfn.slots.unrowed import Unrowed, known, on_each, owned, plain
from peftfn.slots.weight import AdaptedWeight, Expert, picks_one
from peftfn.tensors.arguments import storages
from peftfn.tensors.precision import operand_dtype, wide
from peftfn.tensors.transform import moment

_COMMON = "If all rows have this input in common, name the site in common=[…]. "
_OF_STACKS = frozenset(["bmm", "matmul", "__matmul__", "grouped_mm", "_grouped_mm", "grouped_mm_fallback", "transpose"])


class MixedWeight(ByRow):
    """The adapted weight of a mixed batch: each row of every product uses the adapters that its route says."""

    __slots__ = ("parts",)

    @property
    def stack(self) -> bool:
        """Whether it is all experts of a stack."""
        return self.entry.site.stacked

    def __init__(self, parts: list[Part], w: Tensor, rows: Gates):
        self.parts, self.entry, self.w, self.rows = parts, parts[0].entry, w, rows
        self.task, self.inside = moment()

    def mapped(self, f: Callable[[Tensor], Tensor], made: dict[int, Any]) -> "MixedWeight":
        w = f(self.w) if isinstance(self.w, Tensor) else self.w
        return MixedWeight([part.mapped(f) for part in self.parts], w, self._gates(f, made))

    def value(self, k: int) -> Tensor:
        part = next((part for part in self.parts if part.has(k)), None)
        return self.w if part is None else part.one(k - part.start).dense()

    def chosen(self, k: int) -> Any:
        return next((part.one(k - part.start) for part in self.parts if part.has(k)), self.w)

    def own(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.stack and getattr(func, "__name__", "") in _OF_STACKS:
            return MixedStack(self).multiply(func, args, kwargs)
        return NotImplemented

    def product(self, x: Tensor, dot: Product) -> Tensor:
        table = not x.is_floating_point() and (x.dim() == 1 or (x.dim() == 2 and x.shape[0] == x.shape[1]))
        if (
            table
            and self.tracking() is None
            and self._must_tell(x)
            and not owned(x, self.rows)
            and not storages([x]) <= self.rows.inputs
        ):
            raise self.doubtful(f"its indices {list(x.shape)} are none of the call's inputs: positions, it seems")
        kind = "embedding" if self.entry.site.kind == "embedding" else "product"
        dtype = x.dtype if x.is_floating_point() else self.w.dtype
        base: Cut = lambda x: dot(x, self.matrix(dtype))  # noqa: E731
        return self._by_row(x, self.layer(kind, lambda weight, x: weight.product(x, dot), base))

    def linear(self, x: Tensor, bias: Any = None) -> Tensor:
        y = self._by_row(x, self.layer("linear", AdaptedWeight.linear))
        if bias is None:
            return y
        if (t := self.tracking()) is None:
            return plus(y, bias)
        with t.aside():  # whether or not somebody sees this sum: in the fast lane nobody is asked
            return t.put(plus(y, bias), t.get(y))  # type: ignore[no-any-return]

    def layer(self, kind: str, adapted: Callable[[Any, Tensor], Tensor], base: Cut | None = None) -> batch.Layer:
        if base is None:

            def base(x: Tensor) -> Tensor:
                return F.linear(x, self.matrix(operand_dtype(x)))

        return batch.Layer(self.name, kind, self.canonical(), self.parts, adapted, base)

    def expert(self, e: int) -> "MixedExpert":
        return MixedExpert(self, e)

    def attribute(self, name: str) -> Any:
        if name in ("T", "t", "mT", "transpose") and not self.stack and self.entry.site.kind in ("linear", "stack"):
            turned = Turned(self)
            return (lambda *dims: turned) if name in ("t", "transpose") else turned
        if self.stack and name in ("transpose", "mT", "to", "type", "contiguous", "float"):
            return MixedStack(self).attribute(name)
        return same(self, name) if name in ("to", "type", "float") else super().attribute(name)

    def item_at(self, index: Any) -> Any:
        if self.stack and (self.rows.size is None or self.tracking() is not None):
            if picks_one(index):
                return self.expert(int(index))
            if isinstance(index, Tensor) and index.dim() == 1 and index.dtype in (torch.long, torch.int):
                return MixedStack(self, index)
        return super().item_at(index)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The base's canonical weight; of a quantised one, its values in `dtype`."""
        m = self.canonical()
        return m.to(dtype) if self.entry.site.quantised else m

    def _must_tell(self, x: Tensor) -> bool:
        """Whether x may be taken for rows by its size alone, and nobody said what it is."""
        return x.dim() > 0 and x.shape[0] == self.rows.size != 1 and self.rows.common is None and not known(x)

    def _by_row(self, x: Tensor, layer: batch.Layer) -> Tensor:
        site, gates = self.entry.site, self.rows
        one = (
            1 if layer.kind == "linear" else len(site.shape) - 1 if site.kind == "conv" else 0
        )  # dimensions of one row
        t = self.tracking()
        if t is not None and gates.size is not None and (t.get(x) is not None or not self._in_common(x, one)):
            with t.aside():
                return self._moved(t, x, x.dim() - one, layer)
        if isinstance(gates, PerToken) and not self._in_common(x, one):
            return self._of_tokens(gates, x, x.dim() - one, layer)
        if gates.size is not None and not self.stack and x.dim() >= one and self._in_common(x, one):
            if torch.compiler.is_compiling():  # then what it gives has the rows at once
                x = x.expand(gates.size, *(x.shape[1:] if x.dim() > one + 1 and x.shape[0] == 1 else x.shape))
                return batch.product(gates, layer, x)
            return on_each(x, gates, self.name, lambda x: batch.product(gates, layer, x))
        x = plain(x)
        if self.stack or x.dim() <= one:
            raise self.lost(f"its input has shape {list(x.shape)}")
        found = gates.at(x.shape[0])
        if found is None:
            raise self.lost(f"its input has shape {list(x.shape)}", _COMMON if x.shape[0] == 1 else "")
        return batch.product(found, layer, x)

    def _moved(self, t: track.Tracking, x: Tensor, lead: int, layer: batch.Layer) -> Tensor:
        """Positions that a routed module has moved."""
        if self.stack or lead < 1:
            raise self.lost(f"its input has shape {list(x.shape)}")
        gates, tag = self.placed(t, x, self.tag(t, x), lead)
        y = batch.product(gates, layer, plain(x).reshape(-1, *x.shape[lead:]))
        y = y.view(*x.shape[:lead], *y.shape[1:])
        return t.put(y, None if tag is None else fitted(tag, lead, y.dim()))  # type: ignore[no-any-return]

    def _of_tokens(self, gates: PerToken, x: Tensor, lead: int, layer: batch.Layer) -> Tensor:
        """Each token has an adapter of its own."""
        found = gates.flattened(x) if lead > 1 else None
        if self.stack or found is None:
            raise self.lost(f"its input has shape {list(x.shape)}")
        y = batch.product(found, layer, plain(x).flatten(0, 1))
        return y.unflatten(0, x.shape[:2])

    def _in_common(self, x: Tensor, one: int) -> bool:
        """Whether all rows have the input x in common: it is said so, or x is made of the model's own tensors alone."""
        if self.rows.common is not None:
            return self.name in self.rows.common or (isinstance(x, Unrowed) and x.each is not None)
        if (t := self.tracking()) is not None and t.get(x) is None:
            return self.rows.tokens is None  # what has rows is known: this is the same for all
        return known(x) or self.rows.owned(x)

    def added_to(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        return MixedBias(self.name, self._values(), self.w, self.rows).added_to(y, x)

    def _values(self) -> Tensor:
        return torch.stack([self.value(k) for k in range(self.rows.count)])

    def bias(self, b: "Tensor | MixedWeight | None") -> "MixedBias | None":
        """What this weight's methods make of the layer's bias b, for each adapter; None where it stays as it is."""
        mixed = isinstance(b, MixedWeight)
        base = b.w if isinstance(b, MixedWeight) else b
        given = b._values() if isinstance(b, MixedWeight) else b
        new: dict[int, Tensor] = {}
        for part in self.parts:
            own = given[part.start : part.start + part.size] if mixed and given is not None else given

            def one(p: Any, b: Tensor | None, method: Weight = part.method) -> Tensor | None:
                return method.bias(p, None if b is None else wide(b))

            probe = None if base is None else wide(base)
            if part.method.bias(take(part.p, part.axes, lambda t: t[0]), probe) is not probe:
                new[part.start] = vmap(one, (part.axes, 0 if mixed else None))(part.p, own)  # type: ignore[assignment]
        if not new:
            return None
        shape = next(iter(new.values())).shape[1:]
        base = self.w.new_zeros(shape) if base is None else base
        pieces, k = [], 0
        plain = given if mixed and given is not None else base.expand(self.rows.count, *shape)
        for start, values in new.items():  # the parts come in the order of their adapters
            pieces += [plain[k:start], values.to(base.dtype)]
            k = start + len(values)
        values = torch.cat([*pieces, plain[k:]])
        return MixedBias(f"{self.name} (bias)", values, base, self.rows)


class MixedExpert(MixedWeight):
    """One expert's matrix of a mixed stack, `weight[e]`."""

    __slots__ = ("number", "of")
    stack = False  # type: ignore[assignment]
    canonical = Expert.canonical

    def __init__(self, of: MixedWeight, e: int):
        self.of, self.number, self.entry, self.w, self.rows = of, e, of.entry, of.w[e], of.rows
        self.task, self.inside = of.task, of.inside

    @property
    def parts(self) -> list[Part]:  # type: ignore[override]
        return [part.expert(self.number) for part in self.of.parts]

    def linear(self, x: Tensor, bias: Any = None) -> Tensor:
        t = self.tracking()
        if t is None or bias is not None or x.dim() != 2 or not isinstance(tag := t.get(x), Tensor):
            return super().linear(x, bias)
        gates, tag = self.placed(t, x, tag, 1)
        y = at_once(self, gates, x)
        return super().linear(x) if y is None else t.put(y, tag)


class Turned(ByRow):
    """weight.T of a linear layer, or of an expert: x @ weight.T is its own product."""

    __slots__ = ("of",)
    multiplies = False

    def __init__(self, of: MixedWeight):
        self.of, self.entry, self.w, self.rows = of, of.entry, of.w.mT, of.rows
        self.task, self.inside = of.task, of.inside

    def value(self, k: int) -> Tensor:
        return self.of.value(k).mT

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        name, out = getattr(func, "__name__", ""), kwargs.get("out")
        if name in ("matmul", "__matmul__", "mm") and isinstance(args[1], Turned) and out is None:
            return args[1].of.linear(args[0])
        return super().call(func, args, kwargs)

    def attribute(self, name: str) -> Any:
        if name in ("T", "t", "mT", "transpose"):
            return (lambda *dims: self.of) if name in ("t", "transpose") else self.of
        return super().attribute(name)


class MixedBias(ByRow):
    """The bias slot of a mixed batch: `values` [k, out], and the base's own `w` [out]."""

    __slots__ = ("label", "values")
    multiplies = False

    def __init__(self, label: str, values: Tensor, w: Tensor, rows: Gates):
        self.label, self.values, self.w, self.rows = label, values, w, rows
        self.task, self.inside = moment()

    @property
    def name(self) -> str:
        return self.label

    def mapped(self, f: Callable[[Tensor], Tensor], made: dict[int, Any]) -> "MixedBias":
        return MixedBias(self.label, f(self.values), f(self.w), self._gates(f, made))

    def value(self, k: int) -> Tensor:
        return self.w if k < 0 else self.values[k]

    def added_to(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """y + the bias of each row. x: the layer's input, which tells the rows where y does not say itself."""
        t = self.tracking()
        if t is not None and self.rows.size is not None and not isinstance(y, Unrowed):
            known = y if x is None or t.get(y) is not None else x
            gates, tag = self.placed(t, known, self.tag(t, known), y.dim() - 1)
            with t.aside():
                flat = batch.bias(gates, self.values, self.w, y.reshape(-1, y.shape[-1]))
            return t.put(flat.view(y.shape), tag)  # type: ignore[no-any-return]
        if isinstance(self.rows, PerToken) and not isinstance(y, Unrowed):
            flat_gates = self.rows.flattened(y)
            if flat_gates is None:
                raise self.lost(f"the layer's output has shape {list(y.shape)}")
            return batch.bias(flat_gates, self.values, self.w, y.flatten(0, 1)).unflatten(0, y.shape[:2])
        if isinstance(y, Unrowed):
            return on_each(y, self.rows, self.name, lambda y: batch.bias(self.rows, self.values, self.w, y))
        rows = self.rows.at(y.shape[0])
        if rows is None:
            raise self.lost(f"the layer's output has shape {list(y.shape)}")
        return batch.bias(rows, self.values, self.w, y)
