"""OSF: W + U S V − U₀ S₀ V₀, the weight's own lesser singular directions trained."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Start
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.kernels.lora_linear import lora_linear
from peftfn.tensors.transform import eager


@dataclass(frozen=True)
class OSF(Weight):
    """W + U S V − U₀ S₀ V₀, with U [out, n], S [n], V [n, in] starting at the n least singular directions of W.

    Nayak et al., "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning", 2025,
    arXiv:2504.07097. n = min(out, in) − rank. Gradients of U and V are projected off the `rank` kept directions.

    Trainable parameters per site: (min(in, out) − rank)·(in + out + 1). Use it for continual learning, since it
    protects what was learnt before.

    Args:
        rank: directions kept as they are: a number, a share in (0, 1] of min(out, in), or None for half of them.
        project: False trains U and V with their plain gradients.
        init_weights: "default" (from W) or "random" (standard normal: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.OSF(rank=4)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = ({}, {"rank": 4, "project": False, "init_weights": "random"}, {"rank": 0.7})

    peft = Peft(
        "OSF",
        {"u": "osf_svd_params.U_low", "s": "osf_svd_params.S_low", "v": "osf_svd_params.V_low"},
        {"rank": "effective_rank"},
    )

    rank: int | float | None = None
    project: bool = True
    init_weights: Start = "default"

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
        p = {"low": u[:, k:] * s[k:] @ v[k:]}
        if self.project:  # what spans the kept directions, or all others if these and the lesser ones span everything
            p |= {"uh": u[:, :k]} if w.shape[0] > w.shape[1] else {"u0": u[:, k:]}
            p |= {"vh": v[:k]} if w.shape[0] < w.shape[1] else {"v0": v[k:]}
        return {name: t.contiguous() for name, t in p.items()}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        u, v = p["u"], p["v"]
        if self.project:
            u = _projected(u, p.get("u0"), p.get("uh"))
            v = _projected(v.mT, *(t if t is None else t.mT for t in (p.get("v0"), p.get("vh")))).mT
        return {"us": u * p["s"], "vt": v, "low": p["low"]}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["us"] @ p["vt"] - p["low"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) - dot(x, p["low"]) + F.linear(dot(x, p["vt"]), p["us"])

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        if not isinstance(w, Tensor) or w.dtype != x.dtype or not eager(x):
            return self.product(p, w, x, F.linear)
        return lora_linear(x, w - p["low"], p["vt"], p["us"])


def _off(g: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """The part of g in the span of `low`, or else off that of `high`: one of them is None."""
    if low is not None:
        return low @ (low.mT @ g)
    assert high is not None
    return g - high @ (high.mT @ g)


def _projected(x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    """x, whose derivatives are projected by `_off`."""
    if eager(x):
        return _Project.apply(x, low, high)  # type: ignore[no-any-return, no-untyped-call]
    off = _off(x, low, high)
    return off + (x - off).detach()


class _Project(torch.autograd.Function):
    """`_projected` without work in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(low, high)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _off(g, *ctx.saved_tensors), None, None
