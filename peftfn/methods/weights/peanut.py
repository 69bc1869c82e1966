"""PEANuT: W + s·f(Wᵀ)ᵀ, where f is a small network that reads the weight itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Start, choice
from peftfn.core.method import Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import Factored

_DEPTHS = 64
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "mish": F.mish,
    "linear": torch.Tensor.clone,
}


@dataclass(frozen=True)
class PEANuT(Factored):
    """W + s·B f(W), where f's columns z [rank] are made of W's: z₀ = σ(A w), `depth` encoders z_i = σ(E_i z_{i−1}), as
    many decoders z ← σ(D_i z) + z_{depth−i}.

    Zhong et al., "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", 2024, arXiv:2410.01870.
    A [rank, out], E_i and D_i [rank, rank], B [out, rank]. f(W) [rank, in] depends on parameters alone, so that what a
    call computes is a LoRA of this rank.

    Trainable parameters per site: 2·rank·out + 2·depth·rank². Use it for changes that depend on the weight in a way
    that is not linear.

    Args:
        rank: width of the network.
        depth: number of encoders, and of decoders, at most 64.
        activation: σ; one of relu, gelu, silu, tanh, sigmoid, leaky_relu, mish, linear.
        scale: s.
        init_weights: "default" (Kaiming-uniform, B zero), or "random" (B too: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.PEANuT(rank=4, depth=1, activation="tanh")})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"rank": 3, "activation": "tanh"},
        {"rank": 2, "depth": 2, "activation": "gelu", "scale": 0.5, "init_weights": "random"},
    )

    peft = Peft(
        "PEANUT",
        keys={"a": "peanut_A.weight", "b": "peanut_B.weight"}
        | {f"e{i}": f"peanut_encoders.{i}.weight" for i in range(_DEPTHS)}
        | {f"d{i}": f"peanut_decoders.{i}.weight" for i in range(_DEPTHS)},
        fields={"rank": "r", "depth": "depth", "activation": "act_fn", "scale": "scaling"},
    )

    rank: PositiveInt = 32
    depth: int = 0
    activation: str = "relu"
    scale: float = 1.0
    init_weights: Start = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        choice(self, "activation", tuple(_ACTIVATIONS))
        if not 0 <= self.depth <= _DEPTHS:
            raise ValueError(f"PEANuT.depth is {self.depth}; give 0 <= depth <= {_DEPTHS}")

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        out, r = w.shape[0], self.rank
        leaf = {"a": rng.kaiming(r, out)} | {f"{c}{i}": rng.kaiming(r, r) for c in "ed" for i in range(self.depth)}
        return leaf | {"b": rng.zeros(out, r) if self.identity else rng.kaiming(out, r)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        act = _ACTIVATIONS[self.activation]
        z, kept = act(p["a"] @ w.to(p["a"].dtype)), []  # [rank, in]
        for i in range(self.depth):
            kept.append(z)
            z = act(p[f"e{i}"] @ z)
        for i in range(self.depth):
            z = act(p[f"d{i}"] @ z) + kept[-1 - i]
        return {"down": z, "up": p["b"]}
