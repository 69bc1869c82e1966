"""DoRA: m ⊙ (W + s·B A) / ‖W + s·B A‖, the norm over each row."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from peftfn.core.method import Leaf, LowRank, Product
from peftfn.core.rng import Rng
from peftfn.kernels.dora_norm import dora_norm, dora_norms
from peftfn.kernels.lora_linear import lora_linear
from peftfn.methods.parts.lowrank import LORA
from peftfn.methods.parts.variant import Variant


@dataclass(frozen=True)
class DoRA(Variant):
    """m ⊙ (W + s·B A) / n, with n = ‖W + s·B A‖ row by row [out] and a trained magnitude m [out].

    Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv:2402.09353. The norm is a constant for the
    gradient, as in the paper's section 4.3 and in PEFT, unless `attached`.

    c = m/n depends on parameters alone: `net.prepare` computes it once for many calls.

    Trainable parameters per site: rank·(in + out) + out. Use it for better results than LoRA at small ranks, at the
    cost of a norm per step.

    Args:
        rank, alpha, rslora, dropout, init_weights: as for `LoRA`.
        attached: let the gradient flow through the norm as well.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.DoRA(rank=4, alpha=8)})
        adapter = net.prepare(net.init(seed=0))  # computes the norms once, for many calls
        y = net.apply(adapter, torch.ones(2, 8))
    """

    cases = (
        {"rank": 2, "alpha": 3.0},
        {"rank": 3, "rslora": True, "attached": True, "init_weights": "random"},
    )

    peft = replace(
        LORA, keys={**LORA.keys, "m": "lora_magnitude_vector"}, fixed={"use_dora": True}
    )  # checkpoints name the magnitude without ".weight"
    factors = ("a", "b")

    alpha: float | None = None  # any number: files may have 0
    attached: bool = False

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        leaf = super().init(rng, w)
        return leaf | {"m": self._norm(leaf, w.to(rng.dtype))}

    def _norm(self, p: Leaf, w: Tensor) -> Tensor:
        return dora_norm(w, p["a"], p["b"], self.scale)

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        with nullcontext() if self.attached else torch.no_grad():
            n = self._norm(p, w)
        n = n if self.attached else n.detach()  # no_grad does not stop forward-mode derivatives
        return {"a": p["a"], "b": p["b"], "c": _over(p["m"], n)}

    def prepare_all(self, ps: Sequence[Leaf], ws: Sequence[Tensor]) -> list[Leaf]:
        if self.attached:
            return super().prepare_all(ps, ws)
        norms = dora_norms(ws, [p["a"] for p in ps], [p["b"] for p in ps], [self.scale] * len(ps))
        return [{"a": p["a"], "b": p["b"], "c": _over(p["m"], n.detach())} for p, n in zip(ps, norms, strict=True)]

    @property
    def exact_gradient(self) -> bool:
        return self.attached

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["c"][:, None] * (w + super().delta(p, w)) - w

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return p["c"] * super().product(p, w, x, dot)

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return lora_linear(x, w, p["a"], p["b"], self.scale, c=p["c"], dropout=self.dropout)

    def low_rank(self, p: Leaf) -> LowRank | None:
        low = super().low_rank(p)
        return None if low is None else low._replace(gain=p["c"])

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        return None

    def summed(self, ps: list[Leaf]) -> Leaf | None:
        return None


def _over(m: Tensor, n: Tensor) -> Tensor:
    """m / n, and 0 where both are: a pruned row stays one."""
    return m / n.clamp(min=torch.finfo(n.dtype).tiny)
