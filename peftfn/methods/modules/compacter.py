"""Compacter: a bottleneck adapter whose matrices are sums of Kronecker products, of a rule that all sites share."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.fields import Positive, PositiveInt, divides
from peftfn.core.method import Cases, Leaf
from peftfn.core.rng import Rng
from peftfn.methods.modules.bottleneck import Bottleneck
from peftfn.model.place import Place


@dataclass(frozen=True)
class Compacter(Bottleneck):
    """y + s·U act(D h + c) + b as `Bottleneck`, Dᵀ = Σ_i S_i ⊗ (L_i R_i), i < n, Uᵀ alike, and one rule S [n, n, n].

    L_i [in/n, phm_rank] and R_i [phm_rank, out/n] are of the site; S is shared by all sites of the rule, and trained.

    Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", 2021, arXiv:2106.04647.

    Trainable parameters per site: phm_rank·(in + 2·rank + out) + rank + out, and n³ for all sites together. Use it
    where a bottleneck adapter should have few parameters.

    Args:
        rank: features between D and U.
        activation, of, source, scale, dropout, dim: as of `Bottleneck`.
        init_weights: "default" (U's R_i zero: the identity), or "random" (all Glorot-uniform, as in the paper's code).
        n: Kronecker products in a sum; it divides in, out and rank.
        phm_rank: rank of L_i R_i.
        spread: standard deviation of a fresh S.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
        net = pf.adapt(model, {"0|2": pf.Compacter(rank=4, n=2)})
        a = net.init(seed=0)
        assert a["Compacter"]["rule"].shape == (2, 2, 2)
    """

    cases: ClassVar[Cases] = (
        {"rank": 4, "n": 2, "spread": 0.5},
        {"rank": 2, "n": 2, "phm_rank": 2, "of": "input", "activation": "tanh", "dropout": 0.5, "scale": 0.5},
        {"rank": 2, "n": 2, "spread": 0.5, "init_weights": "random"},
    )

    n: PositiveInt = 4
    phm_rank: PositiveInt = 1
    spread: Positive = 0.01

    def bank(self, rng: Rng, weights: Mapping[str, Place]) -> Leaf:
        return {"rule": rng.normal(self.n, self.n, self.n, std=self.spread)}

    def init(self, rng: Rng, m: Place) -> Leaf:
        (out, size), r = self.sizes(m), self.rank
        divides(self, "n", self.n, rank=r, **{"features of h": size, "features of y": out})
        leaf = {"c": rng.zeros(r), "b": rng.zeros(out)}
        for name, a, b in (("down", size, r), ("up", r, out)):
            left, right = (self.n, a // self.n, self.phm_rank), (self.n, self.phm_rank, b // self.n)
            leaf[f"{name}_left"] = rng.uniform(*left, bound=sqrt(6 / (left[1] + left[2])))
            starts = name == "down" or self.init_weights == "random"
            glorot = sqrt(6 / (right[1] + right[2]))
            leaf[f"{name}_right"] = rng.uniform(*right, bound=glorot) if starts else rng.zeros(*right)
        return leaf

    def prepare(self, p: Leaf, m: Place) -> Leaf:
        down, up = (kronecker(p["rule"], p[f"{k}_left"] @ p[f"{k}_right"]).mT for k in ("down", "up"))
        return {"down": down, "c": p["c"], "up": up, "b": p["b"]}


def kronecker(s: Tensor, w: Tensor) -> Tensor:
    """Σ_i s_i ⊗ w_i of s [n, a, b] and w [n, c, d]: [a·c, b·d]."""
    return torch.einsum("iab,icd->acbd", s, w).flatten(-4, -3).flatten(-2, -1)
