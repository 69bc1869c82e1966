"""TinyLoRA: W + B (Σ_i v_i P_i) A, with B A the truncated SVD of W and v a handful of numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, Probability, Start
from peftfn.core.method import Index, Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import Factored


@dataclass(frozen=True)
class TinyLoRA(Factored):
    """W + B (Σ_i v_i P_i) A with B = U√S [out, rank], A = √S Vᵀ [rank, in] of W's truncated SVD U S Vᵀ, random P
    [size, rank, rank] ~ N(0, 1/rank), all frozen; v [size] is all that is trained, one for a group of a rule's sites.

    Morris et al., "Learning to Reason in 13 Parameters", 2026, arXiv:2602.04118; LoRA-XS: arXiv:2405.17604.
    Site k of the rule draws P from projection_seed + k and uses row min(k // ⌊sites/groups⌋, groups − 1) of v.

    Trainable parameters per site: size for a whole group of sites. Use it for reinforcement learning with a handful of
    parameters.

    Args:
        rank: of the truncated SVD; min(out, in) where that is smaller.
        size: trained numbers a group.
        weight_tying: 0 is one group a site, 1 one group for all: groups = round(sites·(1 − weight_tying)), at least 1.
        projection_seed: of P.
        dropout: probability of dropping an input feature of A in train mode.
        init_weights: "default" (v is zero), or "random" (U(−v_bound, v_bound): not the identity).
        v_bound: of that.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.TinyLoRA(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"rank": 2, "size": 3},
        {"rank": 3, "size": 5, "weight_tying": 1.0, "init_weights": "random", "v_bound": 1.0},
    )

    peft = Peft(
        "TINYLORA",
        {"A": "tinylora_A", "B": "tinylora_B", "A_rows": "tinylora_A", "B_rows": "tinylora_B", "P": "tinylora_P"},
        {
            "rank": "r",
            "size": "u",
            "weight_tying": "weight_tying",
            "projection_seed": "projection_seed",
            "dropout": "tinylora_dropout",
            "v_bound": "init_v_bound",
        },
        shared={"v": "tinylora_v.*"},
    )

    rank: PositiveInt = 2
    size: PositiveInt = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    dropout: Probability = 0.0
    init_weights: Start = "default"
    v_bound: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(f"TinyLoRA.weight_tying is {self.weight_tying}; give 0 <= weight_tying <= 1")

    def _groups(self, sites: int) -> int:
        return max(1, round(sites * (1 - self.weight_tying)))

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        n = self._groups(len(weights))
        each, rank = max(1, len(weights) // n), {site: min(self.rank, *w.shape[-2:]) for site, w in weights.items()}
        return {
            site: {
                "P": rng.reseeded(self.projection_seed + k).normal(
                    self.size, rank[site], rank[site], std=1 / sqrt(rank[site])
                ),
                "group": torch.tensor(min(k // each, n - 1), device=rng.device),
            }
            for k, site in enumerate(weights)
        }

    def indices(self, p: Leaf, w: Tensor) -> Mapping[str, Index]:
        return {"group": Index(len(p["v"]))}

    def bank(self, rng: Rng, weights: Mapping[str, Tensor]) -> Leaf:
        n = self._groups(len(weights))
        return {"v": rng.zeros(n, self.size) if self.identity else rng.uniform(n, self.size, bound=self.v_bound)}

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        rows = rng.site is not None and rng.site.kind == "embedding"  # the SVD is that of the weight [vocab, dim]
        u, s, vh = torch.linalg.svd((w.mT if rows else w).to(torch.promote_types(w.dtype, rng.dtype)), False)
        root, end = s[: self.rank].sqrt(), "_rows" if rows else ""
        a, b = root[:, None] * vh[: self.rank], u[:, : self.rank] * root
        return {f"A{end}": a.contiguous(), f"B{end}": b.contiguous()}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        r = (p["v"].index_select(0, p["group"].view(1)) @ p["P"].flatten(1)).view(p["P"].shape[1:])
        if "A" in p:
            return {"down": p["A"], "up": p["B"] @ r}
        return {"down": p["B_rows"].mT, "up": (r @ p["A_rows"]).mT}
