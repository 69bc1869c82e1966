"""W + U D: what every method does whose change is a product of two thin matrices, however it comes by them."""

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.kernels.lora_linear import lora_linear
from peftfn.method import Leaf, Method, Product
from peftfn.transform import eager


class _LowRank(Method):
    """`prepare` gives down D [r, in] and up U [out, r]; everything else follows."""

    dropout: float = 0.0  # probability of dropping an input feature of D in train mode

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["up"] @ p["down"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        dropped = F.dropout(x, self.dropout) if self.dropout and x.is_floating_point() else x
        return dot(x, w) + F.linear(dot(dropped, p["down"]), p["up"])

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        if self.dropout or not eager(x) or w.dtype != x.dtype or p["down"].dtype != x.dtype:
            return self.product(p, w, x, F.linear)
        return lora_linear(x, w, p["down"], p["up"], 1.0)

    def scaled(self, p: Leaf, s: Tensor) -> Leaf:
        return p | {"up": s * p["up"]}

    def summed(self, ps: list[Leaf]) -> Leaf:
        down, up = torch.cat([p["down"] for p in ps], -2), torch.cat([p["up"] for p in ps], -1)
        return {"down": down, "up": up}
