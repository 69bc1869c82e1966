"""PVeRA: VeRA whose hidden features are drawn from a normal distribution in train mode; its mean is what is merged."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Leaf, Product
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.weights.vera import VeRA


@dataclass(frozen=True)
class PVeRA(VeRA):
    """W x + λ_b ⊙ B z with z ~ N(μ, σ²) and [μ, log σ²] = λ_d ⊙ A x; without sampling z = μ, so that W's change is
    diag(λ_b) B diag(λ_d[:rank]) A[:rank].

    "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation", 2025, arXiv:2512.07703.
    λ_d [2·rank], λ_b [out]; frozen and shared by a rule's sites: A [2·rank, in_max], B [out_max, rank], drawn from
    `projection_seed` as PEFT draws them.

    Trainable parameters per site: 2·rank + out. Use it for a VeRA with uncertainty: samples differ from call to call.

    Args:
        rank, projection_seed, d_initial, dropout: as for `VeRA`.
        sample: "train" (in train mode), "always", or "never". The noise comes from torch's global generator.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.PVeRA(rank=4, sample="always")})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"rank": 3, "sample": "never"},
        {"rank": 2, "projection_seed": 5, "d_initial": 1.0, "sample": "never"},
    )

    peft = Peft(
        "PVERA",
        {"b": "pvera_lambda_b", "d": "pvera_lambda_d"},
        {
            "rank": "r",
            "projection_seed": "projection_prng_key",
            "d_initial": "d_initial",
            "dropout": "pvera_dropout",
            "sample": "sample_at_inference",
        },
        {"sample": [("train", False), ("always", True)]},
        shared={"A": "pvera_A", "B": "pvera_B"},
    )

    sample: Literal["train", "always", "never"] = "train"

    def eval(self) -> Self:
        return replace(super().eval(), sample="never") if self.sample == "train" else super().eval()

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        out, in_ = (max(w.shape[i] for w in weights.values()) for i in (-2, -1))
        draw = rng.reseeded(self.projection_seed)
        a = draw.uniform(2 * self.rank, in_, bound=sqrt(6 / in_))
        b = draw.uniform(out, self.rank, bound=sqrt(6 / self.rank))
        return {site: {"A": a, "B": b} for site in weights}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return super().init(rng, w) | {"d": rng.full(2 * self.rank, value=self.d_initial)}

    def _mean(self, p: Leaf) -> Leaf:
        return p | {"d": p["d"][: self.rank], "A": p["A"][: self.rank]}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return super().delta(self._mean(p), w)

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        if self.sample == "never":
            return super().product(self._mean(p), w, x, dot)
        out, in_ = w.shape
        mean, log = (dot(self.dropped(x), p["A"][:, :in_]) * p["d"]).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log).exp()
        return dot(x, w) + F.linear(z, p["B"][:out]) * p["b"]
