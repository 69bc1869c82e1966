"""AdapterHub's prefixes: of one MLP for all layers, or flat; read as the keys and values that come of it.

Its models give their tokens the positions that they have without a prefix: `PrefixTuning(shifts=False)`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.formats.adapterhub_place import Read
from peftfn.methods.inputs.prefix import PrefixTuning
from peftfn.methods.modules.bottleneck import ACTIVATIONS

_FLAT = {"control_trans"}
_MLP = {
    "wte.weight",
    "control_trans.0.weight",
    "control_trans.0.bias",
    "control_trans.2.weight",
    "control_trans.2.bias",
}


def read(r: Read, at: Mapping[str, tuple[Mapping[str, Callable[[], Tensor]], Any]]) -> None:
    """The prefix at the model's only backbone. The file has it once for each layer that shares it."""
    r.one("use_gating", False)
    r.one("dropout", 0.0)
    r.one("leave_out", [])
    several = list(r.model.backbones)
    where = {k.partition(".")[0] for tensors, _ in at.values() for k in tensors}
    if len(several) != 1 or where - {"self_prefix", "self"}:
        raise ValueError(
            f"{r.where}: it has a prefix at {', '.join(sorted(where))} of {len(several)} backbones; this release reads "
            "the one before the self-attention of a model with one"
        )
    copies = [{k.partition(".")[2]: f() for k, f in tensors.items()} for tensors, _ in at.values()]
    first = copies[0]
    if any(c.keys() != first.keys() or any(not torch.equal(c[k], first[k]) for k in c) for c in copies):
        raise ValueError(f"{r.where}: its layers have different copies of the prefix, which they share")
    if first.keys() not in (_FLAT, _MLP):
        raise ValueError(
            f"{r.where}: its prefix has {sorted(first)}; this release reads {sorted(_MLP)}, or {sorted(_FLAT)}"
        )
    n = int(r.config["prefix_length"])
    if (values := first.get("control_trans")) is None:
        inner = F.linear(first["wte.weight"], first["control_trans.0.weight"], first["control_trans.0.bias"])
        values = F.linear(
            ACTIVATIONS[r.activation()](inner), first["control_trans.2.weight"], first["control_trans.2.bias"]
        )
    if values.numel() % n:
        raise ValueError(f"{r.where}: prefix_length is {n}, and its tensors are of another number of positions")
    kv = values.reshape(n, -1)
    r.put(several[0], PrefixTuning(n, shifts=False), {"kv": lambda: kv})
