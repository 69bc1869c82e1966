"""OSF: W + U S V − U₀ S₀ V₀, the weight's own lesser singular directions trained."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfn.method import Cases, Leaf, Peft, choice, positive
from peftfn.methods.lowrank import _LowRank
from peftfn.rng import Rng
from peftfn.transform import eager


@dataclass(frozen=True)
class OSF(_LowRank):
    """W + U S V − U₀ S₀ V₀, with U [out, n], S [n], V [n, in] starting at the n least singular directions of W.

    Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", 2025,
    arXiv:2504.07097. n = min(out, in) − rank. Gradients of U and V are projected off the `rank` kept directions.

    Args:
        rank: directions kept as they are: a number, a share in (0, 1] of min(out, in), or None for half of them.
        project: False trains U and V with their plain gradients.
        init_weights: "default" (from W) or "random" (standard normal: not the identity).
    """

    cases: ClassVar[Cases] = ({}, {"rank": 4, "project": False, "init_weights": "random"}, {"rank": 0.7})

    peft = Peft(
        "OSF",
        keys={"u": "osf_svd_params.U_low", "s": "osf_svd_params.S_low", "v": "osf_svd_params.V_low"},
        fields={"rank": "effective_rank"},
    )
    dropout = 0.0

    rank: int | float | None = None
    project: bool = True
    init_weights: str = "default"

    def __post_init__(self) -> None:
        positive(self, **({} if self.rank is None else {"rank": self.rank}))
        choice(self, "init_weights", ("default", "random"))

    @property
    def identity(self) -> bool:
        return self.init_weights != "random"

    @property
    def exact_gradient(self) -> bool:
        return not self.project

    def _svd(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        n = min(w.shape)
        k = n // 2 if self.rank is None else int(n * self.rank if isinstance(self.rank, float) else self.rank)
        if not 0 < k < n:
            raise ValueError(f"OSF.rank is {self.rank}, which keeps {k} of {n} directions: keep 1 to {n - 1}")
        return *torch.linalg.svd(w.detach().float(), full_matrices=False), k

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        u, s, v, k = self._svd(w)
        leaf = {"u": u[:, k:], "s": s[k:], "v": v[k:]}
        if self.identity:
            return {name: t.to(rng.dtype).contiguous() for name, t in leaf.items()}
        return {name: rng.normal(*t.shape) for name, t in leaf.items()}

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        u, s, v, k = self._svd(w)
        p = {"u0": u[:, k:], "s0": s[k:], "v0": v[k:]}
        if self.project and w.shape[0] > w.shape[1]:  # U₀ and the kept directions do not span everything
            p["uh"] = u[:, :k]
        if self.project and w.shape[0] < w.shape[1]:
            p["vh"] = v[:k]
        return {name: t.contiguous() for name, t in p.items()}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        u, v = p["u"], p["v"]
        if self.project:
            high = p["vh"].mT if "vh" in p else None
            u, v = _projected(u, p["u0"], p.get("uh")), _projected(v.mT, p["v0"].mT, high).mT
        return {"down": torch.cat([v, p["v0"]]), "up": torch.cat([u * p["s"], -p["u0"] * p["s0"]], 1)}


def _off(g: Tensor, low: Tensor, high: Tensor | None) -> Tensor:
    """g without its part in the span of `high`, whose complement is the span of `low` if high is None."""
    return low @ (low.mT @ g) if high is None else g - high @ (high.mT @ g)


def _projected(x: Tensor, low: Tensor, high: Tensor | None) -> Tensor:
    """x, whose derivatives are projected by `_off`."""
    if eager(x):
        return _Project.apply(x, low, high)  # type: ignore[no-any-return, no-untyped-call]
    off = _off(x, low, high)
    return off + (x - off).detach()


class _Project(torch.autograd.Function):
    """`_projected` without work in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(low, high)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _off(g, *ctx.saved_tensors), None, None
