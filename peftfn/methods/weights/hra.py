"""HRA: W H, H = Π (I − 2 û_i û_iᵀ) a product of Householder reflections."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Start, at_most
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.sites import Planned, sites_of


@dataclass(frozen=True)
class HRA(Weight):
    """W H, H = Π_i (I − 2 û_i û_iᵀ) with û_i the normalised columns of u [in, rank], leftmost first.

    Yuan et al., "Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
    2024, arXiv:2405.17484. Computed as H = I − Û T Ûᵀ with T⁻¹ = ½I + the upper triangle of ÛᵀÛ, so nothing of size
    [in, in] is made. The identity start has every column twice, which takes an even rank.

    Trainable parameters per site: rank·in. Use it for rotations at the price of a LoRA.

    Args:
        rank: number of reflections. Values above `in` are allowed unless `orthogonal`.
        orthogonal: Gram-Schmidt first, so that H = I − 2ÛÛᵀ (PEFT's apply_GS). This is never the identity.
        init_weights: "default" (each Kaiming-uniform column twice, if that is the identity) or "random".

    Raises:
        ValueError: orthogonal, and a rank above in.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.HRA(rank=4)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"rank": 4},
        {"rank": 2, "orthogonal": True},
        {"rank": 3},
        {"rank": 2, "init_weights": "random"},
    )

    peft = Peft("HRA", {"u": "hra_u"}, {"rank": "r", "orthogonal": "apply_GS"})

    rank: PositiveInt = 8
    orthogonal: bool = False
    init_weights: Start = "default"

    @property
    def identity(self) -> bool:
        return self.rank % 2 == 0 and not self.orthogonal and self.init_weights == "default"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        in_ = w.shape[1]
        if self.orthogonal:  # of more columns, Gram-Schmidt leaves zeros
            at_most(self, "rank", **{"in": in_})
        if not self.identity:
            return {"u": rng.kaiming(in_, self.rank)}
        return {"u": rng.kaiming(in_, self.rank // 2).repeat_interleave(2, 1)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        v = p["u"] / torch.linalg.vector_norm(p["u"], dim=0)
        if self.orthogonal:
            v = torch.linalg.qr(v).Q
            return {"v": v, "t": 2 * v.mT}
        half = torch.eye(self.rank, dtype=v.dtype, device=v.device) / 2
        return {"v": v, "t": torch.linalg.solve_triangular((v.mT @ v).triu(1) + half, v.mT, upper=True)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:  # H = I − v t, v [in, rank], t [rank, in]
        return -(w @ p["v"]) @ p["t"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) - F.linear(dot(x, p["t"]), w @ p["v"])

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return F.linear(x - F.linear(F.linear(x, p["t"]), p["v"]), w)


def orthogonality(net: Planned, adapter: Mapping[str, Leaf]) -> Tensor:
    """Σ ‖ÛᵀÛ − I‖_F² over the net's HRA sites, Û being the normalised columns: the paper's term for the loss, which it
    weighs by λ. At 0 the reflections commute."""
    return torch.stack([_off(adapter[site]["u"]) for site in sites_of(net, HRA)]).sum()


def _off(u: Tensor) -> Tensor:
    v = u / torch.linalg.vector_norm(u, dim=-2, keepdim=True)
    return (v.mT @ v - torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)).square().sum()
