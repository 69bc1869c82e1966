"""MiSS: W + [mᵀ mᵀ … mᵀ], one block repeated along the input: x is summed over its blocks, then meets m."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Probability, Start, at_most, divides
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


def _read(fields: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    given, columns = config.get("init_weights", True), config.get("mini_r", 1)
    mini = columns if given == "mini" else None
    return fields | {"mini": mini, "init_weights": "default" if given else "random"}


def _written(m: "MiSS") -> dict[str, Any]:
    return {"init_weights": m.identity} if m.mini is None else {"init_weights": "mini", "mini_r": m.mini}


@dataclass(frozen=True)
class MiSS(Weight):
    """W + mᵀE, with m [rank, out] trained and E [rank, in] = [I I … I], its last block cut where rank ∤ in.

    With mini = c, m is [rank, c] and repeated out/c times. Kang & Yin, "MiSS: Revisiting the Trade-off in LoRA with an
    Efficient Shard-Sharing Structure", 2024, arXiv:2409.15371.

    Trainable parameters per site: rank·out. Use it for a quick start, with one product less than LoRA.

    Args:
        rank: features in a block of the input; at most in.
        mini: columns of m, which must divide out; None means out.
        dropout: probability of dropping an input feature of m in train mode; embeddings have no features to drop.
        init_weights: "default" (zero) or "random" (Kaiming-uniform: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.MiSS(rank=4)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    linear_in = ("m",)
    cases = (
        {"rank": 2},
        {"rank": 3, "init_weights": "random"},
        {"rank": 5, "mini": 3},
    )

    peft = Peft("MISS", {"m": "miss_block"}, {"rank": "r", "dropout": "miss_dropout"}, reads=_read, writes=_written)

    rank: PositiveInt = 64
    mini: PositiveInt | None = None
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
