"""GLoRA as LyCORIS has it: W + s·(W A₁ A₂ + B₁ B₂)."""

from dataclasses import dataclass
from math import sqrt

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive, PositiveInt
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class GLoRALycoris(Weight):
    """W + s·(W A₁ A₂ + B₁ B₂): a low-rank change before the layer's own weight and one beside it.

    The form that LyCORIS calls glora (Yeh et al., 2023, arXiv:2309.14859). A₁ [in, rank], A₂ [rank, in], B₁ [out,
    rank], B₂ [rank, in], s = alpha/rank. At a convolution A₁ A₂ mixes channels, not the window.

    Trainable parameters per site: 2·rank·in + rank·(in + out). Use it to read LyCORIS' checkpoints of this name.

    Args:
        rank: of both.
        alpha: numerator of s; None means rank.
        rslora: divide by √rank instead of rank.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.GLoRALycoris(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = ({"rank": 2, "alpha": 3.0}, {"rank": 3, "rslora": True})

    rank: PositiveInt = 4
    alpha: Positive | None = None
    rslora: bool = False

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / (sqrt(self.rank) if self.rslora else self.rank)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), r, site = w.shape, self.rank, rng.site
        channels = {"conv": 1, "conv_t": 0}
        c = site.shape[channels[site.kind]] if site is not None and site.kind in channels else in_
        return {"a1": rng.kaiming(c, r), "a2": rng.zeros(r, c), "b1": rng.kaiming(out, r), "b2": rng.zeros(r, in_)}

    def _before(self, p: Leaf, w: Tensor) -> Tensor:
        """W A₁ A₂, window by window."""
        by_channel = w.unflatten(1, (p["a1"].shape[0], -1)).mT  # [out, window, channels]
        return ((by_channel @ p["a1"]) @ p["a2"]).mT.flatten(1)

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self.scale * (self._before(p, w) + p["b1"] @ p["b2"])

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w + self.scale * self._before(p, w)) + F.linear(dot(x, p["b2"]), self.scale * p["b1"])

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        if p["a2"].shape[1] != w.shape[1]:
            return self.product(p, w, x, F.linear)
        moved = x + F.linear(F.linear(x, p["a2"]), self.scale * p["a1"])
        return F.linear(moved, w) + F.linear(F.linear(x, p["b2"]), self.scale * p["b1"])
