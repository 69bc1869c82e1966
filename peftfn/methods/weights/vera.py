"""VeRA: W + diag(λ_b) B diag(λ_d) A, with random A and B frozen and shared by all sites."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Probability
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class VeRA(Weight):
    """W + diag(λ_b) B[:out] diag(λ_d) A[:, :in], λ_d [rank] and λ_b [out]; A [rank, in_max], B [out_max, rank] frozen.

    Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", 2023, arXiv:2310.11454. All sites of a rule share
    one A and one B, as large as the largest of them, drawn from `projection_seed` as PEFT draws them.

    Trainable parameters per site: rank + out. Use it for small files at a large rank; a call costs as much as a LoRA of
    that rank.

    Args:
        rank: rows of A; cheap, since it costs rank + out trained numbers a site, so often above min(out, in).
        projection_seed: of A and B (PEFT's projection_prng_key).
        d_initial: value λ_d starts with; λ_b starts at zero.
        dropout: probability of dropping an input feature of A in train mode.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.VeRA(rank=16)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    scales_with = ("b",)
    cases = ({"rank": 3}, {"rank": 2, "projection_seed": 5, "d_initial": 1.0})

    peft = Peft(
        "VERA",
        {"b": "vera_lambda_b", "d": "vera_lambda_d"},
        {"rank": "r", "projection_seed": "projection_prng_key", "d_initial": "d_initial", "dropout": "vera_dropout"},
        shared={"A": "vera_A", "B": "vera_B"},
    )

    rank: PositiveInt = 256
    projection_seed: int = 0
    d_initial: float = 0.1
    dropout: Probability = 0.0

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        out, in_ = (max(w.shape[i] for w in weights.values()) for i in (-2, -1))
        draw = rng.reseeded(self.projection_seed)
        a = draw.uniform(self.rank, in_, bound=sqrt(6 / in_))
        b = draw.uniform(out, self.rank, bound=sqrt(6 / self.rank))
        return {site: {"A": a, "B": b} for site in weights}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"d": rng.full(self.rank, value=self.d_initial), "b": rng.zeros(w.shape[0])}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        out, in_ = w.shape
        return (p["b"][:, None] * p["B"][:out] * p["d"]) @ p["A"][:, :in_]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        out, in_ = w.shape
        z = F.linear(dot(self.dropped(x), p["A"][:, :in_]) * p["d"], p["B"][:out])
        return dot(x, w) + z * p["b"]
