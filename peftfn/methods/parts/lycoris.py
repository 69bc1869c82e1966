"""What LyCORIS' methods share: m ⊙ (W + Δ) / ‖W + Δ‖ row by row, scale, dropouts of the change, Tucker cores."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from peftfn.core.fields import Positive, PositiveInt, Probability
from peftfn.core.method import Leaf, Weight
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class _Lycoris(Weight):
    """W + Δ, or m ⊙ (W + Δ) / ‖W + Δ‖, for a Δ that the method makes of its factors.

    A method gives `factors` (p → the factors of Δ, scaled) and `change` (factors → Δ [out, in]), and uses `joined` in
    its fast forms. All fields are described in LoHa and LoKr.
    """

    in_eval = (("rank_dropout", 0.0), ("module_dropout", 0.0))

    rank: PositiveInt = 8
    alpha: Positive | None = None
    rank_dropout: Probability = 0.0
    module_dropout: Probability = 0.0
    rank_dropout_scale: bool = True
    tucker: bool = False
    weight_decompose: bool = False
    init_weights: Literal["default", "lycoris", "random"] = "default"

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def factors(self, p: Leaf, w: Tensor) -> Leaf:
        raise NotImplementedError

    def change(self, p: Leaf) -> Tensor:
        raise NotImplementedError

    def magnitude(self, rng: Rng, w: Tensor) -> Leaf:
        """The leaf's part for the weight decomposition."""
        return {"m": torch.linalg.vector_norm(w.to(rng.dtype), dim=1)} if self.weight_decompose else {}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        q = self.factors(p, w)
        if self.rank_dropout or self.module_dropout:
            q["keep"] = self._keep(w).to(next(iter(q.values())).dtype)
        if self.weight_decompose:
            n = torch.linalg.vector_norm(w + self._kept(q), dim=1)
            q["c"] = p["m"] / (n + torch.finfo(n.dtype).eps)
        return q

    def _keep(self, w: Tensor) -> Tensor:
        keep = (torch.rand(w.shape[0], device=w.device) >= self.rank_dropout).float()
        if self.rank_dropout_scale:
            keep = keep / keep.mean().clamp(min=1 / w.shape[0])
        return keep * (torch.rand((), device=w.device) >= self.module_dropout)

    def _kept(self, p: Leaf) -> Tensor:
        return self.change(p) * p["keep"][:, None] if "keep" in p else self.change(p)

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        d = self._kept(p)
        return p["c"][:, None] * (w + d) - w if "c" in p else d

    def joined(self, p: Leaf, y: Tensor, dy: Tensor) -> Tensor:
        """The output of y = x Wᵀ and dy = x Δᵀ."""
        y = y + (dy * p["keep"] if "keep" in p else dy)
        return p["c"] * y if "c" in p else y


def written(method: _Lycoris) -> dict[str, Any]:
    if method.weight_decompose:
        raise ValueError(
            f"{type(method).__name__}.weight_decompose is True, which PEFT does not have: save in our own format, or "
            "merge the adapter"
        )
    return {"alpha": method.scale * method.rank}


def leaf_to(method: Any, p: Leaf) -> Leaf:
    """PEFT gives the core of a 1-D convolution a second kernel axis."""
    return {k: t[..., None] if k[-2:] in ("t1", "t2") and t.dim() == 3 else t for k, t in method.peft.named(p).items()}


def kernel(rng: Rng) -> tuple[int, ...]:
    """The size of the site's convolution window; () where there is none."""
    site = rng.site
    return tuple(site.shape[2:]) if site is not None and site.kind in ("conv", "conv_t") else ()


def spread(core: Tensor, b: Tensor) -> Tensor:
    """Σ_j core[i, j, kernel] b[j, in] as [i, in·kernel]: what is left of a Tucker form but its output factor."""
    return torch.einsum("ijk,jn->ink", core.flatten(2), b).flatten(1)
