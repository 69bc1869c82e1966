"""DiReFT: h + act(W h + b) Rᵀ, a low-rank edit that does not take away what is there."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Cases, Leaf
from peftfn.core.rng import Rng
from peftfn.methods.modules.bottleneck import ACTIVATIONS
from peftfn.methods.parts.reft import Activation, Intervention, orthonormal


@dataclass(frozen=True)
class DiReFT(Intervention):
    """h + act(W h + b) Rᵀ, h the output of a module, R [rank, d], W [rank, d], b [rank].

    `LoReFT` without the part that takes R h away: LoRA on hidden states. R has orthonormal rows, made of a trained
    matrix of its shape; with orthogonal=False it is that matrix itself. Tokens are chosen as `LoReFT` chooses them.

    Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, arXiv:2404.03592. In its code DiReFT has
    orthonormal rows, and what has none is called NoDiReFT.

    Trainable parameters per site: 2·rank·d + rank. Use it as the cheaper form of `LoReFT`.

    Args:
        rank: rows of R and W.
        first, last, tied, activation, dim: as of `LoReFT`.
        init_weights: "default" (W = 0 and b = 0: the identity), or "random".
        orthogonal: whether R's rows are orthonormal.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        net = pf.adapt(model, {"0": pf.DiReFT(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(3, 8))
    """

    cases: ClassVar[Cases] = (
        {"rank": 2},
        {"rank": 2, "first": 1, "last": 1, "tied": False, "activation": "silu"},
        {"rank": 3, "first": 1, "init_weights": "random", "orthogonal": False},
    )

    activation: Activation = "none"
    orthogonal: bool = True

    def fresh(self, rng: Rng, size: int) -> Leaf:
        r = self.rank
        basis = rng.kaiming(r, size)
        w = rng.zeros(r, size) if self.init_weights == "default" else rng.kaiming(r, size)
        return {"r": orthonormal(basis) if self.orthogonal else basis, "w": w, "b": rng.zeros(r)}

    def made(self, p: Leaf) -> Leaf:
        return {"rotation": orthonormal(p["r"]), "w": p["w"], "b": p["b"]} if self.orthogonal else p

    def change(self, p: Leaf, h: Tensor) -> Tensor:
        source = ACTIVATIONS[self.activation](F.linear(h, p["w"], p["b"]))
        return source @ p["rotation" if self.orthogonal else "r"]
