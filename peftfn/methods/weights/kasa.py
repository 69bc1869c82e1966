"""KaSA: W + s·B diag(d) A, with the smallest singular components of W taken out on demand."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import LORA, lora_alpha
from peftfn.methods.parts.sites import Planned, sites_of
from peftfn.methods.parts.variant import Variant, read_off
from peftfn.methods.weights.adalora import off_orthogonal
from peftfn.tensors.precision import wide


def _written(m: "KaSA") -> dict[str, Any]:
    if not m.truncate:
        raise ValueError("KaSA.truncate is False, and PEFT's KaSA always truncates the base: give truncate=True")
    return lora_alpha(m)


@dataclass(frozen=True)
class KaSA(Variant):
    """W + s·B diag(d) A, with A [rank, in], d [rank], B [out, rank] and s as for `LoRA`; with `truncate`, minus the
    U S Vᵀ of the rank smallest singular values of W, which the paper holds for noise.

    Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", 2024, arXiv:2412.06071.
    In training, add `penalty(net, adapter)` to the loss. The components taken out are constants, and dropout acts on
    the whole change, them included.

    Trainable parameters per site: rank·(in + out + 1). Use it for a LoRA whose components are weighed, against noise in
    the weight.

    Args:
        rank, alpha, rslora, dropout, init_weights: as for `LoRA`; d starts normal.
        truncate: take the components out, as the paper and PEFT do; a fresh adapter then is not the identity.
        beta: weight of Σ d² in the penalty.
        gamma: weight of ‖BᵀB − I‖_F + ‖A Aᵀ − I‖_F in the penalty.

    Raises:
        ValueError: truncate would leave nothing of the weight.

    Example:
        from peftfn.methods.weights.kasa import penalty
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.KaSA(rank=2, truncate=True)})
        term = penalty(net, net.init(seed=0))  # for the loss
    """

    cases = (
        {"rank": 2, "alpha": 3.0},
        {"rank": 3, "rslora": True, "truncate": True, "init_weights": "gaussian"},
    )

    peft = replace(
        LORA,
        keys={**LORA.keys, "d": "lora_diag"},
        fields={**LORA.fields, "beta": "kasa_config.beta", "gamma": "kasa_config.gamma"},
        fixed={"kasa_config": ...},
        reads=lambda fields, config: fields | {"truncate": True},
        writes=_written,
    )

    outside = frozenset({"beta", "gamma"})

    truncate: bool = False
    beta: float = 1e-4
    gamma: float = 1e-3

    @property
    def identity(self) -> bool:
        return super().identity and not self.truncate

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        if self.truncate and self.rank >= min(w.shape):
            raise ValueError(
                f"KaSA.rank is {self.rank}, and truncating as many components of a weight {list(w.shape)} leaves none: "
                f"give rank < {min(w.shape)}"
            )
        return super().init(rng, w) | {"d": rng.normal(self.rank)}

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        if not self.truncate:
            return {}
        u, s, vh = torch.linalg.svd(wide(w), full_matrices=False)
        return read_off(rng, minus=-u[:, -self.rank :] * s[-self.rank :] / self.scale, v=vh[-self.rank :])

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        down, up = p["a"], p["b"] * p["d"]
        if self.truncate:
            down, up = torch.cat([down, p["v"]], -2), torch.cat([up, p["minus"]], -1)
        return {"down": down, "up": up}


def penalty(net: Planned, adapter: Mapping[str, Leaf]) -> Tensor:
    """beta·Σ d² + gamma·(‖BᵀB − I‖_F + ‖A Aᵀ − I‖_F), summed over the net's KaSA sites: a term for the loss."""
    leaves = [(m, adapter[site]) for site, m in sites_of(net, KaSA).items()]
    return torch.stack([m.beta * p["d"].square().sum() + m.gamma * off_orthogonal(p).sum() for m, p in leaves]).sum()
