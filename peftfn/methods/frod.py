"""FRoD: W + U (diag(d) + S) Vᵀ for W = U diag(λ) Vᵀ, with one V for all layers of a role and a sparse S."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.fields import Positive, Probability
from peftfn.method import Leaf, Method, Peft, Product, names
from peftfn.methods.roles import number, role
from peftfn.rng import Rng


@dataclass(frozen=True)
class FRoD(Method):
    """W + U (diag(d) + S) Vᵀ, where W = U diag(λ) Vᵀ: U [out, in] with columns of length 1, λ [in] and V [in, in] are
    frozen; d [in] and the entries s [n] of the sparse S [in, in], off its diagonal, are trained and start at zero.

    "FRoD", 2026, AAAI, doi:10.1609/aaai.v40i31.39813. V comes from a joint decomposition of the weights of one role
    (q_proj, say) in all layers of the rule, which must have inputs of one size; as in PEFT, the last part or two of a
    layer's name are its role, and of two weights with one role and one layer number the later counts. PEFT trains
    λ + d in place of d, and puts U (diag(λ + d) + S) Vᵀ in W's place, which is the same up to rounding and to what a
    singular V cannot express; here W itself always stays.

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

    peft = Peft(
        "FROD",
        names("d=frod_lambda_l s=frod_lambda_s_values"),
        names(
            "density=sparse_rate ridge=regularization_alpha projection_seed=projection_prng_key dropout=frod_dropout"
        ),
        shared=names("V=frod_V.{} places=frod_s_indices.{} size=frod_s_size.{}"),
        group=role,
    )

    density: Positive = 0.01
    ridge: Positive = 1e-3
    projection_seed: int = 0
    dropout: Probability = 0.0

    def _count(self, in_: int) -> int:
        return min(max(1, int(self.density * in_ * in_)), in_ * in_ - in_)

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        roles: dict[str, dict[str, int]] = {}
        for i, site in enumerate(weights):
            roles.setdefault(role(site.rpartition(".")[0]), {})[site] = number(site, i)
        draw = rng.reseeded(self.projection_seed)
        meta, out = rng.meta or any(w.is_meta for w in weights.values()), dict[str, Leaf]()
        for name, sites in sorted(roles.items()):
            in_, *more = sizes = sorted({weights[s].shape[1] for s in sites})
            if more:
                raise ValueError(f"FRoD shares V among all {name}, and their inputs are {sizes}: split the rule")
            flat = draw.permutation(in_ * in_ - in_)[: self._count(in_)]
            row, column = flat // max(1, in_ - 1), flat % max(1, in_ - 1)
            places = torch.stack([row, column + (column >= row)])
            ws = {s: weights[s] if meta else weights[s].detach().float().cpu() for s in sites}
            layers = {sites[s]: ws[s] for s in sites}
            v = rng.empty(in_, in_) if meta else self._joint([layers[i] for i in sorted(layers)])
            common = {"V": v.to(rng.device, rng.dtype), "places": places, "size": torch.tensor([in_, in_])}
            for s in sites:
                u, at = (rng.empty(*ws[s].shape), rng.empty(in_)) if meta else self._left(v, ws[s])
                out[s] = {**common, "U": u.to(rng.device, rng.dtype), "start": at.to(rng.device, rng.dtype)}
        return out

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
    def _left(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """(U [out, in], λ [in]) of w = U diag(λ) vᵀ."""
        v, w = v.double(), w.double()
        try:
            scaled = torch.linalg.solve(v, w.mT).mT
        except RuntimeError:
            scaled = w @ torch.linalg.pinv(v, rtol=1e-6).mT
        size = torch.linalg.vector_norm(scaled, dim=0)
        return torch.where(size > 1e-12, scaled / size, 0.0).float(), size.float()

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"d": rng.zeros(w.shape[1]), "s": rng.zeros(self._count(w.shape[1]))}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        c = torch.diag_embed(p["d"]).index_put((p["places"][0], p["places"][1]), p["s"])
        return {"c": c, "U": p["U"], "V": p["V"]}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["U"] @ p["c"] @ p["V"].mT

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) + F.linear(F.linear(dot(self.dropped(x), p["V"].mT), p["c"]), p["U"])

    def to_peft_leaf(self, p: Leaf) -> Leaf:
        return {"frod_lambda_l": p["start"] + p["d"], "frod_lambda_s_values": p["s"]}

    def from_peft_leaf(self, t: Leaf, w: Tensor, bias: Tensor | None) -> Leaf:
        v, places, size = (t[key] for key in ("frod_V.{}", "frod_s_indices.{}", "frod_s_size.{}"))
        if not bool(((places >= 0) & (places < len(v))).all()) or size.tolist() != list(v.shape):
            raise ValueError(f"frod_s_indices or frod_s_size goes beyond frod_V's {list(v.shape)}")
        u, start = (part.to(v) for part in self._left(v.cpu(), w.detach().float().cpu()))
        leaf = {"d": t["frod_lambda_l"].view_as(start) - start, "s": t["frod_lambda_s_values"]}
        return leaf | {"V": v, "places": places, "size": size, "U": u, "start": start}
