"""RandLoRA: W + s·Σ_j B_j diag(λ_j) A diag(γ_j), with random A and B_j frozen: a change of full rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, Probability
from peftfn.core.method import Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import Factored
from peftfn.tensors.remat import recomputed


def _read(fields: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    very, sparse = config.get("very_sparse"), config.get("sparse")
    return fields | {"density": "very_sparse" if very else "sparse" if sparse else "dense"}


@dataclass(frozen=True)
class RandLoRA(Factored):
    """W + s·Σ_j B_j diag(λ_j) A diag(γ_j) for j < n = ⌈min(out, in)/rank⌉ and s = alpha/rank; transposed if out < in.

    Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", 2025, arXiv:2502.00987.
    Trained: λ [rank, n], γ [n, min]. Frozen and shared by a rule's sites, cut to each one's size: A [rank, 1, min_max],
    B [max_max, n_max, rank], drawn in bfloat16 as PEFT draws them. The columns of all B_j are paired with the rows of
    A in PEFT's order, a fixed permutation of the sum's (the B_j are random, so nothing else changes).

    Trainable parameters per site: rank·n + n·min(in, out) with n = min(in, out)/rank. Use it for full rank from few
    parameters, at the cost of dense work each call.

    Args:
        rank: of each term; smaller means more terms, and more trained numbers; from min(out, in) on there is one.
        alpha: numerator of the scale.
        projection_seed: of A and B (PEFT's projection_prng_key).
        density: "dense" (uniform entries), "sparse" (0, or ±1 with probability 1/6 each), "very_sparse" (±1 with
            probability 1/(2√min_max)); all divided by their standard deviation.
        dropout: probability of dropping an input feature in train mode.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.RandLoRA(rank=2, alpha=40)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"rank": 2, "alpha": 20.0},
        {"rank": 4, "alpha": 20.0, "density": "sparse", "projection_seed": 3},
        {"rank": 3, "alpha": 20.0, "density": "very_sparse"},
    )

    peft = Peft(
        "RANDLORA",
        {"l": "randlora_lambda", "g": "randlora_gamma"},
        {
            "rank": "r",
            "alpha": "randlora_alpha",
            "projection_seed": "projection_prng_key",
            "dropout": "randlora_dropout",
        },
        shared={"A": "randlora_A", "B": "randlora_B"},
        reads=_read,
        writes=lambda m: {"sparse": m.density == "sparse", "very_sparse": m.density == "very_sparse"},
    )

    rank: PositiveInt = 32
    alpha: float = 640
    projection_seed: int = 0
    density: Literal["dense", "sparse", "very_sparse"] = "dense"
    dropout: Probability = 0.0

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        out, in_ = (max(w.shape[i] for w in weights.values()) for i in (-2, -1))
        low, high, r, draw = min(out, in_), max(out, in_), self.rank, rng.reseeded(self.projection_seed)
        n = ceil(low / r)
        if rng.meta:
            a, b = rng.empty(r, 1, low), rng.empty(high, n, r)
        elif self.density == "dense":

            def uniform(*shape: int) -> Tensor:
                bound = 1 / sqrt(shape[1] * shape[2])
                return torch.empty(shape, dtype=torch.bfloat16).uniform_(-bound, bound, generator=draw.generator)

            a, b = uniform(r, 1, low), torch.cat([uniform(high, 1, r) for _ in range(n)], 1)
        else:
            edge = 1 / (2 * (3 if self.density == "sparse" else sqrt(low)))
            a, b = (torch.rand(s, generator=draw.generator) for s in ((r, 1, low), (high, n, r)))
            a, b = ((u > 1 - edge).float() - (u < edge).float() for u in (a, b))
        both = {}
        for name, t in (("A", a), ("B", b)):
            if not t.is_meta and (t.numel() < 2 or not t.std() > 0):
                raise ValueError(
                    f"{next(iter(weights))}: RandLoRA.rank is {r} and density {self.density!r}: the {t.numel()} "
                    f"numbers drawn for {name} are all alike. Give a larger rank or another density or projection_seed"
                )
            both[name] = (t if t.is_meta else t / t.std()).to(rng.device, rng.dtype)
        return dict.fromkeys(weights, both)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        n, low = ceil(min(w.shape) / self.rank), min(w.shape)
        return {"l": rng.zeros(self.rank, n), "g": rng.full(n, low, value=1 / max(n, low))}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        n, low = p["g"].shape
        small = recomputed(self._small, p["l"], p["A"], p["g"], pull=self._small_pulled)
        large = p["B"][: max(w.shape), :n].flatten(1)  # [max, n·rank]
        return {"down": small, "up": large} if low == w.shape[1] else {"down": large.mT, "up": small.mT}

    def _small(self, lam: Tensor, a: Tensor, g: Tensor) -> Tensor:
        """diag(λ_j) A diag(γ_j) for all j, [rank·n, min]."""
        scaled = self.alpha / self.rank * lam
        return (scaled[:, :, None] * a[:, :, : g.shape[1]] * g).flatten(0, 1)

    def _small_pulled(self, d: Tensor, lam: Tensor, a: Tensor, g: Tensor) -> tuple[Tensor, None, Tensor]:
        """The gradients of λ, A (a constant) and γ, of that of `_small`."""
        t = self.alpha / self.rank * d.unflatten(0, lam.shape) * a[:, :, : g.shape[1]]  # [rank, n, min]
        return (t * g).sum(-1), None, (t * lam[:, :, None]).sum(0)
