"""NoReFT: h + (act(W h + b) − P h) P, LoReFT without the constraint on P."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Cases, Leaf
from peftfn.core.rng import Rng
from peftfn.methods.modules.bottleneck import ACTIVATIONS
from peftfn.methods.parts.reft import Activation, Intervention


@dataclass(frozen=True)
class NoReFT(Intervention):
    """h + (act(W h + b) − P h − c) P, h the output of a module, with P and W [rank, d], b and c [rank].

    `LoReFT` with a P that need not have orthonormal rows, and so without a decomposition. c is there with `add_bias`.
    Tokens are chosen as `LoReFT` chooses them.

    Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, arXiv:2404.03592 (an ablation; the bias c is
    that of its code).

    Trainable parameters per site: 2·rank·d + rank (and rank with `add_bias`). Use it where the decomposition of
    `LoReFT` takes too long.

    Args:
        rank: rows of P and W.
        first, last, tied, activation, dim: as of `LoReFT`.
        init_weights: "default" (W = P, b = c = 0: the identity, but with an activation), or "random" (W of its own).
        add_bias: whether there is c.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        net = pf.adapt(model, {"0": pf.NoReFT(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(3, 8))
    """

    cases: ClassVar[Cases] = (
        {"rank": 2},
        {"rank": 2, "first": 1, "last": 1, "tied": False, "activation": "gelu", "add_bias": True},
        {"rank": 3, "last": 2, "init_weights": "random"},
    )

    activation: Activation = "none"
    add_bias: bool = False

    @property
    def identity(self) -> bool:
        return self.init_weights == "default" and self.activation == "none"

    def fresh(self, rng: Rng, size: int) -> Leaf:
        r = self.rank
        proj = rng.kaiming(r, size)
        w = proj.clone() if self.init_weights == "default" else rng.kaiming(r, size)
        return {"proj": proj, "w": w, "b": rng.zeros(r), **({"c": rng.zeros(r)} if self.add_bias else {})}

    def change(self, p: Leaf, h: Tensor) -> Tensor:
        source = ACTIVATIONS[self.activation](F.linear(h, p["w"], p["b"]))
        return (source - F.linear(h, p["proj"], p.get("c"))) @ p["proj"]
