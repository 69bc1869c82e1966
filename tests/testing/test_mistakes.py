"""What a researcher gets wrong in a method of one's own: `check_method` finds it, and names the function.

Each class below is `Good` with one slip. The table at the end says which of its functions the message must name, and
what it must say of it.
"""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import peftfn as pf
from peftfn.core.fields import PositiveInt, Probability
from peftfn.core.method import Leaf, LowRank, Padding, Product
from peftfn.testing import LawBroken, check_method


@dataclass(frozen=True)
class Good(pf.Weight):
    """W + s·B A, with everything a method may have."""

    cases: ClassVar = ({"rank": 2},)

    rank: PositiveInt = 2
    scale: float = 0.5
    dropout: Probability = 0.0

    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {"a": rng.kaiming(self.rank, w.shape[1]), "b": rng.zeros(w.shape[0], self.rank)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self.scale * (p["b"] @ p["a"])

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) + self.scale * F.linear(dot(self.dropped(x), p["a"]), p["b"])

    def low_rank(self, p: Leaf) -> LowRank:
        return LowRank(p["a"], p["b"], self.scale, dropout=self.dropout)


@dataclass(frozen=True)
class GoodShared(pf.Weight):
    """W + (c ⊙ v) 1ᵀ: a trained vector that all sites have, and constants of each."""

    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {"d": rng.zeros(w.shape[0])}

    def shared(self, rng: pf.Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        return {n: {"c": rng.normal(w.shape[-2])} for n, w in weights.items()}

    def bank(self, rng: pf.Rng, weights: Mapping[str, Tensor]) -> Leaf:
        return {"v": rng.zeros(1)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return (p["c"] * p["v"] + p["d"])[:, None].expand(w.shape)


@dataclass(frozen=True)
class GoodBias(pf.Weight):
    """W, and b + d where there is a bias."""

    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {"d": rng.zeros(w.shape[0])}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return torch.zeros_like(w)

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        return p["d"] if b is None else b + p["d"]


@pytest.mark.parametrize("method", [Good(), GoodShared(), GoodBias()], ids=str)
def test_what_is_right_passes(method: pf.Weight) -> None:
    check_method(method)


MISTAKES: list[Any] = []


def planted(number: int, function: str, text: str, **fields: Any) -> Any:
    """Mistake `number`: the message must name `function` of the class, and match `text`."""

    def add(cls: type[pf.Weight]) -> type[pf.Weight]:
        MISTAKES.append(pytest.param(cls, fields, function, text, id=f"{number} {cls.__name__}"))
        return cls

    return add


KEPT: dict[Any, Tensor] = {}


@planted(1, "delta", r"returns \[8, 6\] for a weight \[6, 8\]")
@dataclass(frozen=True)
class Transposed(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return super().delta(p, w).mT


@planted(1, "delta", r"a \[2, 6\] of Swapped\.init")
@dataclass(frozen=True)
class Swapped(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {"a": rng.kaiming(2, w.shape[0]), "b": rng.zeros(w.shape[1], 2)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["b"] @ p["a"] + w


@planted(2, "low_rank", r"differs from delta")
@dataclass(frozen=True)
class ScaleNotInDelta(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["b"] @ p["a"]


@planted(2, "", r"field scale,.*changes nothing")
@dataclass(frozen=True)
class ScaleNowhere(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["b"] @ p["a"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) + F.linear(dot(self.dropped(x), p["a"]), p["b"])

    def low_rank(self, p: Leaf) -> LowRank:
        return LowRank(p["a"], p["b"], dropout=self.dropout)


@planted(3, "init", r"identity")
@dataclass(frozen=True)
class NoIdentity(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {"a": rng.kaiming(self.rank, w.shape[1]), "b": rng.ones(w.shape[0], self.rank)}


@planted(3, "init", r"never trains")
@dataclass(frozen=True)
class BothZero(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {"a": rng.zeros(self.rank, w.shape[1]), "b": rng.zeros(w.shape[0], self.rank)}


@planted(4, "linear", r"differs")
@dataclass(frozen=True)
class OtherLinear(Good):
    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, w) + 2 * self.scale * F.linear(F.linear(self.dropped(x), p["a"]), p["b"])


@planted(5, "delta", r"writes (in)?to (its argument )?(w|p\[)")
@dataclass(frozen=True)
class DeltaWritesW(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        w += 1
        return super().delta(p, w)


@planted(5, "delta", r"writes (in)?to (its argument )?(w|p\[)")
@dataclass(frozen=True)
class DeltaWritesP(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        p["b"].mul_(1.5)
        return super().delta(p, w)


@planted(5, "linear", r"writes (in)?to (its argument )?(w|p\[)")
@dataclass(frozen=True)
class LinearWritesW(Good):
    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        w.add_(1)
        return F.linear(x, w)


@planted(5, "linear", r"writes (in)?to (its argument )?(w|p\[)")
@dataclass(frozen=True)
class LinearWritesP(Good):
    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        p["a"].mul_(2)
        return self.product(p, w, x, F.linear)


@planted(5, "product", r"writes (in)?to (its argument )?(w|p\[)")
@dataclass(frozen=True)
class ProductWritesP(Good):
    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        p["a"].mul_(2)
        return super().product(p, w, x, dot)


@planted(5, "prepare", r"writes (in)?to (its argument )?(w|p\[)")
@dataclass(frozen=True)
class PrepareWritesW(Good):
    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        w.zero_()
        return p


@planted(5, "low_rank", r"writes (in)?to (its argument )?(w|p\[)")
@dataclass(frozen=True)
class LowRankWritesP(Good):
    def low_rank(self, p: Leaf) -> LowRank:
        p["b"].mul_(self.scale)
        return LowRank(p["a"], p["b"], dropout=self.dropout)


@planted(5, "bias", r"writes to its argument w or b")
@dataclass(frozen=True)
class BiasWritesB(GoodBias):
    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        return p["d"] if b is None else b.add_(p["d"])


@planted(6, "delta", r"no values")
@dataclass(frozen=True)
class IfInDelta(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return super().delta(p, w) if p["b"].sum() != 0 else torch.zeros_like(w)


@planted(6, "delta", r"no values")
@dataclass(frozen=True)
class ItemInDelta(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return super().delta(p, w) * p["b"].sum().item()


@planted(6, "linear", r"(vmap|data-dependent)")
@dataclass(frozen=True)
class IfInLinear(Good):
    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return self.product(p, w, x, F.linear) if p["b"].sum() != 0.5 else F.linear(x, w)


@planted(7, "delta", r"float64")
@dataclass(frozen=True)
class WideDelta(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return super().delta(p, w).double()


@planted(7, "init", r"float16")
@dataclass(frozen=True)
class HalfInit(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {k: t.half() for k, t in super().init(rng, w).items()}


@planted(7, "linear", r"float64")
@dataclass(frozen=True)
class WideLinear(Good):
    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return self.product(p, w, x, F.linear).double()


@planted(7, "prepare", r"bfloat16")
@dataclass(frozen=True)
class NarrowPrepare(Good):
    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        return {k: t.to(w.dtype) for k, t in p.items()}


@planted(8, "init", r"global generator of torch")
@dataclass(frozen=True)
class TorchRandom(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"a": torch.randn(2, w.shape[1], device=w.device)}


@planted(8, "init", r"global generator of random")
@dataclass(frozen=True)
class PythonRandom(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"a": rng.full(2, w.shape[1], value=random.random())}


@planted(8, "linear", r"draws random numbers")
@dataclass(frozen=True)
class RandomLinear(Good):
    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return self.product(p, w, x, F.linear) + torch.randn(w.shape[0])


@planted(8, "frozen", r"global generator of torch")
@dataclass(frozen=True)
class RandomFrozen(Good):
    def frozen(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {"m": torch.randn(w.shape, device=w.device)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return super().delta(p, w) * p["m"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w + self.delta(p, w))

    def low_rank(self, p: Leaf) -> None:  # type: ignore[override]
        return None


@planted(8, "", r"keeps a tensor in its class attribute mask")
@dataclass(frozen=True)
class MaskOnTheClass(Good):
    mask: ClassVar[Any] = None

    def frozen(self, rng: pf.Rng, w: Tensor) -> Leaf:
        if type(self).mask is None or type(self).mask.is_meta:
            type(self).mask = rng.normal(*w.shape)
        return {"m": type(self).mask.to(w.device).clone()}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["b"] @ p["a"] * p["m"] * self.scale

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w + self.delta(p, w))

    def low_rank(self, p: Leaf) -> None:  # type: ignore[override]
        return None


@planted(8, "frozen", r"same memory")
@dataclass(frozen=True)
class MaskInAModule(Good):
    def frozen(self, rng: pf.Rng, w: Tensor) -> Leaf:
        if w.is_meta:
            return {"m": w + 0}
        return {"m": KEPT.setdefault((w.shape, w.dtype), rng.normal(*w.shape))}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["b"] @ p["a"] * p["m"] * self.scale

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w + self.delta(p, w))

    def low_rank(self, p: Leaf) -> None:  # type: ignore[override]
        return None


@planted(9, "bias", r"None for a bias")
@dataclass(frozen=True)
class NoBias(GoodBias):
    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        return p["d"] if b is None else None


@planted(9, "init", r"no result of delta.* depends")
@dataclass(frozen=True)
class UnusedLeaf(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"z": rng.zeros(3)}


@planted(9, "linear", r"differs")
@dataclass(frozen=True)
class BiasInLinear(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"z": rng.zeros(w.shape[0])}

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        return p["z"] if b is None else b + p["z"]

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return self.product(p, w, x, F.linear) + p["z"]


@planted(10, "linear", r"differs")
@dataclass(frozen=True)
class BatchMean(Good):
    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return self.product(p, w, x - x.mean(0), F.linear)


@planted(10, "linear", r"raised in")
@dataclass(frozen=True)
class TwoDimensions(Good):
    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, w) + self.scale * torch.mm(torch.mm(x, p["a"].t()), p["b"].t())


@planted(10, "low_rank", r"differs from delta")
@dataclass(frozen=True)
class LowRankWithoutScale(Good):
    def low_rank(self, p: Leaf) -> LowRank:
        return LowRank(p["a"], p["b"], dropout=self.dropout)


@planted(10, "low_rank", r"product drops features, and low_rank gives dropout=0\.0")
@dataclass(frozen=True)
class LowRankWithoutDropout(Good):
    def low_rank(self, p: Leaf) -> LowRank:
        return LowRank(p["a"], p["b"], self.scale)


@planted(11, "delta", r"(earlier call|class attribute)")
@dataclass(frozen=True)
class CachedDelta(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        key = w.shape, w.device
        if key not in KEPT:
            KEPT[key] = super().delta(p, w)
        return KEPT[key]


@planted(12, "init", r"'a'.*shares memory with the weight")
@dataclass(frozen=True)
class InitIsAView(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {"a": w[:2], "b": rng.zeros(w.shape[0], 2)}


@planted(12, "frozen", r"'c'.*shares memory with the weight")
@dataclass(frozen=True)
class FrozenIsAView(Good):
    def frozen(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {"c": w}


@planted(13, "", r"scales_with")
@dataclass(frozen=True)
class ScalesWithWrong(Good):
    scales_with: ClassVar = ("a", "b")


@planted(13, "", r"linear_in")
@dataclass(frozen=True)
class LinearInWrong(Good):
    linear_in: ClassVar = ("b",)


@planted(13, "", r"padding")
@dataclass(frozen=True)
class PaddingWrong(Good):
    padding: ClassVar = Padding(scaled=("b",), fields=frozenset({"rank", "scale"}))

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self.scale * self.rank * (p["b"] @ p["a"])

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w + self.delta(p, w))

    def low_rank(self, p: Leaf) -> None:  # type: ignore[override]
        return None


@planted(14, "prepare", r"keeps the name")
@dataclass(frozen=True)
class PrepareKeepsTheName(Good):
    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        return {"a": p["a"], "b": self.scale * p["b"]}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["b"] @ p["a"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) + F.linear(dot(self.dropped(x), p["a"]), p["b"])

    def low_rank(self, p: Leaf) -> LowRank:
        return LowRank(p["a"], p["b"], dropout=self.dropout)


@planted(15, "delta", r"'b'.*no gradient")
@dataclass(frozen=True)
class DetachedDelta(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self.scale * (p["b"].detach() @ p["a"])


@planted(15, "delta", r"'a'.*no gradient")
@dataclass(frozen=True)
class DataInDelta(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self.scale * (p["b"] @ p["a"].data)


@planted(15, "product", r"'a'.*no gradient")
@dataclass(frozen=True)
class DetachedProduct(Good):
    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) + self.scale * F.linear(dot(self.dropped(x), p["a"].detach()), p["b"])


@planted(16, "delta", r"meta device")
@dataclass(frozen=True)
class NumpyInDelta(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return torch.from_numpy(np.outer(p["b"].numpy()[:, 0], p["a"].numpy()[0]))


@planted(16, "init", r"on another device than the weight")
@dataclass(frozen=True)
class CpuInit(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"a": torch.zeros(2, w.shape[1], device="cpu")}


@planted(16, "delta", r"meta")
@dataclass(frozen=True)
class CpuDelta(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return super().delta(p, w) * torch.ones(w.shape, device="cpu")


@planted(17, "", r"keeps size beside its fields.*dataclass")
class PlainClass(pf.Weight):
    def __init__(self, size: int = 2):
        object.__setattr__(self, "size", size)

    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {"a": rng.kaiming(self.size, w.shape[1]), "b": rng.zeros(w.shape[0], self.size)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["b"] @ p["a"]


@planted(18, "init", r"not finite at a fresh adapter")
@dataclass(frozen=True)
class RootOfZero(Good):
    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self.scale * (p["b"] @ p["a"]) * p["b"].square().sum().sqrt()

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w + self.delta(p, w))

    def low_rank(self, p: Leaf) -> None:  # type: ignore[override]
        return None


@planted(19, "(linear|product)", r"draws random numbers.*in_eval", dropout=0.5)
@dataclass(frozen=True)
class DropoutInEval(Good):
    in_eval: ClassVar = ()


@planted(20, "init", r"names a tensor 'of'")
@dataclass(frozen=True)
class NamedOf(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"of": rng.zeros(1)}


@planted(20, "init", r"names a tensor 'add\.0'")
@dataclass(frozen=True)
class NamedAdd(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"add.0": rng.zeros(1)}


@planted(20, "init", r"names a tensor 'scale'")
@dataclass(frozen=True)
class NamedScale(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"scale": rng.zeros(1)}


@planted(20, "init", r"names a tensor 'two words'")
@dataclass(frozen=True)
class NamedSpace(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"two words": rng.zeros(1)}


@planted(20, "init", r"names a tensor '1st'")
@dataclass(frozen=True)
class NamedDigit(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"1st": rng.zeros(1)}


@planted(21, "linear", r"under autocast")
@dataclass(frozen=True)
class AutocastLinear(Good):
    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        y = F.linear(x.float(), w.float()).to(x.dtype)
        with torch.autocast("cpu", enabled=False):
            return (
                F.linear(x, w.to(x.dtype))
                + 0 * y
                + self.scale * F.linear(F.linear(x, p["a"].to(x.dtype)), p["b"].to(x.dtype))
            )


@planted(21, "prepare", r"bfloat16")
@dataclass(frozen=True)
class PrepareOfTheWeightsDtype(Good):
    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        return {"a": p["a"].to(w.dtype), "b": p["b"]}


@planted(22, "shared", r"c")
@dataclass(frozen=True)
class AnothersTensor(GoodShared):
    def shared(self, rng: pf.Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        made = super().shared(rng, weights)
        return dict(zip(made, [*made.values()][-1:] + [*made.values()][:-1], strict=True))


@planted(22, "shared", r"no.such.site")
@dataclass(frozen=True)
class UnknownSite(GoodShared):
    def shared(self, rng: pf.Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        return {**super().shared(rng, weights), "no.such.site": {"c": rng.zeros(1)}}


@planted(22, "bank", r"another order")
@dataclass(frozen=True)
class OrderInTheBank(GoodShared):
    def bank(self, rng: pf.Rng, weights: Mapping[str, Tensor]) -> Leaf:
        return {"v": rng.zeros(next(iter(weights.values())).shape[-2])}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return (p["c"] * p["v"].sum() + p["d"])[:, None].expand(w.shape)


@planted(0, "init", r"int64")
@dataclass(frozen=True)
class IntegerLeaf(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"a": rng.kaiming(self.rank, w.shape[1]).long()}


@planted(0, "init", r"require gradients")
@dataclass(frozen=True)
class LeafWithGradients(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {k: t.requires_grad_() for k, t in super().init(rng, w).items()}


@planted(0, "init", r"must return a dict")
@dataclass(frozen=True)
class NoTensor(Good):
    def init(self, rng: pf.Rng, w: Tensor) -> Leaf:
        return {**super().init(rng, w), "z": None}  # type: ignore[dict-item]


@planted(0, "", r"is \['uu'\]; a prepared adapter has \['a', 'b'\]")
@dataclass(frozen=True)
class LinearInNothing(Good):
    linear_in: ClassVar = ("uu",)


@planted(0, "", r"lacks @dataclass")
class FieldWithoutDataclass(Good):
    more: float = 1.0


# Around a module.


@dataclass(frozen=True)
class GoodAround(pf.ModuleMethod):
    """y + s ⊙ tanh(x₀ y): right."""

    scale: float = 0.5

    def init(self, rng: pf.Rng, m: pf.Place) -> Leaf:
        return {"s": rng.zeros(m.width)}

    def after(self, p: Leaf, m: pf.Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return y + self.scale * p["s"] * self.change(x, y, m)

    def change(self, x: Tensor, y: Tensor, m: pf.Place) -> Tensor:
        return y.tanh()


def test_the_good_one_around_a_module_is_good() -> None:
    check_method(GoodAround())


@planted(23, "after", r"mixes the rows of a batch")
@dataclass(frozen=True)
class MixesRows(GoodAround):
    def change(self, x: Tensor, y: Tensor, m: pf.Place) -> Tensor:
        return y - y.mean(0)


@planted(23, "after", r"reads later tokens \(where that is meant, say causal = False\)")
@dataclass(frozen=True)
class LaterToken(GoodAround):
    def change(self, x: Tensor, y: Tensor, m: pf.Place) -> Tensor:
        return y.roll(-1, -2)


@planted(23, "after", r"keeps last on the place m")
@dataclass(frozen=True)
class KeepsActivation(GoodAround):
    def change(self, x: Tensor, y: Tensor, m: pf.Place) -> Tensor:
        m.last = y  # type: ignore[attr-defined]
        return y.tanh()


@planted(23, "after", r"writes to its argument y")
@dataclass(frozen=True)
class WritesY(GoodAround):
    def change(self, x: Tensor, y: Tensor, m: pf.Place) -> Tensor:
        return y.tanh_()


@planted(23, "after", r"returns \[2, 3, 1\] for hidden states \[2, 3, 6\]")
@dataclass(frozen=True)
class OneFeature(GoodAround):
    def after(self, p: Leaf, m: pf.Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return super().after(p, m, x, y).mean(-1, keepdim=True)


@planted(23, "init", r"shares memory with weight of the module layer")
@dataclass(frozen=True)
class ViewOfTheModule(GoodAround):
    def init(self, rng: pf.Rng, m: pf.Place) -> Leaf:
        return {"s": next(m.module.parameters())[:, 0]}


@planted(23, "", r"must define before, after or leave")
@dataclass(frozen=True)
class DoesNothing(pf.ModuleMethod):
    def init(self, rng: pf.Rng, m: pf.Place) -> Leaf:
        return {"s": rng.zeros(m.width)}


@planted(2, "", r"has the field scale, which none of")
@dataclass(frozen=True)
class UnusedField(GoodAround):
    def after(self, p: Leaf, m: pf.Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return y + p["s"] * y.tanh()


@planted(15, "after", r"gives no gradient")
@dataclass(frozen=True)
class DetachedAround(GoodAround):
    def after(self, p: Leaf, m: pf.Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return y + self.scale * p["s"].detach() * y


@pytest.mark.parametrize(("cls", "fields", "function", "text"), MISTAKES)
def test_a_mistake_is_found_and_named(cls: Any, fields: dict[str, Any], function: str, text: str) -> None:
    with pytest.raises(LawBroken) as caught:
        check_method(cls(**fields))
    message = str(caught.value)
    named = rf"\b{cls.__name__}\.{function}\b" if function else cls.__name__
    assert re.search(named, message), message
    assert re.search(text, message, re.DOTALL), message
    assert "the model's own forward" not in message
