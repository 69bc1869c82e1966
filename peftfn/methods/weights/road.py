"""RoAd: R (W x + b), R rotating and scaling pairs of output features."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, Start, divides
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class RoAd(Weight):
    """c₁ ⊙ h + c₂ ⊙ h', h = W x + b, c₁ = α cos θ, c₂ = α sin θ, where h' has [−h₂, h₁] for each group [h₁, h₂] of h.

    Liao et al., "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", 2024,
    arXiv:2409.00119. The bias is rotated too.

    Trainable parameters per site: out. Use it in mixed batches of very many tenants, and for changes that compose.

    Args:
        variant: 1: one angle θ and scale α a pair of features, [out/2] each; 2: one a feature, [out]; 4: one for c₁
            and one for c₂ a feature, [2·out].
        group_size: features in a group, whose two halves make the pairs; even, and a divisor of out.
        init_weights: "default" (θ 0, α 1) or "random" (θ and α around these with std 0.5: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.RoAd(group_size=6)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"group_size": 6},
        {"variant": 2, "group_size": 2},
        {"variant": 4, "group_size": 2, "init_weights": "random"},
    )

    peft = Peft(
        "ROAD",
        {"theta": "road_theta", "alpha": "road_alpha"},
        {"variant": "variant", "group_size": "group_size"},
        {"variant": [(v, f"road_{v}") for v in (1, 2, 4)]},
    )

    variant: Literal[1, 2, 4] = 1
    group_size: PositiveInt = 64
    init_weights: Start = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size % 2:
            raise ValueError(f"RoAd.group_size is {self.group_size}; features are turned in pairs: give an even number")

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        divides(self, "group_size", self.group_size, out=w.shape[0])
        size, std = w.shape[0] * self.variant // 2, 0.0 if self.identity else 0.5
        return {"theta": rng.normal(size, std=std), "alpha": rng.ones(size) + rng.normal(size, std=std)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        # a group a row: [groups, group_size/2] for variant 1, [groups, group_size] for 2, twice that for 4
        theta, alpha = (t.unflatten(-1, (w.shape[0] // self.group_size, -1)) for t in (p["theta"], p["alpha"]))
        c1, c2 = alpha * theta.cos(), alpha * theta.sin()
        if self.variant == 4:
            c1, c2 = c1[:, : self.group_size], c2[:, self.group_size :]
        (a, b), half = (c2, c2) if self.variant == 1 else c2.chunk(2, -1), self.group_size // 2
        c1 = torch.cat([c1, c1], -1) if c1.shape[-1] == half else c1
        return {"c1": c1.flatten(), "c2": torch.cat([-a, b], -1).flatten()}

    def _turn(self, h: Tensor, p: Leaf) -> Tensor:
        swapped = h.unflatten(-1, (-1, self.group_size)).roll(self.group_size // 2, -1).flatten(-2)
        return torch.addcmul(h * p["c1"], swapped, p["c2"])

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self._turn(w.mT, p).mT - w

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        return b if b is None else self._turn(b, p)

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return self._turn(dot(x, w), p)
