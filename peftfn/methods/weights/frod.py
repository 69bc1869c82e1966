"""FRoD: W + U (diag(d) + S) Vᵀ for W = U diag(λ) Vᵀ, with one V for all layers of a role and a sparse S."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive, Probability
from peftfn.core.method import Index, Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts import hogsvd
from peftfn.methods.parts.roles import number, role


def _leaf_from(m: "FRoD", t: Leaf, w: Tensor, bias: Tensor | None) -> Leaf:
    v, places, size = (t[key] for key in ("frod_V.{}", "frod_s_indices.{}", "frod_s_size.{}"))
    if not bool(((places >= 0) & (places < len(v))).all()) or size.tolist() != list(v.shape):
        raise ValueError(f"frod_s_indices or frod_s_size goes beyond frod_V's {list(v.shape)}")
    u, start = (part.to(v) for part in hogsvd.left(v.cpu(), w.detach().float().cpu()))
    leaf = {"d": t["frod_lambda_l"].view_as(start) - start, "s": t["frod_lambda_s_values"]}
    return leaf | m.common(v, places) | {"U": u, "start": start}


@dataclass(frozen=True)
class FRoD(Weight):
    """W + U (diag(d) + S) Vᵀ, where W = U diag(λ) Vᵀ: U [out, in] with columns of length 1, λ [in] and V [in, in] are
    frozen; d [in] and the entries s [n] of the sparse S [in, in], off its diagonal, are trained and start at zero.

    "FRoD", 2026, AAAI, doi:10.1609/aaai.v40i31.39813. V comes from a joint decomposition of the weights of one role
    (q_proj, say) in all layers of the rule, which must have inputs of one size; as in PEFT, the last part or two of a
    layer's name are its role, and of two weights with one role and one layer number the later counts. PEFT trains
    λ + d in place of d, and puts U (diag(λ + d) + S) Vᵀ in W's place, which is the same up to rounding and to what a
    singular V cannot express; here W itself always stays.

    Trainable parameters per site: in + density·in². Use it for changes of full rank in a basis that layers of one kind
    share.

    Args:
        density: share of S's in² entries that are trained, at least one (PEFT's sparse_rate).
        ridge: added to the Gram matrices that V comes from (PEFT's regularization_alpha).
        projection_seed: of the places of S (PEFT's projection_prng_key).
        dropout: probability of dropping an input feature of the change in train mode.

    Example:
        layers = torch.nn.ModuleList([torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)])
        adapter = pf.adapt(layers, {"weight": pf.FRoD(density=0.1)}).init(seed=0)
    """

    kinds = frozenset({"linear", "linear_t", "conv", "conv_t"})
    linear_in = ("c",)
    cases = ({"density": 0.1}, {"density": 0.02, "projection_seed": 3, "ridge": 0.1})

    peft = Peft(
        "FROD",
        {"d": "frod_lambda_l", "s": "frod_lambda_s_values"},
        {
            "density": "sparse_rate",
            "ridge": "regularization_alpha",
            "projection_seed": "projection_prng_key",
            "dropout": "frod_dropout",
        },
        shared={"V": "frod_V.{}", "places": "frod_s_indices.{}", "size": "frod_s_size.{}"},
        group=role,
        leaf_to=lambda m, p: {"frod_lambda_l": p["start"] + p["d"], "frod_lambda_s_values": p["s"]},
        leaf_from=_leaf_from,
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
            v = rng.empty(in_, in_) if meta else hogsvd.right([layers[i] for i in sorted(layers)], self.ridge)
            common = self.common(v.to(rng.device, rng.dtype), places)
            for s in sites:
                u, at = (rng.empty(*ws[s].shape), rng.empty(in_)) if meta else hogsvd.left(v, ws[s])
                out[s] = {**common, "U": u.to(rng.device, rng.dtype), "start": at.to(rng.device, rng.dtype)}
        return out

    @staticmethod
    def common(v: Tensor, places: Tensor) -> Leaf:
        """What the layers of a role share; `at` is where d and s stand in the flattened diag(d) + S."""
        in_, device = len(v), places.device
        at = torch.cat([torch.arange(in_, device=device) * (in_ + 1), places[0] * in_ + places[1]])
        return {"V": v, "places": places, "size": torch.tensor([in_, in_], device=device), "at": at}

    def indices(self, p: Leaf, w: Tensor) -> Mapping[str, Index]:
        n = w.shape[1]
        return {"places": Index((n, n), distinct=True), "size": Index(n + 1, n), "at": Index(n * n, distinct=True)}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"d": rng.zeros(w.shape[1]), "s": rng.zeros(self._count(w.shape[1]))}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        v = torch.cat([p["d"], p["s"]])
        c = v.new_zeros(len(p["d"]) ** 2).scatter(0, p["at"], v).unflatten(0, (len(p["d"]), -1))
        return {"c": c, "U": p["U"], "V": p["V"]}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["U"] @ p["c"] @ p["V"].mT

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w) + F.linear(F.linear(dot(self.dropped(x), p["V"].mT), p["c"]), p["U"])
