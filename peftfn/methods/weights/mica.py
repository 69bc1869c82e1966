"""MiCA: W + s·B A with B frozen at the smallest left singular vectors of W."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftfn.core.fields import at_most
from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import LORA, Ranked
from peftfn.methods.parts.variant import read_off
from peftfn.tensors.precision import wide


@dataclass(frozen=True)
class MiCA(Ranked):
    """W + s·B A, with B [out, rank] the left singular vectors of W's smallest singular values, frozen, and A [rank, in]
    trained from zero; s as for `LoRA`.

    "Minor Component Adaptation", 2026, arXiv:2604.01694.

    Trainable parameters per site: rank·in. Use it for half of LoRA's parameters, in directions that the weight does not
    use.

    Args:
        rank: singular vectors, at most min(out, in).
        alpha, rslora, dropout: as for `LoRA`.

    Raises:
        ValueError: a rank above the weight's own.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.MiCA(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = ({"rank": 2, "alpha": 3.0}, {"rank": 3, "rslora": True})

    peft = replace(LORA, fixed={"init_lora_weights": "mica"})
    factors = ("a", "b")

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        at_most(self, "rank", out=w.shape[0], **{"in": w.shape[1]})
        return {"a": rng.zeros(self.rank, w.shape[1])}

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        u = torch.linalg.svd(wide(w), full_matrices=False)[0]
        return read_off(rng, b=u[:, -self.rank :])
