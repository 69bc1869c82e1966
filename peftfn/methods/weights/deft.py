"""DEFT: (I − P rightᵀ) W + s·P R, a subspace of the outputs removed and written anew."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive, PositiveInt, Probability, Start
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class DEFT(Weight):
    """W + left (s·R − rightᵀ W), with R [rank, in], and left, right [out, rank] made of one P [out, rank].

    "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models", NeurIPS 2025; without R it is PaRa, Chen
    et al., 2024, arXiv:2406.05641.

    Trainable parameters per site: rank·(in + out). Use it to remove a subspace and write it anew, as when an image
    model is personalised.

    Args:
        rank: dimension of the subspace, which has `out` at most: a larger rank is out, in P, R and s, as in PEFT.
        decomposition: "relu" (left = P, right = relu(P)) or "qr" (left = right = Q of P = Q·upper triangle).
        alpha: numerator of s = alpha/rank; None means s = 1.
        para: leave R out: the subspace is only removed. This is never the identity.
        dropout: probability of dropping an input feature of R in train mode.
        init_weights: "default" (P normal with std 0.02, R such that nothing changes) or "random" (R normal too).
        init_scale: R's std in units of 0.02 when random.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.DEFT(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"rank": 2, "alpha": 3.0},
        {"rank": 9, "decomposition": "qr"},
        {"rank": 2, "decomposition": "qr", "para": True},
        {"rank": 3, "init_weights": "random", "init_scale": 5.0},
    )

    peft = Peft(
        "DEFT",
        {"p": "deft_P", "r": "deft_R"},
        {
            "rank": "r",
            "decomposition": "decomposition_method",
            "alpha": "alpha",
            "para": "para",
            "dropout": "deft_dropout",
            "init_scale": "init_scale",
        },
    )

    rank: PositiveInt = 8
    decomposition: Literal["relu", "qr"] = "relu"
    alpha: Positive | None = None
    para: bool = False
    dropout: Probability = 0.0
    init_weights: Start = "default"
    init_scale: float = 1.0

    @property
    def identity(self) -> bool:
        return self.init_weights != "random" and not self.para

    def _scale(self, rank: int) -> float:
        return self.alpha / rank if self.alpha else 1.0

    def _sides(self, p: Tensor) -> tuple[Tensor, Tensor]:
        if self.decomposition == "relu":
            return p, p.relu()
        q = torch.linalg.qr(p).Q
        return q, q

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        rank = min(self.rank, w.shape[0])
        leaf = {"p": rng.normal(w.shape[0], rank, std=0.02)}
        if self.para:
            return leaf
        if not self.identity:
            return leaf | {"r": rng.normal(rank, w.shape[1], std=0.02 * self.init_scale)}
        right = self._sides(leaf["p"])[1]
        return leaf | {"r": (right.mT @ w.to(right.dtype)) / self._scale(rank)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        left, right = self._sides(p["p"])
        return {"left": left, "right": right} | ({} if self.para else {"sr": self._scale(len(p["r"])) * p["r"]})

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        removed = p["right"].mT @ w
        return p["left"] @ (-removed if self.para else p["sr"] - removed)

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        y = dot(x, w)
        change = -(y @ p["right"])
        if not self.para:
            change = dot(self.dropped(x), p["sr"]) + change
        return y + F.linear(change, p["left"])
