"""DoRA: m ⊙ (W + s·B A) / ‖W + s·B A‖, the norm over each row."""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.method import Leaf, Product
from peftfn.methods.lora import LoRA
from peftfn.rng import Rng


@dataclass(frozen=True)
class DoRA(LoRA):
    """m ⊙ (W + s·B A) / n, with n = ‖W + s·B A‖ row by row [out] and a trained magnitude m [out].

    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv:2402.09353. The norm is a constant for the
    gradient, as in the paper's section 4.3 and in PEFT, unless `attached`.

    c = m/n depends on parameters alone: `net.prepare` computes it once for many calls.

    Args:
        rank, alpha, rslora, dropout, init_weights: as for `LoRA`.
        attached: let the gradient flow through the norm as well.
    """

    cases: ClassVar = (
        {"rank": 2, "alpha": 3.0},
        {"rank": 3, "rslora": True, "attached": True, "init_weights": "random"},
    )

    peft = replace(
        LoRA.peft, keys={**LoRA.peft.keys, "m": "lora_magnitude_vector"}, fixed={"use_dora": True}
    )  # checkpoints name the magnitude without ".weight"

    attached: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_bias:
            raise ValueError(
                "DoRA.lora_bias is True; DoRA scales rows of the weight and has no bias of its own: leave it False"
            )

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        leaf = super().init(rng, w)
        return leaf | {"m": self._norm(leaf, w.to(rng.dtype))}

    def _norm(self, p: Leaf, w: Tensor) -> Tensor:
        if w.dtype == p["b"].dtype:
            return torch.linalg.vector_norm(torch.addmm(w, p["b"], p["a"], alpha=self.scale), dim=1)
        return torch.linalg.vector_norm(w + LoRA.delta(self, p, w), dim=1)

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        with nullcontext() if self.attached else torch.no_grad():
            n = self._norm(p, w)
        n = n if self.attached else n.detach()  # no_grad does not stop forward-mode derivatives
        return {"a": p["a"], "b": p["b"], "c": p["m"] / n}

    @property
    def exact_gradient(self) -> bool:
        return self.attached

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["c"][:, None] * (w + super().delta(p, w)) - w

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return p["c"] * super().product(p, w, x, dot)

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return p["c"] * super().linear(p, w, x)

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        return None

    def summed(self, ps: list[Leaf]) -> Leaf | None:
        return None
