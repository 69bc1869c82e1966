"""Mixed batches: every row of a batch uses its own adapter, or the base.

What stands in a parameter's slot is a `MixedWeight`: the adapters of the batch, in `Part`s of one method each, and
`Gates`, which say which of them act on which rows. It finds the rows in a layer's input; batch.py computes.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from peftfn.core.method import Product, Weight
from peftfn.slots import batch, track
from peftfn.slots.attention import attend
from peftfn.slots.experts import MixedStack, same
from peftfn.slots.gates import Gates
from peftfn.slots.part import Cut, Part, take
from peftfn.slots.pertoken import PerToken
from peftfn.slots.recurrent import RECURRENT, recur
from peftfn.slots.slot import Slot, plus
from peftfn.slots.tags import Lost, RowsLost, constant
from peftfn.slots.unrowed import Unrowed, known, on_each, owned, plain
from peftfn.slots.weight import AdaptedWeight, Expert, picks_one
from peftfn.tensors.arguments import mapped, storages, tensors, visit
from peftfn.tensors.precision import operand_dtype, wide
from peftfn.tensors.transform import moment


class _Mixed(Slot):
    """A slot whose value depends on the row. `value(k)` is adapter k's, value(-1) the base's."""

    __slots__ = ("inside", "rows")
    rows: Gates

    @staticmethod
    def gates_of(held: Any) -> Gates:
        gates: Gates = held.rows
        return gates

    @property
    def by_itself(self) -> bool:  # type: ignore[override]
        return self.rows.sealed

    def _gates(self, f: Callable[[Tensor], Tensor], made: dict[int, Any]) -> Gates:
        """The gates with f of their tensor: one object for all slots, since it keeps what they share."""
        if id(self.rows) not in made:
            made[id(self.rows)] = self.rows.mapped(f)
        return made[id(self.rows)]  # type: ignore[no-any-return]

    def value(self, k: int) -> Any:
        raise NotImplementedError

    def chosen(self, k: int) -> Any:
        """What stands here where all rows use adapter k."""
        return self.value(k)

    def lost(self, what: str, more: str = "") -> RowsLost:
        wanted = (
            "its rows and tokens in the first two dimensions" if self.rows.tokens else "its rows in the first dimension"
        )
        inside = self.tracking() is not None
        need = "must know whose each position is" if inside else f"needs {wanted}"
        cure = "" if inside else 'If modules move them, name these, or "", the whole model, in adapt(…, routed=[…]). '
        text = f"{self.name}: {what}, and a mixed batch of {self.rows.size} rows {need}. {more}"
        return RowsLost(
            f"{text}{cure}Call net.apply for one adapter at a time, or leave this site out of the rules.", text.strip()
        )

    # Inside a routed module only tags count, never sizes.

    def tracking(self) -> track.Tracking | None:
        """What follows the rows of this call here, if anything does."""
        if self.rows.call is None:
            return None
        t = track.current()
        return t if t is not None and t.call is self.rows.call else None

    def tag(self, t: track.Tracking | None, x: Tensor) -> Tensor | None:
        """x's tag; None where all rows are alike. ValueError if it has none."""
        if self.rows.size is None:
            return None
        tag = None if t is None else t.get(x)
        if tag is None or isinstance(tag, Lost):
            why = "" if tag is None else f": {tag.why}"
            raise self.lost(f"the rows of its input {list(x.shape)} are not known{why}")
        return tag

    def placed(self, t: track.Tracking | None, x: Tensor, tag: Tensor | None, lead: int) -> tuple[Gates, Tensor | None]:
        """(gates of x's positions, their tag): x's first `lead` dimensions are positions, the others one vector."""
        if tag is None or t is None:
            return self.rows, None
        key = id(tag), x.shape[:lead], id(self.rows)
        if key not in t.made:
            one = constant(tag, range(lead, x.dim()))
            if one is None:
                raise self.lost(f"the vectors of its input {list(x.shape)} belong to several rows")
            owner = one.expand(*x.shape[:lead], *one.shape[lead:]).flatten()
            t.made[key] = tag, self.rows, self.rows.of_positions(owner, t.call.gates.tokens), one
        return t.made[key][2:]  # type: ignore[no-any-return]

    def doubtful(self, what: str) -> ValueError:
        return ValueError(
            f"{self.name}: {what}, so its {self.rows.size} entries are not the batch's {self.rows.size} rows. Name "
            "the site in common=[…] if all rows have this input in common; give common=[] if it has them."
        )

    def rowed(self, x: Tensor) -> Tensor:
        if self.rows.size is None or self.tracking() is not None:
            return x
        if x.dim() != 2 or not self.rows.size or x.shape[0] % self.rows.size:
            raise self.lost(f"its input has shape {list(x.shape)}")
        return x.view(self.rows.size, -1, x.shape[-1])

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        found: list[_Mixed] = []
        visit((args, kwargs), lambda v: found.append(v) if isinstance(v, _Mixed) else None)
        rows, first = found[0].rows, found[0]
        if isinstance(first, MixedWeight) and first.stack and getattr(func, "__name__", "") in _OF_STACKS:
            return MixedStack(first).multiply(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            return attend(first, args, kwargs)
        if func in RECURRENT:
            return recur(first, func, args, kwargs)
        if isinstance(rows, PerToken) or first.tracking() is not None:
            return first.by_position(func, args, kwargs)
        sizes = {v.shape[0] for v in tensors((args, kwargs)) if not owned(v, rows) and rows.at(v.shape[0])}
        bags = func is F.embedding_bag and args[0].dim() == 1  # all rows' indices in one line, cut up by offsets
        if (not sizes or bags) and rows.size is not None:
            raise found[0].lost(f"{getattr(func, '__name__', func)} does not have them there")
        if any(isinstance(v, Unrowed) and v.each is not None for v in tensors((args, kwargs))):
            raise found[0].lost(f"{getattr(func, '__name__', func)} has an input that is another table for each row")
        n = max(sizes, default=0)
        together = func is F.batch_norm and _training(*args, **kwargs)

        def run(k: int, cut: Cut) -> Tensor:
            def swap(v: Any) -> Any:
                if isinstance(v, _Mixed):
                    return v.value(k)
                has_rows = isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == n and not owned(v, rows)
                return cut(v) if has_rows and not together else v

            out: Tensor = func(*mapped(args, swap), **mapped(kwargs, swap))
            return cut(out) if together else out

        return batch.each(rows.at(n) or rows, run)

    def by_position(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function of one tensor of positions [positions …, the weight's dimensions …], such as a norm."""
        t, name = self.tracking(), getattr(func, "__name__", str(func))
        rows: Any = self.rows
        has = (lambda v: rows.flattened(v) is not None) if t is None else (lambda v: t.get(v) is not None)
        given = [v for v in tensors((args, kwargs)) if has(v)]
        if t is not None and (not given or (name in _PRODUCTS and given[0] is not args[0])):
            return _of_tables(func, args, kwargs)
        if len(given) != 1 or func is F.embedding_bag:
            raise self.lost(f"{name} has {len(given)} inputs whose rows are known")
        x = given[0]
        of_images = name.startswith(("conv", "batch_norm", "group_norm", "instance_norm"))
        features = 0 if not x.is_floating_point() else 1 if name in _PRODUCTS else max(1, self.w.dim())
        lead = 1 if of_images else max(1, x.dim() - features)
        if t is None and lead < 2:
            raise self.lost(f"{name} has an input of shape {list(x.shape)}")
        gates, tag = (rows.flattened(x), None) if t is None else self.placed(t, x, self.tag(t, x), lead)
        together = func is F.batch_norm and _training(*args, **kwargs)

        def run(k: int, cut: Cut) -> Tensor:
            def swap(v: Any) -> Any:
                if isinstance(v, _Mixed):
                    return v.value(k)
                return cut(v.reshape(-1, *v.shape[lead:])) if v is x and not together else v

            out: Tensor = func(*mapped(args, swap), **mapped(kwargs, swap))
            return cut(out) if together else out

        with nullcontext() if t is None else t.aside():
            y = batch.each(gates, run)
            y = y.view(*x.shape[:lead], *y.shape[1:])
        return y if t is None else t.put(y, tag if tag is None else _fitted(tag, lead, y.dim()))

    def attribute(self, name: str) -> Any:
        if not hasattr(self.w, name):
            raise AttributeError(f"{self.name} has no {name}")
        if name in ("mul_", "div_"):
            return self._times
        if self.tracking() is None or name.endswith("_") or name == "data":
            raise self.lost(f"the model uses weight.{name}")
        return getattr(self.as_table(), name)

    def item_at(self, index: Any) -> Any:
        if self.tracking() is None:
            raise self.lost("the model indexes the weight")
        return self.as_table()[index]

    def _times(self, factor: Any) -> "_Mixed":
        """The model scales its weight in place: by 1 it stays what it is."""
        if isinstance(factor, Tensor) or factor != 1:
            raise self.lost(f"the model scales the weight in place, by {factor}")
        return self

    def as_table(self) -> Tensor:
        """What stands here, for functions of the weight alone: another tensor for each row."""
        rows, n = self.rows, self.rows.size
        if n is None or rows.tokens is not None:
            raise self.lost("the model computes with the weight itself")

        def run(k: int, cut: Cut) -> Tensor:
            w = self.value(k)
            return cut(w.expand(n, *w.shape))

        each = batch.each(rows, run)
        return Unrowed.of(each[0], rows, each, self.name)


def _of_tables(func: Any, args: Any, kwargs: Any) -> Any:
    """A function of weights and of what has no rows, or none of positions: each row's weight is a table of its own."""
    made: dict[int, Tensor] = {}

    def swap(v: Any) -> Any:
        if isinstance(v, _Mixed) and id(v) not in made:
            made[id(v)] = v.as_table()
        return made.get(id(v), v)

    return func(*mapped(args, swap), **mapped(kwargs, swap))


def _training(
    input: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, *_: Any, **__: Any
) -> bool:
    """Whether F.batch_norm normalises by the statistics of the batch, which are of all rows together."""
    return training


_COMMON = "If all rows have this input in common, name the site in common=[…]; if it holds the rows one after another: "
_PRODUCTS = frozenset(["linear", "matmul", "__matmul__", "__rmatmul__", "mm", "addmm"])
_OF_STACKS = frozenset(["bmm", "matmul", "__matmul__", "grouped_mm", "_grouped_mm", "grouped_mm_fallback", "transpose"])


def _fitted(tag: Tensor, lead: int, dims: int) -> Tensor:
    """The tag of positions, for an output of so many dimensions: the same object where it fits, which others know."""
    return (
        tag
        if tag.dim() == dims and tag.shape[lead:].numel() == 1
        else tag.view(*tag.shape[:lead], *[1] * (dims - lead))
    )


class MixedWeight(_Mixed):
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
        return MixedExpert([part.expert(e) for part in self.parts], self.w[e], self.rows)

    def attribute(self, name: str) -> Any:
        if name in ("T", "t", "mT", "transpose") and not self.stack and self.entry.site.kind == "linear":
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
        return t.put(y, None if tag is None else _fitted(tag, lead, y.dim()))  # type: ignore[no-any-return]

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

    __slots__ = ()
    stack = False  # type: ignore[assignment]
    canonical = Expert.canonical


class Turned(_Mixed):
    """weight.T of a linear layer: x @ weight.T is the layer's own product."""

    __slots__ = ("of",)
    multiplies = False

    def __init__(self, of: MixedWeight):
        self.of, self.entry, self.w, self.rows = of, of.entry, of.w.mT, of.rows
        self.task, self.inside = of.task, of.inside

    def value(self, k: int) -> Tensor:
        return self.of.value(k).mT

    @classmethod
    def call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        if getattr(func, "__name__", "") in ("matmul", "__matmul__", "mm") and isinstance(args[1], Turned):
            return args[1].of.linear(args[0])
        return super().call(func, args, kwargs)

    def attribute(self, name: str) -> Any:
        if name in ("T", "t", "mT", "transpose"):
            return (lambda *dims: self.of) if name in ("t", "transpose") else self.of
        return super().attribute(name)


class MixedBias(_Mixed):
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
