"""LobiReFT: h + b Rᵀ, a constant vector of low rank."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from peftfn.core.method import Cases, Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.reft import Intervention, orthonormal


@dataclass(frozen=True)
class LobiReFT(Intervention):
    """h + b Rᵀ, h the output of a module, R [rank, d] with orthonormal rows and b [rank].

    A bias in the span of R's rows: a steering vector. Tokens are chosen as `LoReFT` chooses them.

    Wu et al., pyreft, 2024, arXiv:2404.03592: one of the library's interventions.

    Trainable parameters per site: rank·d + rank. Use it to steer a model by constant vectors.

    Args:
        rank: rows of R.
        first, last, tied, dim: as of `LoReFT`.
        init_weights: "default" (b = 0: the identity), or "random" (b uniform in (−1, 1)).

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        net = pf.adapt(model, {"0": pf.LobiReFT(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(3, 8))
    """

    cases: ClassVar[Cases] = ({"rank": 2}, {"rank": 2, "first": 1, "last": 1, "tied": False, "init_weights": "random"})

    def fresh(self, rng: Rng, size: int) -> Leaf:
        b = rng.zeros(self.rank) if self.init_weights == "default" else rng.uniform(self.rank, bound=1.0)
        return {"r": orthonormal(rng.normal(self.rank, size)), "b": b}

    def made(self, p: Leaf) -> Leaf:
        return {"rotation": orthonormal(p["r"]), "b": p["b"]}

    def change(self, p: Leaf, h: Tensor) -> Tensor:
        return p["b"] @ p["rotation"]
