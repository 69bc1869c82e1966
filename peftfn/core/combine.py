"""Algebra on adapters: scale and add.

An adapter is data, so its algebra is data too. `scale` and `add` write what they mean into the tree:

    leaf  ::=  {name: tensor}  |  {"scale": s, "of": leaf}  |  {"add.0": leaf, "add.1": leaf, …}

and the tree is read when the adapter is applied: W + s·delta, W + Σ delta. Where the method knows a closed form (a sum
of LoRAs is a LoRA of the summed rank), that form runs; otherwise the weight is made dense. A method without a delta,
whose change depends on the input, scales and sums what the layer returns beyond the base's output. The result is a tree
of tensors like any other: it stacks, saves, and has gradients.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Method, Weight
from peftfn.core.modules import ModuleMethod
from peftfn.model.place import Place


def scale(adapter: Mapping[str, Any], s: float | Tensor) -> dict[str, Any]:
    """Return the adapter whose change of every weight is s times as large: W + s·delta(W).

    Of a method whose change depends on the input, it is what the layer returns beyond the base's output that is scaled.

    Args:
        adapter: an adapter, also a sum or a scaling of others.
        s: a number, or a 0-d floating-point tensor, which is then a leaf with a gradient. s = 0 is the base.

    Returns:
        An adapter of the same net.

    Raises:
        TypeError: `adapter` is not an adapter, or s is not a number.
        ValueError: s is an integer tensor, or not finite.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        a, x = net.init(), torch.randn(3, 8)
        assert torch.equal(net.apply(pf.scale(a, 0.0), x), net.model(x))
    """
    if not isinstance(s, Real | Tensor) or not isinstance(adapter, Mapping):
        kinds = f"{type(adapter).__name__} and {type(s).__name__}"
        raise TypeError(f"scale: give an adapter and a number, not {kinds}: scale(adapter, s)")
    if not isinstance(s, Tensor) and not isfinite(s):
        raise ValueError(f"scale: s is {s}; give a finite number")
    factor = s if isinstance(s, Tensor) else torch.tensor(float(s))
    if not factor.is_floating_point():
        raise ValueError(f"scale: s is a {factor.dtype} tensor; give a number or a floating-point tensor")
    return {name: {"scale": factor, "of": leaf} for name, leaf in adapter.items()}


def add(*adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter whose change of every weight is the sum of theirs, all of one net. See `many/sums.py`."""
    if not adapters:
        raise ValueError("add: give at least one adapter")
    for i, a in enumerate(adapters):
        if not isinstance(a, Mapping):
            raise TypeError(f"add: argument {i} is a {type(a).__name__}; give adapters, add(a, b, …)")
    names = {name: None for a in adapters for name in a}
    out = {}
    for name in names:
        here = [a[name] for a in adapters if name in a]
        out[name] = here[0] if len(here) == 1 else {f"add.{i}": leaf for i, leaf in enumerate(here)}
    return out


def is_expression(leaf: Mapping[str, Any]) -> bool:
    return "of" in leaf or "add.0" in leaf


def terms(leaf: Mapping[str, Any], name: str, lead: int = 0) -> list[Mapping[str, Any]]:
    """Return the plain leaves of an expression. ValueError for a scale that is not a number; `lead`: stacked axes."""
    if "of" in leaf:
        s = leaf.get("scale")
        if not isinstance(s, Tensor) or s.dim() != lead or not s.is_floating_point():
            seen = f"{s.dtype} of shape {list(s.shape)}" if isinstance(s, Tensor) else type(s).__name__
            raise ValueError(f"{name}: scale is {seen}; it must be a floating-point tensor of {lead} dimensions")
        if leaf.keys() != {"scale", "of"}:
            raise KeyError(f"{name}: a scaled leaf has {sorted(leaf)}; it must have exactly 'scale' and 'of'")
        return terms(leaf["of"], name, lead)
    if "add.0" in leaf:
        if leaf.keys() != {f"add.{i}" for i in range(len(leaf))}:
            raise KeyError(f"{name}: a sum has {sorted(leaf)}; it must have exactly add.0, add.1, …")
        return [t for part in leaf.values() for t in terms(part, name, lead)]
    return [leaf]


def resolve(method: Method, leaf: Mapping[str, Any], bank: Mapping[str, Any], plain: Any) -> tuple[Any, Any]:
    """Return (method, prepared tensors) of an expression; `plain(leaf, bank)` prepares a plain leaf."""
    if "of" in leaf:
        m, p = resolve(method, leaf["of"], bank.get("of", bank), plain)
        closed = m.scaled(p, leaf["scale"])
        scaling: Any = _forms(m)[0]
        return (m, closed) if closed is not None else (scaling(m), {"scale": leaf["scale"]} | _nested("of", p))
    if "add.0" in leaf:
        return total([resolve(method, part, bank.get(key, bank), plain) for key, part in leaf.items()])
    return method, plain(leaf, bank)


def total(parts: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Return (method, prepared tensors) of the sum of some, of one family."""
    ms, ps = [m for m, _ in parts], [p for _, p in parts]
    closed = ms[0].summed(ps) if all(m == ms[0] for m in ms) else None
    if closed is not None:
        return ms[0], closed
    sum_: Any = _forms(ms[0])[1]
    return sum_(tuple(ms)), {k: t for i, p in enumerate(ps) for k, t in _nested(f"add.{i}", p).items()}


# The prepared tensors of a scaling or sum are one flat dict: the names of each operand behind a prefix and a "/", which
# no method's tensor has in its name. So code that walks over prepared tensors need not handle expressions.


def _nested(prefix: str, p: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{k}": t for k, t in p.items()}


def _inside(prefix: str, p: Mapping[str, Any]) -> dict[str, Any]:
    n = len(prefix) + 1
    return {k[n:]: t for k, t in p.items() if k.startswith(f"{prefix}/")}


def own_name(k: str) -> str:
    """Return a prepared tensor's name in its method, without the prefixes of sums and scalings; "scale" is theirs."""
    return k.rpartition("/")[2]


@dataclasses.dataclass(frozen=True)
class _Scaled(Weight):
    """W + s·delta."""

    method: Weight

    def delta(self, p: Any, w: Tensor) -> Tensor:
        return p["scale"] * self.method.delta(_inside("of", p), w)

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        new = self.method.bias(_inside("of", p), b)
        return (
            new
            if new is None or new is b
            else p["scale"] * (new - b if b is not None else new) + (0 if b is None else b)
        )


@dataclasses.dataclass(frozen=True)
class _Sum(Weight):
    """W + Σ delta_i."""

    methods: tuple[Weight, ...]

    def _parts(self, p: Any) -> list[tuple[Weight, Any]]:
        return [(m, _inside(f"add.{i}", p)) for i, m in enumerate(self.methods)]

    def delta(self, p: Any, w: Tensor) -> Tensor:
        first, *rest = [m.delta(q, w) for m, q in self._parts(p)]
        return sum(rest, first)

    def bias(self, p: Any, b: Tensor | None) -> Tensor | None:
        new = [m.bias(q, b) for m, q in self._parts(p)]
        changes = [n if b is None else n - b for n in new if n is not None and n is not b]
        return sum(changes, b) if b is not None else (sum(changes[1:], changes[0]) if changes else None)


@dataclasses.dataclass(frozen=True)
class _ScaledOutput(Weight):
    """x Wᵀ + s (linear(x) − x Wᵀ), for a method whose change depends on the input: there is no delta to scale."""

    mergeable: ClassVar = False
    method: Weight

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        return self.method.per_row

    def linear(self, p: Any, w: Tensor, x: Tensor) -> Tensor:
        y = F.linear(x, w)
        return y + p["scale"] * (self.method.linear(_inside("of", p), w, x) - y)


@dataclasses.dataclass(frozen=True)
class _SumOutput(Weight):
    """x Wᵀ + Σ (linear_i(x) − x Wᵀ), for the same methods."""

    mergeable: ClassVar = False
    methods: tuple[Weight, ...]

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        return all(m.per_row for m in self.methods)

    def linear(self, p: Any, w: Tensor, x: Tensor) -> Tensor:
        y = F.linear(x, w)
        return sum((m.linear(_inside(f"add.{i}", p), w, x) - y for i, m in enumerate(self.methods)), y)


@dataclasses.dataclass(frozen=True)
class _ScaledModule(ModuleMethod):
    """x + s (before(x) − x) and y + s (after(y) − y)."""

    method: ModuleMethod

    def before(self, p: Any, m: Place, x: Tensor, *seen: Tensor) -> Tensor:
        return x + p["scale"] * (self.method.before(_inside("of", p), m, x, *seen) - x)

    def after(self, p: Any, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return y + p["scale"] * (self.method.after(_inside("of", p), m, x, y, *seen) - y)


@dataclasses.dataclass(frozen=True)
class _SumModule(ModuleMethod):
    """x + Σ (before_i(x) − x) and y + Σ (after_i(y) − y)."""

    methods: tuple[ModuleMethod, ...]

    def _parts(self, p: Any) -> list[tuple[ModuleMethod, Any]]:
        return [(m, _inside(f"add.{i}", p)) for i, m in enumerate(self.methods)]

    def before(self, p: Any, m: Place, x: Tensor, *seen: Tensor) -> Tensor:
        return sum((f.before(q, m, x, *seen) - x for f, q in self._parts(p)), x)

    def after(self, p: Any, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return sum((f.after(q, m, x, y, *seen) - y for f, q in self._parts(p)), y)


def _forms(method: Method) -> tuple[type, type]:
    """(what a scaling of the method's adapters is, what a sum of them is)."""
    if not isinstance(method, Weight):
        return _ScaledModule, _SumModule
    return (_Scaled, _Sum) if method.mergeable else (_ScaledOutput, _SumOutput)
