"""Many adapters at once: stacks of them, and batches in which every row uses its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap

from peftfn.method import Leaf, Method, Product
from peftfn.plan import Entry, wide
from peftfn.transform import backward_task
from peftfn.weight import AdaptedWeight, Slot


def stack(adapters: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """k adapters of one structure as one tree whose tensors are [k, …]: for `vmap`, `mixed`, or training many at once.

    Raises ValueError naming the first place where they differ.
    """
    if not adapters:
        raise ValueError("stack: give at least one adapter")
    for i, other in enumerate(adapters):
        a, b = (optree.tree_paths(t) for t in (adapters[0], other))  # type: ignore[arg-type]
        if a != b:
            odd = "/".join(map(str, next(iter(set(a) ^ set(b)))))
            raise ValueError(
                f"stack: adapters 0 and {i} differ at {odd}, which only one of them has: they must be of one net"
            )

    def join(path: tuple[Any, ...], *ts: Tensor) -> Tensor:
        for i, t in enumerate(ts):
            if t.shape != ts[0].shape:
                raise ValueError(
                    f"stack: {'/'.join(map(str, path))} has shape {list(ts[0].shape)} in adapter 0 and {list(t.shape)} "
                    f"in adapter {i}: adapters of different ranks do not stack"
                )
        return torch.stack(ts)

    return optree.tree_map_with_path(join, *adapters)  # type: ignore[arg-type, return-value]


def unstack(stacked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The adapters of a stack, as views."""

    def view(i: int) -> Any:
        return optree.tree_map(lambda t: t[i], stacked)  # type: ignore[arg-type]

    return [view(i) for i in range(stack_size(stacked))]


def stack_size(stacked: Mapping[str, Any]) -> int:
    tensors: list[Tensor] = optree.tree_leaves(stacked)  # type: ignore[arg-type]
    sizes = {t.shape[0] if t.dim() else -1 for t in tensors}
    if len(sizes) != 1 or sizes == {-1}:
        raise ValueError(
            f"this is no stack of adapters: the first dimensions of its tensors are {sorted(sizes)[:4]}, not one. "
            "Make one with peftfn.stack([…])"
        )
    return sizes.pop()


@dataclass(frozen=True)
class Rows:
    """Which adapter each row of a batch uses."""

    index: Tensor  # [rows], −1 is the base
    count: int  # adapters in the stack
    known: list[int] | None  # the index on the host; None while compiling
    inputs: frozenset[int] = frozenset()  # storages of the call's own tensors, which do have the rows in front
    fixed: frozenset[int] = frozenset()  # the model's parameters and buffers, which do not, whatever their size

    @classmethod
    def of(cls, index: Any, count: int, inputs: Any = ()) -> "Rows":
        t = index if isinstance(index, Tensor) else torch.tensor(index)
        if t.dim() != 1 or t.is_floating_point() or t.dtype == torch.bool:
            raise ValueError(
                f"mixed: index is a {t.dtype} tensor of shape {list(t.shape)}; give one integer a row, [rows]"
            )
        if torch.compiler.is_compiling():
            return cls(t, count, None)
        known = t.tolist()
        for row, k in enumerate(known):
            if not -1 <= k < count:
                raise ValueError(f"mixed: row {row} asks for adapter {k}; the stack has {count} (−1 is the base)")
        storages: list[int] = []
        _visit(inputs, lambda v: storages.append(v.untyped_storage().data_ptr()) if isinstance(v, Tensor) else None)
        return cls(t, count, known, frozenset(storages))

    def __len__(self) -> int:
        return self.index.shape[0]

    def has_base(self) -> bool:
        return self.known is None or -1 in self.known

    def gather(self, t: Tensor) -> Tensor:
        """[k, …] → [rows, …]; rows of the base get any adapter's."""
        return t[self.index.clamp(min=0).to(t.device)]

    def where_base(self, base: Tensor, y: Tensor) -> Tensor:
        mask = (self.index < 0).to(y.device)
        return torch.where(mask.view(-1, *[1] * (y.dim() - 1)), base, y)

    def each(self, run: Callable[[int, Callable[[Tensor], Tensor]], Tensor]) -> Tensor:
        """Run once for every adapter that occurs, on its rows, and put the rows back in order.

        run(k, cut) gives the output [its rows, …]; cut(x) takes its rows of x. While compiling, every adapter and the
        base run on all rows and each row picks its own.
        """
        if self.known is None:
            every = torch.stack([run(k, lambda x: x) for k in range(-1, self.count)])
            return every[self.index.to(every.device) + 1, torch.arange(len(self), device=every.device)]
        order = sorted(range(len(self.known)), key=self.known.__getitem__)
        parts, start = [], 0
        while start < len(order):
            k, stop = self.known[order[start]], start
            while stop < len(order) and self.known[order[stop]] == k:
                stop += 1
            mine = torch.tensor(order[start:stop])
            parts.append(run(k, lambda x, mine=mine: x.index_select(0, mine.to(x.device))))  # type: ignore[misc]
            start = stop
        back = torch.tensor(order).argsort()
        out = torch.cat(parts)
        return out.index_select(0, back.to(out.device))


class _Mixed(Slot):
    """A slot whose value depends on the row. `value(k)` is adapter k's, value(-1) the base's."""

    __slots__ = ("rows",)
    rows: Rows

    def value(self, k: int) -> Any:
        raise NotImplementedError

    def lost(self, what: str) -> ValueError:
        return ValueError(
            f"{self.name}: {what}, and a mixed batch of {len(self.rows)} rows needs its rows in the first dimension. "
            "Call net.apply for one adapter at a time, or leave this site out of the rules."
        )

    def rowed(self, x: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[0] % len(self.rows):
            raise self.lost(f"its input has shape {list(x.shape)}")
        return x.view(len(self.rows), -1, x.shape[-1])

    @classmethod
    def _call(cls, func: Any, args: Any, kwargs: Any) -> Any:
        found: list[_Mixed] = []
        candidates: list[Tensor] = []
        _visit((args, kwargs), lambda v: found.append(v) if isinstance(v, _Mixed) else None)
        rows = found[0].rows
        _visit((args, kwargs), lambda v: candidates.append(v) if _has_rows(v, rows) else None)
        if not candidates or func in _ROWS_ELSEWHERE:
            raise found[0].lost(f"{getattr(func, '__name__', func)} does not have them there")

        def run(k: int, cut: Callable[[Tensor], Tensor]) -> Tensor:
            def swap(v: Any) -> Any:
                return v.value(k) if isinstance(v, _Mixed) else cut(v) if _has_rows(v, rows) else v

            return func(*_map(args, swap), **_map(kwargs, swap))

        return rows.each(run)

    def _attribute(self, name: str) -> Any:
        raise self.lost(f"the model uses weight.{name}")

    def __getitem__(self, index: Any) -> Any:
        raise self.lost("the model indexes the weight")


_ROWS_ELSEWHERE = frozenset(
    [torch.nn.functional.multi_head_attention_forward, torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu]
)


def _has_rows(v: Any, rows: Rows) -> bool:
    return isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == len(rows) and id(v) not in rows.fixed


def _is_square(ids: Tensor) -> bool:
    """[n, n] indices, whose first dimension may be the rows or not."""
    return not ids.is_floating_point() and ids.dim() == 2 and ids.shape[0] == ids.shape[1] > 1


def _visit(tree: Any, see: Callable[[Any], Any]) -> None:
    _map(tree, lambda v: (see(v), v)[1])


def _map(tree: Any, f: Callable[[Any], Any]) -> Any:
    if isinstance(tree, dict):
        return {k: _map(v, f) for k, v in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_map(v, f) for v in tree)
    return f(tree)


class MixedWeight(_Mixed):
    """The adapted weight of a mixed batch: row i of every product uses adapter rows.index[i]."""

    __slots__ = ("axes", "method", "p")

    def __init__(self, entry: Entry, leaf: Mapping[str, Any], bank: Mapping[str, Any], w: Tensor, rows: Rows):
        self.entry, self.w, self.rows = entry, w, rows
        self.task = -1 if torch.compiler.is_compiling() else backward_task()
        self.method, self.p, self.axes = _stacked(entry, leaf, bank, entry.site.canonical(w))

    def value(self, k: int) -> Tensor:
        return self.w if k < 0 else self.one(k).dense()

    def one(self, k: int) -> AdaptedWeight:
        return AdaptedWeight(self.entry, self.method, _take(self.p, self.axes, lambda t: t[k]), self.w)

    def product(self, x: Tensor, dot: Product) -> Tensor:
        if self.rows.known is not None and _is_square(x) and x.untyped_storage().data_ptr() not in self.rows.inputs:
            raise self.lost(f"its indices {list(x.shape)} are none of the call's inputs (relative positions, say)")
        return self._by_row(x, lambda weight, x: weight.product(x, dot), lambda x: dot(x, self.canonical()), "product")

    def linear(self, x: Tensor) -> Tensor:
        def base(x: Tensor) -> Tensor:
            return torch.nn.functional.linear(x, self.canonical())

        return self._by_row(x, lambda weight, x: weight.linear(x), base, "linear")

    def _by_row(self, x: Tensor, adapted: Callable[..., Tensor], base: Callable[[Tensor], Tensor], kind: str) -> Tensor:
        if self.entry.site.stacked or x.dim() == 0 or x.shape[0] not in (1, len(self.rows)):
            raise self.lost(f"its input has shape {list(x.shape)}")
        x = x.expand(len(self.rows), *x.shape[1:])
        fast = self.method.fast_linear() if kind == "linear" else self.method.overrides("product")
        if not (fast and self.method.per_row) and self.rows.known is not None:
            return self.rows.each(lambda k, cut: base(cut(x)) if k < 0 else adapted(self.one(k), cut(x)))
        p = _take(self.p, self.axes, self.rows.gather)

        def row(p: Leaf, x: Tensor) -> Tensor:
            return adapted(AdaptedWeight(self.entry, self.method, p, self.w), x)

        y = vmap(row, (self.axes, 0), randomness="different")(p, x)
        return self.rows.where_base(base(x), y) if self.rows.has_base() else y

    def added_to(self, y: Tensor) -> Tensor:
        return MixedBias(self.name, self._values(), self.w, self.rows).added_to(y)

    def _values(self) -> Tensor:
        return torch.stack([self.value(k) for k in range(self.rows.count)])

    def bias(self, b: "Tensor | MixedWeight | None") -> "MixedBias | None":
        """What this weight's method makes of the layer's bias b, for each adapter; None where it stays without."""
        mixed = isinstance(b, MixedWeight)
        base = b.w if isinstance(b, MixedWeight) else b
        given = b._values() if isinstance(b, MixedWeight) else b

        def one(p: Leaf, b: Tensor | None) -> Tensor | None:
            return self.method.bias(p, None if b is None else wide(b))

        if base is None and one(_take(self.p, self.axes, lambda t: t[0]), None) is None:
            return None
        values: Tensor = vmap(one, (self.axes, 0 if mixed else None))(self.p, given)  # type: ignore[assignment]
        base = torch.zeros_like(values[0]) if base is None else base
        return MixedBias(f"{self.name} (bias)", values.to(base.dtype), base, self.rows)


class MixedBias(_Mixed):
    """The bias slot of a mixed batch: `values` [k, out], and the base's own `w` [out]."""

    __slots__ = ("label", "values")
    multiplies = False

    def __init__(self, label: str, values: Tensor, w: Tensor, rows: Rows):
        self.label, self.values, self.w, self.rows = label, values, w, rows
        self.task = -1 if torch.compiler.is_compiling() else backward_task()

    @property
    def name(self) -> str:
        return self.label

    def value(self, k: int) -> Tensor:
        return self.w if k < 0 else self.values[k]

    def added_to(self, y: Tensor) -> Tensor:
        rows = self.rows.gather(self.values)
        if self.rows.has_base():
            rows = self.rows.where_base(self.w.expand_as(rows), rows)
        return y + rows.to(y.dtype).view(len(self.rows), *[1] * (y.dim() - 2), -1)


def _stacked(entry: Entry, leaf: Any, bank: Any, w: Tensor) -> tuple[Method, dict[str, Any], dict[str, Any]]:
    """(method, prepared tensors, their `in_dims`) of a stack of leaves: what differs between adapters has an axis."""
    fixed: list[Any] = []

    def one(leaf: Any, bank: Any) -> Any:
        method, p = entry.tensors(leaf, bank, w)
        fixed[:] = [method, _split(p, entry, False)]
        return _split(p, entry, True)

    varying = vmap(one, randomness="different")(leaf, bank) if leaf or bank else one(leaf, bank)
    method, constant = fixed
    return method, *_joined(varying, constant)


def _split(p: dict[str, Any], entry: Entry, varying: bool) -> dict[str, Any]:
    return {
        k: _split(v, entry, varying) if isinstance(v, dict) else v
        for k, v in p.items()
        if isinstance(v, dict) or varying == (k == "scale" or k in entry.prepared)
    }


def _joined(varying: dict[str, Any], constant: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    p: dict[str, Any] = {}
    axes: dict[str, Any] = {}
    for k in {**constant, **varying}:
        if isinstance(varying.get(k), dict):
            p[k], axes[k] = _joined(varying[k], constant[k])
        elif k in varying:
            p[k], axes[k] = varying[k], 0
        else:
            p[k], axes[k] = constant[k], None
    return p, axes


def _take(p: dict[str, Any], axes: dict[str, Any], f: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {k: _take(v, axes[k], f) if isinstance(v, dict) else (v if axes[k] is None else f(v)) for k, v in p.items()}
