"""PEFT's shorter files: without what a seed determines, or with VB-LoRA's largest weights alone. PEFT reads them."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.core.make import make
from peftfn.core.plan import Plan
from peftfn.formats.peft_keys import rows
from peftfn.methods.weights.vblora import VBLoRA
from peftfn.model.model import Model
from peftfn.net.net import Adapted

SEEDED = {
    "VERA": "save_projection",
    "RANDLORA": "save_projection",
    "PVERA": "save_projection",
    "UNILORA": "save_indices",
}
"""Types whose constants follow from a seed → the configuration's key that says whether the file has them."""
_KINDS = ((1 << 8, torch.uint8), (1 << 15, torch.int16), (1 << 31, torch.int32))
"""Vectors of a bank, less than this → the dtype in which PEFT writes their indices."""


def compact(
    net: Adapted, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The shorter (configuration, tensors). ValueError where PEFT has none, or it would mean something else."""
    kind = config["peft_type"]
    if kind == "VBLORA":
        return config | {"save_only_topk_weights": True}, _largest(net.plan, tensors)
    if kind not in SEEDED:
        raise ValueError(
            f"save: compact=True is for {', '.join((*SEEDED, 'VBLORA'))}, and PEFT's {kind} has no shorter form"
        )
    drawn = make(Model.of(net.model), net.plan.rules, 0, taken={n: e.rule for n, e in net.plan.items()})
    gone: set[str] = set()
    for name, e in net.plan.items():
        if e.method.peft is None or e.method.peft.type != kind:
            continue
        for k, t in e.frozen.items():
            if not torch.equal(t, drawn[name].frozen[k].to(t.device)):
                raise ValueError(
                    f"{name}: its constant {k} is not the one that {e.method} draws by its seed: save without "
                    "compact=True"
                )
            if (key := e.method.peft.shared.get(k)) is not None:
                gone |= {f"base_model.{r}" for r in rows(key, t.shape)}
            elif (own := e.method.peft.keys.get(k)) is not None:
                gone |= {key for key in tensors if key.endswith(f".{e.site.module}.{own}")}
    return config | {SEEDED[kind]: False}, {k: t for k, t in tensors.items() if k not in gone}


def _largest(plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VB-LoRA's logits [rows, pieces, vectors] → the k largest's indices, and all but the last of their weights."""
    method = next(e.method for e in plan.values() if isinstance(e.method, VBLoRA))
    dtype = next((d for most, d in _KINDS if method.vectors < most), torch.int64)
    out: dict[str, Tensor] = {}
    for key, t in tensors.items():
        if "vblora_logits" not in key:
            out[key] = t
            continue
        top, at = t.float().topk(method.topk)
        w = torch.softmax(top, -1)[..., :-1]
        # a reader takes the last weight for what is left of one, which rounding may not make negative
        w = torch.where(w.sum(-1, keepdim=True) >= 1, w * (1 - 4 * torch.finfo(w.dtype).eps), w)
        out |= {f"{key}_topk_indices": at.to(dtype), f"{key}_topk_weights": w.contiguous()}
    return out
