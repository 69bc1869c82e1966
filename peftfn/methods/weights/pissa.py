"""PiSSA: W + s·(B A − B₀A₀), started at the largest singular components of W."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftfn.core.fields import Rounds
from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import LORA, lora_alpha
from peftfn.methods.parts.sketch import sketched_svd
from peftfn.methods.parts.variant import FromWeight


def _written(m: "PiSSA") -> dict[str, Any]:
    if m.niter is not None:
        raise ValueError(f"PiSSA.niter is {m.niter}, and PEFT would start from other factors: save it as a LoRA")
    return lora_alpha(m)


@dataclass(frozen=True)
class PiSSA(FromWeight):
    """W + s·(B A − B₀A₀), with A₀ = √(S/s) Vᵀ [rank, in] and B₀ = U √(S/s) [out, rank] of the rank largest singular
    components U S Vᵀ of W, and s as for `LoRA`.

    Meng, Wang and Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
    2024, arXiv:2404.02948. The paper trains B A on a base from which B₀A₀ was taken; here B₀ and A₀ are constants, and
    dropout acts on the difference, so that the start is the identity also in train mode.

    Trainable parameters per site: rank·(in + out). Use it for a LoRA that converges sooner; it costs an SVD at the
    start.

    Args:
        rank: components that are trained, at most min(out, in).
        alpha, rslora, dropout: as for `LoRA`.
        niter: if given, steps of a randomised subspace iteration in place of the full decomposition: much faster for
            large weights, exact to the gap between the singular values it keeps and the others.

    Raises:
        ValueError: a rank above the weight's own.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.PiSSA(rank=2, niter=4)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = ({"rank": 2, "alpha": 3.0}, {"rank": 3, "rslora": True, "niter": 3})

    peft = replace(LORA, fixed={"init_lora_weights": "pissa"}, writes=_written)

    niter: Rounds | None = None

    def start(self, rng: Rng, w: Tensor) -> Leaf:
        if self.niter is None:
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
        else:  # from a start that is always the same
            first = rng.reseeded(0).normal(w.shape[1], min(self.rank + 8, *w.shape)).to(w.dtype)
            u, s, vh = sketched_svd(w, first, self.niter)
        root = (s[: self.rank] / self.scale).sqrt()
        return {"a": root[:, None] * vh[: self.rank], "b": u[:, : self.rank] * root}
