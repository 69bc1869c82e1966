"""W + s·U D: what every method does whose change is a product of two thin matrices, however it comes by them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Probability
from peftfn.core.method import Leaf, LowRank, Method, Product
from peftfn.kernels.lora_linear import lora_linear


class _LowRank(Method):
    """`prepare` gives down D [r, in] and up U [out, r]; everything else follows."""

    scale: float = 1.0  # s
    dropout: Probability = 0.0  # probability of dropping an input feature of D in train mode

    def drawn(self, p: Leaf) -> Leaf:
        """The factors of one product, for methods whose factors are random in train mode."""
        return p

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self.scale * (p["up"] @ p["down"])

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        p = self.drawn(p)
        return dot(x, w) + F.linear(self.scale * dot(self.dropped(x), p["down"]), p["up"])

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        p = self.drawn(p)
        return lora_linear(x, w, p["down"], p["up"], self.scale, dropout=self.dropout)

    def low_rank(self, p: Leaf) -> LowRank | None:
        fixed = type(self).drawn is _LowRank.drawn and type(self).linear is _LowRank.linear
        return LowRank(p["down"], p["up"], self.scale, dropout=self.dropout) if fixed else None

    def scaled(self, p: Leaf, s: Tensor) -> Leaf:
        return p | {"up": s * p["up"]}

    def summed(self, ps: list[Leaf]) -> Leaf:
        down, up = torch.cat([p["down"] for p in ps], -2), torch.cat([p["up"] for p in ps], -1)
        return {"down": down, "up": up}
