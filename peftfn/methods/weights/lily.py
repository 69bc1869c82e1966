"""Lily: W x + s·(Σ_e π_e B_e) A x, with experts B_e shared by all sites and weights π chosen by a router."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Start
from peftfn.core.method import Leaf, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class Lily(Weight):
    """W x + s·(Σ_e π_e B_e) h with h = A x and π = softmax(R h), averaged over the tokens: the dimension before last.

    Zhong et al., "Low-Rank Interconnected Adaptation across Layers", 2024, arXiv:2407.09946. π depends on the input,
    so there is no merge. PEFT averages π over the whole batch, so that there a row's output depends on the others.
    Each site has a router R [experts, rank]. A rule's sites, which must be of one shape, share B [experts, rank, out]
    and, in blocks of `stride` of them, A [rank, in].

    Trainable parameters per site: rank·in + experts·rank, and experts·rank·out shared. Use it for experts that layers
    of one shape share.

    Args:
        rank: inner dimension; values above min(out, in) are allowed, and only make the router wider.
        experts: number of B_e, at least 2.
        stride: how many consecutive sites share one A; 1: each has its own.
        scale: s.
        init_weights: "default" (A and R Kaiming-uniform, B zero), or "random" (B too: not the identity).

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        net = pf.adapt(model, {"weight": pf.Lily(rank=4, experts=3)})  # one rule: its sites share the experts
        y = net.apply(net.init(seed=0), torch.ones(2, 5, 8))
    """

    kinds = frozenset({"linear"})
    mergeable = False
    cases = (
        {"rank": 2, "experts": 3},
        {"rank": 3, "stride": 2, "scale": 0.5, "init_weights": "random"},
    )

    peft = Peft(
        "LILY",
        {"a": "lily_A.weight", "as": "lily_A.weight", "b": "lily_B.weight", "r": "lily_router.weight"},
        {"rank": "r", "experts": "num_B", "stride": "stride_A", "scale": "scaling"},
        per_target=True,
        rows={"as": "block"},
        leaf_to=lambda m, p: m.peft.named({"a": m.down(p), "b": p["b"].flatten(0, 1), "r": p["r"]}),
    )

    rank: PositiveInt = 32
    experts: PositiveInt = 2
    stride: PositiveInt = 1
    scale: float = 1.0
    init_weights: Start = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 2:
            raise ValueError(f"Lily.experts is {self.experts}; a router needs a choice: give experts >= 2")

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        if self.stride == 1:
            return {}
        return {n: {"block": torch.tensor([k // self.stride], device=rng.device)} for k, n in enumerate(weights)}

    def bank(self, rng: Rng, weights: Mapping[str, Tensor]) -> Leaf:
        shapes = {tuple(w.shape) for w in weights.values()}
        if len(shapes) > 1:
            raise ValueError(f"Lily shares B among a rule's sites, and theirs are {sorted(shapes)}: one rule a shape")
        ((out, in_),), e, r = shapes, self.experts, self.rank
        b = {"b": rng.zeros(e, r, out) if self.identity else rng.uniform(e, r, out, bound=out**-0.5)}
        blocks = -(-len(weights) // self.stride)
        return b if self.stride == 1 else b | {"as": rng.uniform(blocks, r, in_, bound=in_**-0.5)}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        own = {"a": rng.kaiming(self.rank, w.shape[1])} if self.stride == 1 else {}
        return own | {"r": rng.kaiming(self.experts, self.rank)}

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        h = F.linear(x, self.down(p))
        weights = torch.softmax(F.linear(h, p["r"]), -1)
        if x.dim() > 1:
            weights = weights.mean(-2)
        b = (weights @ p["b"].flatten(1)).reshape(*weights.shape[:-1], *p["b"].shape[1:])  # [..., rank, out]
        return F.linear(x, w) + self.scale * (h @ b)

    def down(self, p: Leaf) -> Tensor:
        return p["a"] if self.stride == 1 else p["as"].index_select(0, p["block"]).squeeze(0)
