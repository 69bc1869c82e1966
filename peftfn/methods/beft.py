"""BEFT: W x + b + β, a change of the bias alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.method import Cases, Leaf, Method, Peft, Product, choice
from peftfn.rng import Rng


@dataclass(frozen=True)
class BEFT(Method):
    """W x + b + β with β [out], also at layers without a bias of their own (which then cannot be merged).

    Huang et al., "BEFT: Bias-Efficient Fine-Tuning of Language Models", 2025, arXiv:2509.15974: the biases of the
    value projections. Adding β to existing biases is also what `Full` does on the rule "bias".

    Args:
        init_weights: "default" (β zero) or "random" (β standard normal: not the identity).
    """

    cases: ClassVar[Cases] = ({}, {"init_weights": "random"})

    peft = Peft("BEFT", {"beta": "beft_bias"})

    init_weights: str = "default"

    def __post_init__(self) -> None:
        choice(self, "init_weights", ("default", "random"))

    @property
    def identity(self) -> bool:
        return self.init_weights != "random"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"beta": rng.zeros(w.shape[0]) if self.identity else rng.normal(w.shape[0])}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return torch.zeros_like(w)

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor:
        return p["beta"] if b is None else b + p["beta"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w)

    def scaled(self, p: Leaf, s: Tensor) -> Leaf:
        return {"beta": s * p["beta"]}

    def summed(self, ps: list[Leaf]) -> Leaf:
        return {"beta": torch.stack([p["beta"] for p in ps]).sum(0)}

    def to_peft_leaf(self, p: Leaf) -> Leaf:
        return {"beft_bias": p["beta"][None]}
