"""RoAd: R (W x + b), R rotating and scaling pairs of output features."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from peftfn.method import Cases, Leaf, Method, Peft, Product, choice, divides, positive
from peftfn.rng import Rng


@dataclass(frozen=True)
class RoAd(Method):
    """c₁ ⊙ h + c₂ ⊙ h', h = W x + b, c₁ = α cos θ, c₂ = α sin θ, where h' has [−h₂, h₁] for each group [h₁, h₂] of h.

    Liao et al., "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", 2024,
    arXiv:2409.00119. The bias is rotated too.

    Args:
        variant: 1: one angle θ and scale α a pair of features, [out/2] each; 2: one a feature, [out]; 4: one for c₁
            and one for c₂ a feature, [2·out].
        group_size: features in a group, whose two halves make the pairs; even, and a divisor of out.
        init_weights: "default" (θ 0, α 1) or "random" (θ and α around these with std 0.5: not the identity).
    """

    cases: ClassVar[Cases] = (
        {"group_size": 6},
        {"variant": 2, "group_size": 2},
        {"variant": 4, "group_size": 2, "init_weights": "random"},
    )

    peft = Peft("ROAD", {"theta": "road_theta", "alpha": "road_alpha"}, {"group_size": "group_size"})

    variant: int = 1
    group_size: int = 64
    init_weights: str = "default"

    def __post_init__(self) -> None:
        choice(self, "variant", (1, 2, 4))
        choice(self, "init_weights", ("default", "random"))
        positive(self, group_size=self.group_size)
        if self.group_size % 2:
            raise ValueError(f"RoAd.group_size is {self.group_size}; features are turned in pairs: give an even number")

    @property
    def identity(self) -> bool:
        return self.init_weights != "random"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        divides(self, "group_size", self.group_size, out=w.shape[0])
        size, std = w.shape[0] * self.variant // 2, 0.0 if self.identity else 0.5
        return {"theta": rng.normal(size, std=std), "alpha": rng.ones(size) + rng.normal(size, std=std)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        g, theta, alpha = self.group_size, p["theta"], p["alpha"]
        c1, c2 = alpha * theta.cos(), alpha * theta.sin()
        if self.variant == 1:
            c1, c2 = (c.unflatten(-1, (-1, 1, g // 2)).expand(-1, 2, -1).flatten() for c in (c1, c2))
        if self.variant == 4:
            c1, c2 = (c.unflatten(-1, (-1, 2, g))[:, i].flatten() for i, c in enumerate((c1, c2)))
        sign = torch.tensor([[-1.0], [1.0]], dtype=c2.dtype, device=c2.device)
        return {"c1": c1, "c2": (c2.unflatten(-1, (-1, 2, g // 2)) * sign).flatten()}

    def _turn(self, h: Tensor, p: Leaf) -> Tensor:
        swapped = h.unflatten(-1, (-1, 2, self.group_size // 2)).flip(-2).flatten(-3)
        return torch.addcmul(h * p["c1"], swapped, p["c2"])

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self._turn(w.mT, p).mT - w

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        return b if b is None else self._turn(b, p)

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return self._turn(dot(x, w), p)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        return cls(int(config.get("variant", "road_1")[-1]), config.get("group_size", 64))

    def to_peft(self) -> dict[str, Any]:
        return super().to_peft() | {"variant": f"road_{self.variant}"}
