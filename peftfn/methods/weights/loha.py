"""LoHa: W + s·(A₁B₁) ⊙ (A₂B₂), a product of two low-rank matrices, entry by entry."""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import STARTS
from peftfn.core.method import Leaf, Padding, Product
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.lycoris import _Lycoris, kernel, leaf_to, spread, written
from peftfn.tensors.remat import recomputed


@dataclass(frozen=True)
class LoHa(_Lycoris):
    """W + s·(A₁B₁) ⊙ (A₂B₂), with A_i [out, rank], B_i [rank, in] and s = alpha/rank: rank up to rank².

    Hyeon-Woo et al., "FedPara", 2021, arXiv:2108.06098; as adapters: LyCORIS, arXiv:2309.14859.

    The same matrix is a LoRA of rank², whose factors are all products of columns of A₁, A₂ and of rows of B₁, B₂:
    small ranks run in that form, on any layer. (With a core, PEFT's gradients of A₁ and A₂ are wrong; these are not.)

    Trainable parameters per site: 2·rank·(in + out). Use it for a rank up to rank², which image models profit from.

    Args:
        rank: inner dimension of each of the two products; values above √min(out, in) have no effect on
            expressiveness.
        alpha: numerator of the scale; None means rank, so s = 1.
        rank_dropout: probability of dropping an output's change in train mode.
        module_dropout: probability of dropping the whole change in train mode.
        rank_dropout_scale: divide the kept rows by their share, so that the mean stays.
        tucker: at a convolution, A_i [rank, out], B_i [rank, in] and a core T_i [rank, rank, *kernel] in place of
            B_i [rank, in·kernel] (PEFT's use_effective_conv2d); without effect elsewhere.
        weight_decompose: m ⊙ (W + Δ) / ‖W + Δ‖ with a trained m [out] and the row norms' own gradient, as in LyCORIS.
        init_weights: "default" (Kaiming-uniform, B₂ zero), "lycoris" (B_i normal, A₁ normal of std 0.1, A₂ zero), or
            "random" (all Kaiming-uniform: not the identity).

    Example:
        net = pf.adapt(torch.nn.Conv2d(3, 6, 3), {"weight": pf.LoHa(rank=2, tucker=True)})
        y = net.apply(net.init(seed=0), torch.ones(1, 3, 5, 5))
    """

    cases = (
        {"rank": 2, "alpha": 3.0, "tucker": True},
        {"rank": 1, "alpha": 3.0, "init_weights": "random"},
        {"rank": 2, "init_weights": "lycoris", "rank_dropout": 0.5},
        {"rank": 1, "weight_decompose": True},
    )

    peft = Peft(
        "LOHA",
        {"a1": "hada_w1_a", "b1": "hada_w1_b", "a2": "hada_w2_a", "b2": "hada_w2_b", "t1": "hada_t1", "t2": "hada_t2"},
        {
            "rank": "r",
            "alpha": "alpha",
            "rank_dropout": "rank_dropout",
            "module_dropout": "module_dropout",
            "tucker": "use_effective_conv2d",
            "init_weights": "init_weights",
        },
        {"init_weights": (*STARTS, ("lycoris", "lycoris"))},
        writes=written,
        leaf_to=leaf_to,
    )

    padding = Padding(scaled=("a1",))

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), r, window = w.shape, self.rank, kernel(rng)
        core = self.tucker and prod(window) > 1
        a, b = ((r, out), (r, in_ // prod(window))) if core else ((out, r), (r, in_))
        if self.init_weights == "lycoris":
            leaf = {"a1": rng.normal(*a, std=0.1), "b1": rng.normal(*b), "a2": rng.zeros(*a), "b2": rng.normal(*b)}
        else:
            b2 = rng.kaiming if self.init_weights == "random" else rng.zeros
            leaf = {"a1": rng.kaiming(*a), "b1": rng.kaiming(*b), "a2": rng.kaiming(*a), "b2": b2(*b)}
        cores = {k: rng.kaiming(r, r, *window) for k in ("t1", "t2")} if core else {}
        return leaf | cores | self.magnitude(rng, w)

    def factors(self, p: Leaf, w: Tensor) -> Leaf:
        (u1, v1), (u2, v2) = (
            (p["a" + i].mT, spread(p["t" + i], p["b" + i])) if "t1" in p else (p["a" + i], p["b" + i]) for i in "12"
        )
        if 4 * self.rank**2 < min(w.shape):  # beyond, the two products are cheaper than the one of rank²
            u, v = u1[:, :, None] * u2[:, None], v1[:, None] * v2
            return {"u": self.scale * u.flatten(1), "v": v.flatten(0, 1)}
        return {"u1": u1, "v1": v1, "u2": u2, "v2": v2}

    def change(self, p: Leaf) -> Tensor:
        if "u" in p:
            return p["u"] @ p["v"]
        return recomputed(self._hadamard, p["u1"], p["v1"], p["u2"], p["v2"], pull=self._hadamard_pulled)

    def _hadamard(self, u1: Tensor, v1: Tensor, u2: Tensor, v2: Tensor) -> Tensor:
        return self.scale * (u1 @ v1) * (u2 @ v2)

    def _hadamard_pulled(self, d: Tensor, u1: Tensor, v1: Tensor, u2: Tensor, v2: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the four factors, of that of their product."""
        d = self.scale * d
        d1, d2 = d * (u2 @ v2), d * (u1 @ v1)
        return d1 @ v1.mT, u1.mT @ d1, d2 @ v2.mT, u2.mT @ d2

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        if "u" not in p:
            return super().product(p, w, x, dot)
        return self.joined(p, dot(x, w), F.linear(dot(x, p["v"]), p["u"]))

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        return None if "c" in p else p | {k: s * p[k] for k in ("u", "u1") if k in p}

    def summed(self, ps: list[Leaf]) -> Leaf | None:
        if "u" not in ps[0] or len(ps[0]) > 2:
            return None
        return {"u": torch.cat([p["u"] for p in ps], -1), "v": torch.cat([p["v"] for p in ps], -2)}
