"""BD-LoRA: W + s·B A with A or B block-diagonal, so that a layer split over devices needs no exchange for it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, divides
from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.lowrank import LORA, Ranked, lora_alpha


def _read(fields: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """`config["module"]` is the module's name, where the file has patterns for both sides."""
    bd = config["use_bdlora"]
    a, b = (bd.get(f"target_modules_bd_{side}") or () for side in "ab")
    name = config.get("module", "")
    if a and b and not name:
        raise ValueError("use_bdlora has patterns for both sides, and which holds depends on the module's name")
    on_a = any(part in name for part in a) if name else bool(a)
    if not on_a and name and not any(part in name for part in b):
        return fields | {"blocks": 1}  # match_strict=False: a plain LoRA
    return fields | {"blocks": bd.get("nblocks", 1), "side": "a" if on_a else "b"}


def _written(m: "BDLoRA") -> dict[str, Any]:
    """The pattern "" is in every module's name."""
    patterns = {f"target_modules_bd_{side}": [""] if side == m.side else None for side in "ab"}
    return lora_alpha(m) | {"use_bdlora": {**patterns, "nblocks": m.blocks, "match_strict": True}}


@dataclass(frozen=True)
class BDLoRA(Ranked):
    """W + s·B A, with A block-diagonal [rank, in/blocks] and B [out, rank] (side "a"), or A [rank, in] and B
    block-diagonal [out, rank/blocks] (side "b"); s as for `LoRA`. Block i stands in row block i.

    Wang et al., "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving", 2025,
    arXiv:2510.23346.

    Trainable parameters per site: rank·(in + out/blocks), or rank·(in/blocks + out). Use it for LoRA on a model whose
    layers are split over devices.

    Args:
        rank, alpha, rslora, dropout: as for `LoRA`.
        blocks: as many as devices share the layer.
        side: the block-diagonal factor: "a" for layers split by their inputs, "b" for those split by their outputs.

    Raises:
        ValueError: blocks does not divide rank, or the factor's other side.

    Example:
        sides = {"up_proj": pf.BDLoRA(rank=4, blocks=2, side="b"), "down_proj": pf.BDLoRA(rank=4, blocks=2, side="a")}
        mlp = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(8, 16), "down_proj": torch.nn.Linear(16, 8)})
        adapter = pf.adapt(mlp, sides).init(seed=0)
    """

    cases = ({"rank": 4, "alpha": 3.0, "blocks": 2}, {"rank": 2, "blocks": 2, "side": "b"})

    peft = replace(LORA, fixed={"use_bdlora": ...}, reads=_read, writes=_written)

    blocks: PositiveInt = 1
    side: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        super().__post_init__()
        divides(self, "blocks", self.blocks, rank=self.rank)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), r, n = w.shape, self.rank, self.blocks
        if self.side == "b":
            divides(self, "blocks", n, out=out)
            return {"a": rng.kaiming(r, in_), "b": rng.zeros(out, r // n)}
        divides(self, "blocks", n, **{"in": in_})
        return {"a": rng.uniform(r, in_ // n, bound=sqrt(6 * n / in_)), "b": rng.zeros(out, r)}

    def _diagonal(self, t: Tensor) -> Tensor:
        """[rows, columns/blocks] → [rows, columns], zero outside the blocks."""
        eye = torch.eye(self.blocks, dtype=t.dtype, device=t.device)
        return (t.unflatten(0, (self.blocks, -1))[:, :, None] * eye[:, None, :, None]).flatten(2).flatten(0, 1)

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        a, b = p["a"], p["b"]
        return {"down": self._diagonal(a), "up": b} if self.side == "a" else {"down": a, "up": self._diagonal(b)}
