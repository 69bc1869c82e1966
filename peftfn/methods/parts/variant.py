"""W + s·U D with U and D made of LoRA's A and B: the bases of LoRA's variants."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.fields import at_most
from peftfn.core.method import Leaf, LowRank, Padding, Product
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import Init, Ranked, fresh
from peftfn.tensors.precision import wide


@dataclass(frozen=True)
class Variant(Ranked, abstract=True):
    """LoRA's leaf and start, without its bias."""

    padding: ClassVar[Padding | None] = Padding(scaled=("b",))

    init_weights: Init = "default"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return fresh(rng, w, self.rank, self.init_weights)


@dataclass(frozen=True)
class Drawn(Variant, abstract=True):
    """A variant whose factors are drawn anew for every product in train mode."""

    padding = None  # what is drawn depends on the rank

    def drawn(self, p: Leaf) -> Leaf:
        """The factors of one product."""
        raise NotImplementedError

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return super().product(self.drawn(p), w, x, dot)

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return super().linear(self.drawn(p), w, x)

    def low_rank(self, p: Leaf) -> LowRank | None:
        return None


@dataclass(frozen=True)
class FromWeight(Ranked, abstract=True):
    """A change that is a difference from where it started: from factors of the weight, which are also constants.

    So the base stays what it is, and the start is the identity, exactly. `prepare` writes the difference
    B A − B₀A₀ = (B − B₀) A₀ + B (A − A₀), whose terms are as small as itself: nothing large cancels in low precision.
    """

    def start(self, rng: Rng, w: Tensor) -> Leaf:
        """The leaf to start from, w at least fp32. Called for leaf and constants: draw nothing from the seed."""
        raise NotImplementedError

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        at_most(self, "rank", out=w.shape[0], **{"in": w.shape[1]})
        known = {k[:-1]: t for k, t in rng.constants.items() if k[-1] == "0" and t.is_meta == w.is_meta}
        return {k: t.to(rng.dtype, copy=True) for k, t in known.items()} or read_off(rng, **self.start(rng, wide(w)))

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        return {f"{k}0": t for k, t in read_off(rng, **self.start(rng, wide(w))).items()}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        a, b, a0, b0 = p["a"], p["b"], p["a0"], p["b0"]
        return {"down": torch.cat([a0, a - a0], -2), "up": torch.cat([b - b0, b], -1)}


def read_off(rng: Rng, **tensors: Tensor) -> Leaf:
    """Tensors read off a weight, as a leaf or constants: rounded to fp32 first, so that both are the same values."""
    return {k: t.float().to(rng.dtype) for k, t in tensors.items()}
