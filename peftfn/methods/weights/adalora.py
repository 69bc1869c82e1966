"""AdaLoRA: W + s·B diag(E) A, with the rank shared out among the sites in training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfn.core.fields import Positive, PositiveInt, Probability, Start
from peftfn.core.method import Leaf, Padding
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import Factored, lora_alpha
from peftfn.methods.parts.sites import Planned, sites_of


def _written(m: "AdaLoRA") -> dict[str, Any]:
    if m.total_steps is None:
        raise ValueError("AdaLoRA.total_steps is None, and PEFT loads none without: give the number of steps")
    return lora_alpha(m)


@dataclass(frozen=True)
class AdaLoRA(Factored):
    """W + s·B diag(E) A, with A [rank, in], E [rank], B [out, rank] and s = alpha/(rank + 1e-5) as in PEFT.

    Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, arXiv:2303.10512.
    In training, add `orthogonal`·`orthogonality(net, adapter)` to the loss, and after each step call `allocate`, which
    sets the entries of E to zero that matter least among all sites.

    Trainable parameters per site: rank·(in + out + 1). Use it to let training share out a budget of ranks among the
    layers.

    Args:
        rank: triplets of a site before any is taken away; values above min(out, in) are allowed.
        alpha: numerator of the scale; None means rank.
        dropout: probability of dropping an input feature of A in train mode.
        init_weights: "default" (A and B normal with std 0.02, E zero) or "random" (all normal: not the identity).
        target_rank: triplets that a site keeps in the end, on average; `allocate` refuses one above rank.
        warmup: steps before the first triplet goes.
        final: steps at the end in which the choice is fixed.
        interval: steps between two choices.
        total_steps: of the training; `allocate` needs it.
        beta1, beta2: decay per step of the averages of importance and of its uncertainty.
        orthogonal: weight of the penalty in the loss.

    Raises:
        ValueError: warmup and final leave no step between them.

    Example:
        from peftfn.methods.weights.adalora import orthogonality
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.AdaLoRA(rank=4, target_rank=2, total_steps=100)})
        adapter = net.init(seed=0)
        penalty = 0.5 * orthogonality(net, adapter)  # a term for the loss
    """

    cases = ({"rank": 3, "alpha": 2.0}, {"rank": 2, "init_weights": "random"})

    peft = Peft(
        "ADALORA",
        {"a": "lora_A", "b": "lora_B", "e": "lora_E"},
        {
            "rank": "init_r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "target_rank": "target_r",
            "warmup": "tinit",
            "final": "tfinal",
            "interval": "deltaT",
            "total_steps": "total_step",
            "beta1": "beta1",
            "beta2": "beta2",
            "orthogonal": "orth_reg_weight",
        },
        writes=_written,
        leaf_to=lambda m, p: m.peft.named(p | {"e": p["e"][..., None]}),
    )

    padding = Padding(scaled=("b",))
    outside = frozenset(["target_rank", "warmup", "final", "interval", "total_steps", "beta1", "beta2", "orthogonal"])

    rank: PositiveInt = 12
    alpha: Positive | None = None
    dropout: Probability = 0.0
    init_weights: Start = "default"
    target_rank: PositiveInt = 8
    warmup: int = 0
    final: int = 0
    interval: PositiveInt = 1
    total_steps: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonal: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 < beta < 1:
                raise ValueError(f"AdaLoRA.{name} is {beta}; it is the decay of an average: 0 < {name} < 1")
        if self.total_steps is not None and self.warmup >= self.total_steps - self.final:
            raise ValueError(
                f"AdaLoRA.warmup is {self.warmup} and final {self.final}, of {self.total_steps} steps: none is left to "
                "share out the rank in; lower one of them or raise total_steps"
            )

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / (self.rank + 1e-5)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), r, std = w.shape, self.rank, 0.02 if self.identity else 1.0
        e = rng.zeros(r) if self.identity else rng.normal(r)
        return {"a": rng.normal(r, in_, std=std), "b": rng.normal(out, r, std=std), "e": e}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        return {"down": p["a"], "up": p["b"] * p["e"]}


def orthogonality(net: Planned, adapter: Mapping[str, Leaf]) -> Tensor:
    """Mean of ‖A Aᵀ − I‖_F and ‖BᵀB − I‖_F over the net's AdaLoRA sites: a penalty for the loss, times `orthogonal`."""
    return torch.cat([off_orthogonal(adapter[site]).flatten() for site in sites_of(net, AdaLoRA)]).mean()


def off_orthogonal(p: Leaf) -> Tensor:
    """‖A Aᵀ − I‖_F and ‖BᵀB − I‖_F of a leaf, [2]; [2, e] of a stack."""
    grams = p["a"] @ p["a"].mT, p["b"].mT @ p["b"]
    off = [g - torch.eye(g.shape[-1], dtype=g.dtype, device=g.device) for g in grams]
    return torch.stack([torch.linalg.vector_norm(t, dim=(-2, -1)) for t in off])
