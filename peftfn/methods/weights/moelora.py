"""MoELoRA: W x + s·Σ_k g_k(x) B_k A_k x, with a trained router g at each layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive, PositiveInt, Probability
from peftfn.core.method import Cases, Leaf, Weight
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class MoELoRA(Weight):
    """W x + s·Σ_k g_k(x) B_k A_k x, A_k [rank, in], B_k [out, rank], g = softmax over the `active` largest of G x,
    G [experts, in]; s = alpha/rank. With `shared_a`, there is one A for all experts: HydraLoRA.

    Liu et al., "When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications", 2023,
    arXiv:2310.18339; shared_a: Tian et al., "HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning",
    2024, arXiv:2404.19245, whose experts are all active.

    Trainable parameters per site: experts·(rank·(in + out) + in), or rank·in + experts·(rank·out + in) with shared_a.
    Use it for tasks that differ within one data set. The change depends on the input, so it cannot be merged.

    Args:
        rank: inner dimension of each expert.
        experts: how many.
        active: how many act on a token; None is all of them.
        alpha: numerator of s; None means rank, so s = 1.
        shared_a: one A for all experts.
        dropout: probability of dropping an input feature of A in train mode.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.MoELoRA(rank=2, experts=3, active=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    kinds: ClassVar = frozenset({"linear", "linear_t"})
    mergeable: ClassVar = False
    cases: ClassVar[Cases] = (
        {"rank": 2, "experts": 3, "active": 2, "alpha": 3.0},
        {"rank": 2, "experts": 2, "shared_a": True},
    )

    rank: PositiveInt = 8
    experts: PositiveInt = 4
    active: PositiveInt | None = None
    alpha: Positive | None = None
    shared_a: bool = False
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active is not None and self.active > self.experts:
            raise ValueError(f"MoELoRA: active={self.active} experts of {self.experts}; give at most {self.experts}")

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), n, r = w.shape, self.experts, self.rank
        a = rng.kaiming(r, in_) if self.shared_a else rng.kaiming(n * r, in_).view(n, r, in_)
        return {"a": a, "b": rng.zeros(n, out, r), "router": rng.kaiming(n, in_)}

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        scores = F.linear(x, p["router"])
        if self.active is not None and self.active < self.experts:
            largest, at = scores.topk(self.active, -1)
            scores = torch.full_like(scores, float("-inf")).scatter(-1, at, largest)
        g = torch.softmax(scores, -1)  # [..., n]
        down = F.linear(self.dropped(x), p["a"].reshape(-1, x.shape[-1]))  # [..., n·r], or [..., r]
        down = down[..., None, :] if self.shared_a else down.unflatten(-1, (self.experts, self.rank))
        mixed = (g[..., None] * down).flatten(-2)  # [..., n·r]
        s = 1.0 if self.alpha is None else self.alpha / self.rank
        return F.linear(x, w) + F.linear(s * mixed, p["b"].movedim(0, 1).flatten(1))
