"""MiSS: W + [mᵀ mᵀ … mᵀ], one block repeated along the input: x is summed over its blocks, then meets m."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Probability, Start, Whole, at_most, divides
from peftfn.core.method import Leaf, Method, Peft, Product, names
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class MiSS(Method):
    """W + mᵀE, with m [rank, out] trained and E [rank, in] = [I I … I], its last block cut where rank ∤ in.

    With mini = c, m is [rank, c] and repeated out/c times. Kang & Yin, "MiSS: Revisiting the Trade-off in LoRA with an
    Efficient Shard-Sharing Structure", 2024, arXiv:2409.15371.

    Trains rank·out numbers. For: quick starts: one product less than LoRA's.

    Args:
        rank: features in a block of the input; at most in.
        mini: columns of m, which must divide out; None means out.
        dropout: probability of dropping an input feature of m in train mode; embeddings have no features to drop.
        init_weights: "default" (zero) or "random" (Kaiming-uniform: not the identity).
    """

    linear_in = ("m",)
    cases = (
        {"rank": 2},
        {"rank": 3, "init_weights": "random"},
        {"rank": 5, "mini": 3},
    )

    peft = Peft("MISS", names("m=miss_block"), names("rank=r dropout=miss_dropout"))

    rank: Whole = 64
    mini: Whole | None = None
    dropout: Probability = 0.0
    init_weights: Start = "default"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        out, in_ = w.shape
        at_most(self, "rank", **{"in": in_})
        if self.mini is not None:
            divides(self, "mini", self.mini, out=out)
        return {"m": (rng.zeros if self.identity else rng.kaiming)(self.rank, self.mini or out)}

    def _repeated(self, m: Tensor, out: int) -> Tensor:
        return m if self.mini is None else m.repeat(*[1] * (m.dim() - 1), out // self.mini)

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        out, in_ = w.shape
        return self._repeated(p["m"], out).mT.repeat(1, -(-in_ // self.rank))[:, :in_]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        out, in_ = w.shape
        e = torch.eye(self.rank, dtype=w.dtype, device=w.device).repeat(1, -(-in_ // self.rank))[:, :in_]
        return dot(x, w) + self._repeated(dot(self.dropped(x), e) @ p["m"], out)

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        z, rest = self.dropped(x), -x.shape[-1] % self.rank
        z = F.pad(z, (0, rest)) if rest else z
        return F.linear(x, w) + self._repeated(z.unflatten(-1, (-1, self.rank)).sum(-2) @ p["m"], w.shape[0])

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self:
        given, columns = config.get("init_weights", True), config.get("mini_r", 1)
        mini = columns if given == "mini" else None
        return replace(super().from_peft(config), mini=mini, init_weights="default" if given else "random")

    def to_peft(self) -> dict[str, Any]:
        kind = {"init_weights": self.identity} if self.mini is None else {"init_weights": "mini", "mini_r": self.mini}
        return super().to_peft() | kind
