"""PSOFT: W + s·B (R − I) A, a rotation R of the weight's own principal subspace."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive, PositiveInt, Probability, Rounds, Start, at_most
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.rotation import bounded, cayley, enough, neumann, places, skew
from peftfn.methods.parts.sketch import sketched_svd


@dataclass(frozen=True)
class PSOFT(Weight):
    """W + s·B (R − I) A, R = diag(b) Cayley(Q) diag(a), where s·B A [out, in] is the best rank-`rank` part of W.

    Wu et al., "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", ICLR 2026, arXiv:2505.11235.
    Trained: the upper triangle q [rank(rank−1)/2] of Q, b [rank], a [rank]. A and B are constants from the weight's
    SVD, so a checkpoint of PEFT, which recomputes them, depends on the signs its SVD chooses.

    Trainable parameters per site: rank·(rank − 1)/2 + 2·rank. Use it for rotations from a few hundred parameters, in
    the weight's own subspace.

    Args:
        rank: dimension of the subspace, at most min(out, in).
        alpha: numerator of s = alpha/rank; None means rank. It cancels, but for what B and A weigh.
        dropout: probability of dropping an input feature of A in train mode.
        split: where the singular values go: "psoft" to B alone, "pissa" their roots to both.
        svd: "full", or "lowrank": a randomised one.
        niter: iterations of the randomised one.
        seed: of the randomised one.
        orthogonal: False trains all of the Cayley transform's place, q [rank, rank].
        magnitude_b, magnitude_a: whether there are b and a.
        exact: solve for the Cayley transform (I + Q)(I − Q)⁻¹; False: PEFT's series of it.
        terms: of the series, at least 2.
        eps: of the series: keep ‖Q‖_F ≤ eps by scaling Q down.
        init_weights: "default" (R = I) or "random" (q around that with std 0.1: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.PSOFT(rank=3)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    linear_in = ("m",)
    cases = (
        {"rank": 3, "alpha": 2.0},
        {"rank": 4, "exact": False, "terms": 6, "eps": 0.5, "split": "pissa", "magnitude_a": False},
        {"rank": 3, "orthogonal": False, "svd": "lowrank", "init_weights": "random"},
    )

    peft = Peft(
        "PSOFT",
        {"q": "psoft_R.weight", "b": "psoft_R.vector_b", "a": "psoft_R.vector_a"},
        {
            "rank": "r",
            "alpha": "psoft_alpha",
            "dropout": "psoft_dropout",
            "split": "ab_svd_init",
            "svd": "psoft_svd",
            "niter": "psoft_svd_lowrank_niter",
            "seed": "random_seed",
            "orthogonal": "psoft_orth",
            "magnitude_b": "psoft_mag_b",
            "magnitude_a": "psoft_mag_a",
            "exact": "use_cayley_neumann",
            "terms": "num_cayley_neumann_terms",
            "eps": "cayley_neumann_eps",
        },
        {"split": [(s, f"{s}_init") for s in ("psoft", "pissa")], "exact": [(True, False), (False, True)]},
        writes=lambda m: {"psoft_alpha": m.rank if m.alpha is None else m.alpha},
    )

    rank: PositiveInt = 32
    alpha: Positive | None = None
    dropout: Probability = 0.0
    split: Literal["psoft", "pissa"] = "psoft"
    svd: Literal["full", "lowrank"] = "full"
    niter: Rounds = 10
    seed: int = 0
    orthogonal: bool = True
    magnitude_b: bool = True
    magnitude_a: bool = True
    exact: bool = True
    terms: Rounds = 5
    eps: Positive | None = None
    init_weights: Start = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        enough(self)

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        w, r = w.detach().float(), self.rank
        u, s, v = torch.linalg.svd(w, full_matrices=False) if self.svd == "full" else self._sketch(rng, w)
        u, s, v = u[:, :r], s[:r] / self.scale, v[:r]
        a, b = (torch.ones_like(s), s) if self.split == "psoft" else (s.sqrt(), s.sqrt())
        at = {"at": places(r).to(rng.device)} if self.orthogonal else {}
        return {"A": (a[:, None] * v).contiguous(), "B": (u * b).contiguous(), **at}

    def indices(self, p: Leaf, w: Tensor) -> Leaf:
        return {"at": places(self.rank)} if self.orthogonal else {}

    def _sketch(self, rng: Rng, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`torch.svd_lowrank` from the method's own seed."""
        flat = w.shape[0] < w.shape[1]
        m = w.mT if flat else w
        start = rng.reseeded(self.seed).normal(m.shape[1], self.rank).to(m.dtype)
        u, s, v = sketched_svd(m, start, self.niter)
        return (v.mT, s, u.mT) if flat else (u, s, v)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        r = self.rank
        at_most(self, "rank", out=w.shape[0], **{"in": w.shape[1]})
        q = rng.normal(*((r * (r - 1) // 2,) if self.orthogonal else (r, r)), std=0.0 if self.identity else 0.1)
        leaf = {"q": q if self.orthogonal else q + torch.eye(r, dtype=q.dtype, device=q.device)}
        return leaf | {k: rng.ones(r) for k, on in (("b", self.magnitude_b), ("a", self.magnitude_a)) if on}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        r = p["q"]
        if self.orthogonal:
            q = skew(r, p["at"])
            q = q if self.eps is None or self.exact else bounded(q, self.eps, (0, 1))
            r = cayley(q) if self.exact else neumann(q, self.terms)
        r = p["b"][:, None] * r if "b" in p else r
        r = r * p["a"] if "a" in p else r
        eye = torch.eye(self.rank, dtype=r.dtype, device=r.device)
        return {"A": p["A"], "B": p["B"], "m": self.scale * (r - eye)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["B"] @ p["m"] @ p["A"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) + F.linear(F.linear(dot(self.dropped(x), p["A"]), p["m"]), p["B"])
