"""W + U D with U and D made of LoRA's A and B: the base of LoRA's variants."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.fields import at_most
from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import _LowRank
from peftfn.methods.weights.lora import LoRA
from peftfn.tensors.precision import wide


@dataclass(frozen=True)
class _Variant(_LowRank, LoRA):
    """LoRA's hyper-parameters and leaf without a bias; `prepare` gives the factors. (A class variable takes a field
    away that a variant has no use for.)"""

    peft = replace(LoRA.peft, fields={k: v for k, v in LoRA.peft.fields.items() if k != "lora_bias"})

    lora_bias: ClassVar[bool] = False  # type: ignore[misc]
    scale = LoRA.scale

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        return {"down": p["a"], "up": p["b"]}


@dataclass(frozen=True)
class _FromWeight(_Variant):
    """A change that is a difference from where it started: from factors of the weight, which are also constants.

    So the base stays what it is, and the start is the identity, exactly. `prepare` writes the difference
    B A − B₀A₀ = (B − B₀) A₀ + B (A − A₀), whose terms are as small as itself: nothing large cancels in low precision.
    """

    init_weights: ClassVar[str] = "default"  # type: ignore[misc]
    padding = None  # where it starts from has its own rank

    def factors(self, rng: Rng, w: Tensor) -> Leaf:
        """The leaf to start from, w at least fp32. Called for leaf and constants: draw nothing from the seed."""
        raise NotImplementedError

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        at_most(self, "rank", out=w.shape[0], **{"in": w.shape[1]})
        known = {k[:-1]: t for k, t in rng.constants.items() if k[-1] == "0" and t.is_meta == w.is_meta}
        return {k: t.to(rng.dtype, copy=True) for k, t in known.items()} or read_off(rng, **self.factors(rng, wide(w)))

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        return {f"{k}0": t for k, t in read_off(rng, **self.factors(rng, wide(w))).items()}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        a, b, a0, b0 = p["a"], p["b"], p["a0"], p["b0"]
        return {"down": torch.cat([a0, a - a0], -2), "up": torch.cat([b - b0, b], -1)}


def read_off(rng: Rng, **tensors: Tensor) -> Leaf:
    """Tensors read off a weight, as a leaf or constants: rounded to fp32 first, so that both are the same values."""
    return {k: t.float().to(rng.dtype) for k, t in tensors.items()}


def leaves_of(name: str, adapter: Mapping[str, Leaf], *keys: str) -> dict[str, Leaf]:
    """The leaves of the method `name`, known by their tensors' names. ValueError if there are none."""
    found = {n: p for n, p in adapter.items() if p.keys() == set(keys)}
    if not found:
        raise ValueError(f"none of the adapter's {len(adapter)} leaves is one of {name}, with {sorted(keys)}")
    return found
