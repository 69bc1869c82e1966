"""LoRA: W + s·B A, s = alpha/rank (alpha/√rank with rslora)."""

from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive, Probability, Whole
from peftfn.core.method import Cases, Leaf, LowRank, Method, Padding, Peft, Product, names
from peftfn.core.rng import Rng
from peftfn.kernels.lora_linear import lora_linear


@dataclass(frozen=True)
class LoRA(Method):
    """W + s·B A, with A [rank, in] and B [out, rank]; s = alpha/rank, or alpha/√rank with rslora.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685;
    rslora: Kalajdzievski, 2023, arXiv:2312.03732.

    Trains rank·(in + out) numbers. For: the first thing to try; every tool reads it.

    Args:
        rank: inner dimension of the product; one above min(out, in) is legal, and buys nothing.
        alpha: numerator of the scale; None means rank, so s = 1.
        rslora: divide by √rank instead of rank.
        dropout: probability of dropping an input feature of A in train mode; embeddings have no features to drop.
        lora_bias: B has a bias β [out] too, which adds s·β to the output.
        init_weights: "default" (A Kaiming-uniform, B zero), "gaussian" (A normal with std 1/rank, B zero), or
            "random" (both Kaiming-uniform: not the identity, for tests).
    """

    cases: ClassVar[Cases] = (
        {"rank": 2, "alpha": 3.0},
        {"rank": 3, "alpha": 2.0, "rslora": True, "init_weights": "gaussian"},
        {"rank": 2, "lora_bias": True, "init_weights": "random"},
    )

    peft = Peft(
        "LORA",
        names("a=lora_A.weight b=lora_B.weight beta=lora_B.bias"),
        names("rank=r alpha=lora_alpha rslora=use_rslora dropout=lora_dropout lora_bias"),
    )

    padding: ClassVar[Padding | None] = Padding(gain=("b", "beta"))

    rank: Whole = 8
    alpha: Positive | None = None
    rslora: bool = False
    dropout: Probability = 0.0
    lora_bias: bool = False
    init_weights: Literal["default", "gaussian", "random"] = "default"

    @property
    def scale(self) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (sqrt(self.rank) if self.rslora else self.rank)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        out, in_ = w.shape
        gaussian = self.init_weights == "gaussian"
        a = rng.normal(self.rank, in_, std=1 / self.rank) if gaussian else rng.kaiming(self.rank, in_)
        b = rng.zeros(out, self.rank) if self.identity else rng.kaiming(out, self.rank)
        return {"a": a, "b": b} | ({"beta": rng.zeros(out)} if self.lora_bias else {})

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self.scale * (p["b"] @ p["a"])

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        if "beta" not in p:
            return b
        return self.scale * p["beta"] if b is None else b + self.scale * p["beta"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) + F.linear(self.scale * dot(self.dropped(x), p["a"]), p["b"])

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return lora_linear(x, w, p["a"], p["b"], self.scale, dropout=self.dropout)

    def low_rank(self, p: Leaf) -> LowRank | None:
        return LowRank(p["a"], p["b"], self.scale, dropout=self.dropout)

    def to_peft(self) -> dict[str, Any]:
        return super().to_peft() | {"lora_alpha": self.rank if self.alpha is None else self.alpha}

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        return {k: v if k == "a" else s * v for k, v in p.items()}

    def summed(self, ps: list[Leaf]) -> Leaf | None:
        out = {"a": torch.cat([p["a"] for p in ps], -2), "b": torch.cat([p["b"] for p in ps], -1)}
        return out | ({"beta": torch.stack([p["beta"] for p in ps]).sum(0)} if self.lora_bias else {})
