"""LoRA: W + s·B A, s = alpha/rank (alpha/√rank with rslora)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.method import Cases, Leaf, Padding
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import LORA, Init, Ranked, fresh


@dataclass(frozen=True)
class LoRA(Ranked):
    """W + s·B A, with A [rank, in] and B [out, rank]; s = alpha/rank, or alpha/√rank with rslora.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685;
    rslora: Kalajdzievski, 2023, arXiv:2312.03732.

    Trainable parameters per site: rank·(in + out). Use it as the default; every tool reads it.

    Args:
        rank: inner dimension of the product; values above min(out, in) are allowed but have no effect on
            expressiveness.
        alpha: numerator of the scale; None means rank, so s = 1. With 0, which files may have, it changes nothing.
        rslora: divide by √rank instead of rank.
        dropout: probability of dropping an input feature of A in train mode; embeddings have no features to drop.
        lora_bias: B has a bias β [out] too, which adds s·β to the output.
        init_weights: "default" (A Kaiming-uniform, B zero), "gaussian" (A normal with std 1/rank, B zero), or
            "random" (both Kaiming-uniform: not the identity, for tests).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.LoRA(rank=4, alpha=8)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases: ClassVar[Cases] = (
        {"rank": 2, "alpha": 3.0},
        {"rank": 3, "alpha": 2.0, "rslora": True, "init_weights": "gaussian"},
        {"rank": 2, "lora_bias": True, "init_weights": "random"},
    )

    peft = replace(LORA, keys={**LORA.keys, "beta": "lora_B.bias"}, fields={**LORA.fields, "lora_bias": "lora_bias"})
    padding = Padding(scaled=("b", "beta"))
    factors = ("a", "b")

    alpha: float | None = None  # any number: files may have 0
    lora_bias: bool = False
    init_weights: Init = "default"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        leaf = fresh(rng, w, self.rank, self.init_weights)
        return leaf | ({"beta": rng.zeros(w.shape[0])} if self.lora_bias else {})

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        if "beta" not in p:
            return b
        return self.scale * p["beta"] if b is None else b + self.scale * p["beta"]

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        return p | {k: s * p[k] for k in ("b", "beta") if k in p}

    def summed(self, ps: list[Leaf]) -> Leaf | None:
        out = self.side_by_side(ps)
        return out | ({"beta": torch.stack([p["beta"] for p in ps]).sum(0)} if self.lora_bias else {})
