"""FRoD: W + U (diag(d) + S) Vᵀ for W = U diag(λ) Vᵀ, with one V for all sites and a sparse S."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.fields import Positive, Probability
from peftfn.method import Leaf, Method, Product
from peftfn.rng import Rng


@dataclass(frozen=True)
class FRoD(Method):
    """W + U (diag(d) + S) Vᵀ, where W = U diag(λ) Vᵀ: U [out, in] with columns of length 1, λ [in] and V [in, in] are
    frozen; d [in] and the entries s [n] of the sparse S [in, in], off its diagonal, are trained and start at zero.

    "FRoD", 2026, AAAI, doi:10.1609/aaai.v40i31.39813. PEFT trains λ + d in place of d. V comes from a joint
    decomposition of the weights of a rule's sites, which must have inputs of one size: a rule is what PEFT calls a
    category, so sites with different roles should have rules of their own. PEFT puts U (diag(λ + d) + S) Vᵀ in W's
    place, which is the same up to rounding and to what a singular V cannot express; here W itself always stays.

    Trains in + density·in² numbers. For: full-rank changes in a basis that layers of one kind share.

    Args:
        density: share of S's in² entries that are trained, at least one (PEFT's sparse_rate).
        ridge: added to the Gram matrices that V comes from (PEFT's regularization_alpha).
        projection_seed: of the places of S (PEFT's projection_prng_key).
        dropout: probability of dropping an input feature of the change in train mode.
    """

    kinds = frozenset({"linear", "linear_t", "conv", "conv_t"})
    linear_in = ("c",)
    cases = ({"density": 0.1}, {"density": 0.02, "projection_seed": 3, "ridge": 0.1})

    density: Positive = 0.01
    ridge: Positive = 1e-3
    projection_seed: int = 0
    dropout: Probability = 0.0

    def _count(self, in_: int) -> int:
        return min(max(1, int(self.density * in_ * in_)), in_ * in_ - in_)

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        sizes = {w.shape[1] for w in weights.values()}
        if len(sizes) > 1:
            raise ValueError(
                f"FRoD shares V among a rule's sites, and their inputs are {sorted(sizes)}: split the rule"
            )
        (in_,) = sizes
        flat = rng.reseeded(self.projection_seed).permutation(in_ * in_ - in_)[: self._count(in_)]
        row, column = flat // max(1, in_ - 1), flat % max(1, in_ - 1)
        places = torch.stack([row, column + (column >= row)])
        if rng.meta or any(w.is_meta for w in weights.values()):
            us = [rng.empty(*w.shape) for w in weights.values()]
            v = rng.empty(in_, in_)
        else:
            ws = [w.detach().float().cpu() for w in weights.values()]
            v = self._joint(ws)
            us = [self._left(v.double(), w.double()).to(rng.device, rng.dtype) for w in ws]
        common = {"V": v.to(rng.device, rng.dtype), "places": places}
        return {site: {**common, "U": u} for site, u in zip(weights, us, strict=True)}

    def _joint(self, ws: list[Tensor]) -> Tensor:
        """V [in, in] that turns every w into nearly orthogonal columns."""
        stacked, in_ = torch.cat(ws), ws[0].shape[1]
        if stacked.shape[0] < in_:
            full: Tensor = torch.linalg.svd(stacked)[2]
            return full.mT
        q, r = torch.linalg.qr(stacked)
        grams = [part.mT @ part + self.ridge * torch.eye(in_) for part in q.split([len(w) for w in ws])]
        mean = sum((torch.linalg.inv(g) for g in grams), torch.zeros(in_, in_)) / len(ws)
        v: Tensor = r.mT @ torch.linalg.eigh(mean)[1]
        return v

    @staticmethod
    def _left(v: Tensor, w: Tensor) -> Tensor:
        """U [out, in] of w = U diag(λ) vᵀ."""
        try:
            scaled = torch.linalg.solve(v, w.mT).mT
        except RuntimeError:
            scaled = w @ torch.linalg.pinv(v, rtol=1e-6).mT
        size = torch.linalg.vector_norm(scaled, dim=0)
        return torch.where(size > 1e-12, scaled / size, 0.0)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"d": rng.zeros(w.shape[1]), "s": rng.zeros(self._count(w.shape[1]))}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        c = torch.diag_embed(p["d"]).index_put((p["places"][0], p["places"][1]), p["s"])
        return {"c": c, "U": p["U"], "V": p["V"]}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["U"] @ p["c"] @ p["V"].mT

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) + F.linear(F.linear(dot(self.dropped(x), p["V"].mT), p["c"]), p["U"])
