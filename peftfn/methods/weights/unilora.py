"""Uni-LoRA: W + B A, whose every entry is one of the few trained numbers of a vector θ that all sites share."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, Probability
from peftfn.core.method import MATRIX, Index, Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import Factored


@dataclass(frozen=True)
class UniLoRA(Factored):
    """W + B A with A = θ[i_A] ⊙ c[i_A] [rank, in], B = θ[i_B] ⊙ c[i_B] [out, rank], θ [length] and c = 1/√uses.

    Li et al., "Uni-LoRA: One Vector is All You Need", 2025, arXiv:2506.00799. The indices are a shuffled, balanced
    assignment of the entries of all A and B of a rule to those of θ (an isometry), the one PEFT draws; θ is all that is
    trained. A fresh adapter is small, not the identity: at θ = 0, the only start that would be, the gradient is zero.

    Trainable parameters per site: length for the whole rule. Use it for one vector per task: kilobytes for a whole
    model.

    Args:
        rank: inner dimension of the product; values above min(out, in) are allowed.
        length: of θ, the number of trained numbers of the whole rule.
        projection_seed: of the indices (PEFT's proj_seed).
        bound: θ starts as U(−bound, bound).
        dropout: probability of dropping an input feature of A in train mode.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.UniLoRA(rank=2, length=16)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    kinds = MATRIX - {"stack", "stack_t"}  # the experts of a stack would all get one and the same change
    cases = ({"rank": 2, "length": 9, "bound": 0.5}, {"rank": 3, "length": 64, "projection_seed": 3})

    peft = Peft(
        "UNILORA",
        {"ia": "unilora_indices_A", "ib": "unilora_indices_B", "ca": "unilora_scales_A", "cb": "unilora_scales_B"},
        {
            "rank": "r",
            "length": "theta_d_length",
            "projection_seed": "proj_seed",
            "bound": "init_theta_d_bound",
            "dropout": "unilora_dropout",
        },
        shared={"theta": "unilora_theta_d"},
    )

    rank: PositiveInt = 4
    length: PositiveInt = 256
    projection_seed: int = 42
    bound: float = 0.02
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.projection_seed < 0:
            raise ValueError(f"UniLoRA.projection_seed is {self.projection_seed}; numpy's seeds are >= 0: give one")

    @property
    def identity(self) -> bool:
        return False

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        shapes = [s for w in weights.values() for s in ((self.rank, w.shape[1]), (w.shape[0], self.rank))]
        if rng.meta:
            every = zip(weights, shapes[::2], shapes[1::2], strict=True)
            return {site: {**_empty("ia", "ca", a, rng), **_empty("ib", "cb", b, rng)} for site, a, b in every}
        import numpy

        total = sum(rows * columns for rows, columns in shapes)
        draw = numpy.random.default_rng(self.projection_seed)
        uses, rest = divmod(total, self.length)
        drawn = numpy.repeat(numpy.arange(self.length), uses)
        if rest:
            drawn = numpy.concatenate([drawn, draw.choice(self.length, size=rest, replace=False)])
        draw.shuffle(drawn)
        index = torch.as_tensor(drawn, dtype=torch.int64)
        scale = torch.bincount(index, minlength=self.length).float().rsqrt()[index]
        sizes = [rows * columns for rows, columns in shapes]
        i, c = (
            [t.view(s).to(rng.device) for t, s in zip(torch.split(whole, sizes), shapes, strict=True)]
            for whole in (index, scale.to(rng.dtype))
        )
        return {
            site: {"ia": i[2 * k], "ib": i[2 * k + 1], "ca": c[2 * k], "cb": c[2 * k + 1]}
            for k, site in enumerate(weights)
        }

    def indices(self, p: Leaf, w: Tensor) -> Mapping[str, Index]:
        return {k: Index(self.length) for k in ("ia", "ib")}

    def bank(self, rng: Rng, weights: Mapping[str, Tensor]) -> Leaf:
        return {"theta": rng.uniform(self.length, bound=self.bound)}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        def entries(i: Tensor, c: Tensor) -> Tensor:
            return p["theta"].index_select(0, i.flatten()).view(i.shape) * c

        return {"down": entries(p["ia"], p["ca"]), "up": entries(p["ib"], p["cb"])}


def _empty(index: str, scale: str, shape: tuple[int, int], rng: Rng) -> Leaf:
    c = rng.empty(*shape)
    return {index: torch.empty_like(c, dtype=torch.int64), scale: c}
