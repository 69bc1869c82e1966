"""OLoRA: W + s·(B A − B₀A₀), started at the QR decomposition of W."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import LORA
from peftfn.methods.parts.variant import FromWeight


@dataclass(frozen=True)
class OLoRA(FromWeight):
    """W + s·(B A − B₀A₀), with B₀ [out, rank] the first columns of Q and A₀ [rank, in] the first rows of R in W = Q R,
    and s as for `LoRA`.

    Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024, arXiv:2406.01775. The paper
    trains B A on a base from which s·B₀A₀ was taken; here B₀ and A₀ are constants, and dropout acts on the difference,
    so that the start is the identity also in train mode. PEFT decomposes the transpose for `Conv1D`, and fails.

    Trainable parameters per site: rank·(in + out). Use it for a LoRA that converges sooner; it costs a QR decomposition
    at the start.

    Args:
        rank: columns of Q that are trained, at most min(out, in).
        alpha, rslora, dropout: as for `LoRA`.

    Raises:
        ValueError: a rank above the weight's own.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.OLoRA(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = ({"rank": 2, "alpha": 3.0}, {"rank": 3, "rslora": True})

    peft = replace(LORA, fixed={"init_lora_weights": "olora"})

    def start(self, rng: Rng, w: Tensor) -> Leaf:
        q, r = torch.linalg.qr(w)
        return {"a": r[: self.rank], "b": q[:, : self.rank]}
