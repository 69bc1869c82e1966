"""ConsReFT: h + (b − R h) Rᵀ, which sets what h has in the span of R's rows to a constant."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Cases, Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.reft import Intervention, orthonormal


@dataclass(frozen=True)
class ConsReFT(Intervention):
    """h + (b − R h) Rᵀ, h the output of a module, R [rank, d] with orthonormal rows and b [rank].

    It replaces what h has in the span of R's rows by b Rᵀ, and so is never the identity at its start. Tokens are chosen
    as `LoReFT` chooses them.

    Wu et al., pyreft, 2024, arXiv:2404.03592: one of the library's interventions.

    Trainable parameters per site: rank·d + rank. Use it to clamp a direction of hidden states.

    Args:
        rank: rows of R.
        first, last, tied, dim: as of `LoReFT`.
        init_weights: "default" (b = 0: what is in the span is removed), or "random" (b uniform in (−1, 1)).

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        net = pf.adapt(model, {"0": pf.ConsReFT(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(3, 8))
    """

    cases: ClassVar[Cases] = ({"rank": 2}, {"rank": 2, "first": 1, "last": 1, "tied": False, "init_weights": "random"})

    @property
    def identity(self) -> bool:
        return False

    def fresh(self, rng: Rng, size: int) -> Leaf:
        b = rng.zeros(self.rank) if self.init_weights == "default" else rng.uniform(self.rank, bound=1.0)
        return {"r": orthonormal(rng.normal(self.rank, size)), "b": b}

    def made(self, p: Leaf) -> Leaf:
        return {"rotation": orthonormal(p["r"]), "b": p["b"]}

    def change(self, p: Leaf, h: Tensor) -> Tensor:
        return (p["b"] - F.linear(h, p["rotation"])) @ p["rotation"]
