"""W + s·U D: what every method does whose change is a product of two thin matrices, however it comes by them."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive, PositiveInt, Probability
from peftfn.core.method import Leaf, LowRank, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.kernels.lora_linear import lora_linear

Init = Literal["default", "gaussian", "random"]
"""How A and B start, see `fresh`."""


class Factored(Weight, abstract=True):
    """A method gives the factors among its prepared tensors; everything else follows."""

    factors: ClassVar[tuple[str, str]] = ("down", "up")
    """Names of D [r, in] and U [out, r] among the prepared tensors."""
    dropout: Probability = 0.0  # probability of dropping an input feature of D in train mode

    @property
    def scale(self) -> float:
        """s"""
        return 1.0

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        down, up = self.factors
        return self.scale * (p[up] @ p[down])

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        down, up = self.factors
        return dot(x, w) + F.linear(self.scale * dot(self.dropped(x), p[down]), p[up])

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        down, up = self.factors
        return lora_linear(x, w, p[down], p[up], self.scale, dropout=self.dropout)

    def low_rank(self, p: Leaf) -> LowRank | None:
        down, up = self.factors
        return LowRank(p[down], p[up], self.scale, dropout=self.dropout)

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        return p | {self.factors[1]: s * p[self.factors[1]]}

    def summed(self, ps: list[Leaf]) -> Leaf | None:
        return self.side_by_side(ps)

    def side_by_side(self, ps: list[Leaf]) -> Leaf:
        """The factors whose product is the sum of the products of ps."""
        down, up = self.factors
        return {down: torch.cat([p[down] for p in ps], -2), up: torch.cat([p[up] for p in ps], -1)}


@dataclass(frozen=True)
class Ranked(Factored, abstract=True):
    """LoRA's hyper-parameters and scale: the base of LoRA and its variants. Fields are described in `LoRA`."""

    rank: PositiveInt = 8
    alpha: Positive | None = None
    rslora: bool = False
    dropout: Probability = 0.0

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (sqrt(self.rank) if self.rslora else self.rank)


def fresh(rng: Rng, w: Tensor, rank: int, start: Init) -> Leaf:
    """A [rank, in] and B [out, rank]: A Kaiming-uniform, or normal of std 1/rank ("gaussian"), and B zero; both
    Kaiming-uniform ("random")."""
    out, in_ = w.shape
    a = rng.normal(rank, in_, std=1 / rank) if start == "gaussian" else rng.kaiming(rank, in_)
    return {"a": a, "b": rng.kaiming(out, rank) if start == "random" else rng.zeros(out, rank)}


def lora_alpha(method: Any) -> dict[str, Any]:
    """PEFT's alpha, which is always a number."""
    return {"lora_alpha": method.rank if method.alpha is None else method.alpha}


LORA = Peft(
    "LORA",
    {"a": "lora_A.weight", "b": "lora_B.weight"},
    {"rank": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dropout": "lora_dropout"},
    writes=lora_alpha,
)
"""What PEFT writes of every variant of LoRA."""
