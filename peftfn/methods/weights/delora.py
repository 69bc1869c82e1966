"""DeLoRA: W + (λ/rank) Σ_i b_i a_iᵀ / (‖b_i‖ ‖a_i‖) · diag(‖W‖ by columns), a change of bounded norm."""

from dataclasses import dataclass

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, Probability, Start
from peftfn.core.method import Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import Factored


@dataclass(frozen=True)
class DeLoRA(Factored):
    """W + (λ/rank) Σ_i b_i a_iᵀ / (‖b_i‖ ‖a_i‖) diag(n), with a_i the rows of A [rank, in], b_i the columns of B
    [out, rank], a trained λ [1], and the frozen norms n [in] of W's columns.

    Bini, Girrbach and Akata, "DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation", 2025, arXiv:2503.18225.
    Norms below 1e-4 count as 1e-4.

    Trainable parameters per site: rank·(in + out) + 1. Use it with large learning rates, since the size of the change
    is bounded.

    Args:
        rank: inner dimension of the product; values above min(out, in) are allowed: Σ_i has more terms.
        strength: λ starts with it; it bounds the change in units of the columns' norms.
        dropout: probability of dropping an input feature of A in train mode.
        init_weights: "default" (A Kaiming-uniform, B zero), or "random" (both Kaiming-uniform: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.DeLoRA(rank=4, strength=2.0)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = ({"rank": 2, "strength": 1.5}, {"rank": 3, "strength": 0.5, "init_weights": "random"})

    peft = Peft(
        "DELORA",
        {"a": "delora_A", "b": "delora_B", "l": "delora_lambda", "n": "delora_w_norm"},
        {"rank": "r", "strength": "delora_lambda", "dropout": "module_dropout"},
    )

    rank: PositiveInt = 8
    strength: float = 15.0
    dropout: Probability = 0.0
    init_weights: Start = "default"

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        return {"n": torch.linalg.vector_norm(w.to(torch.promote_types(w.dtype, rng.dtype)), dim=0)}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), r = w.shape, self.rank
        b = rng.zeros(out, r) if self.identity else rng.kaiming(out, r)
        return {"a": rng.kaiming(r, in_), "b": b, "l": rng.full(1, value=self.strength)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        def unit(t: Tensor, dim: int) -> Tensor:  # the square root stays differentiable where t is zero
            return t / t.square().sum(dim, keepdim=True).clamp(min=1e-8).sqrt()

        return {"down": unit(p["a"], 1) * p["n"], "up": p["l"] / self.rank * unit(p["b"], 0)}
