"""Buffers beside an adapter: BatchNorm's running statistics, and what else training changes that is no parameter."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.formats.files import Tensors
from peftfn.methods.weights.full import Full
from peftfn.net.net import Adapted
from peftfn.tensors.precision import wide


def statistics(net: Adapted, given: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """The buffers to save: the model's of modules that the plan trains whole, and those given, which go first.

    Raises ValueError for a given one that the model does not have, or has in another shape.
    """
    whole = {e.site.module for e in net.plan.values() if isinstance(e.method, Full)}
    if not whole and not given:
        return {}
    known: dict[str, Any] = {
        f"{path}.{k}" if path else k: t
        for path, m in net.model.named_modules()
        for k, t in m._buffers.items()
        if t is not None and k not in m._non_persistent_buffers_set
    }
    for name, t in (given or {}).items():
        if name not in known or known[name].shape != t.shape:
            have = f"is {list(known[name].shape)} there" if name in known else "is not there"
            raise ValueError(f"save: buffers has {name} {list(t.shape)}, which {have}; give buffers of the net's model")
    return {n: t for n, t in known.items() if n.rpartition(".")[0] in whole} | dict(given or {})


def compared(
    file: Tensors, buffers: Mapping[str, Tensor], wanted: bool, prefix: str = ""
) -> tuple[Tensors, dict[str, Tensor]]:
    """(the file without its buffers, those that differ from the model's). ValueError, unless they are `wanted`, for
    one that differs, and for one that the model does not have.
    """
    different: dict[str, Tensor] = {}
    mine = [k for k in file.meta if k.startswith(prefix)]
    for key in mine:
        name = key.removeprefix(prefix)
        if name not in buffers:
            raise ValueError(f"{file.where}: {file.names[key]} is a buffer that the model does not have")
        if (value := differs(file, key, buffers[name], wanted)) is not None:
            different[name] = value
    return file.renamed(lambda k: None if k in mine else k), different


def differs(file: Tensors, key: str, buffer: Tensor, wanted: bool) -> Tensor | None:
    """The file's value of a buffer where it differs from the model's. ValueError unless it is `wanted`."""
    file.check(key, buffer.shape, buffer.is_floating_point())
    value = file.tensor(key)
    if torch.equal(wide(buffer).cpu(), value):
        return None
    if not wanted:
        raise ValueError(
            f"{file.where}: {file.names[key]} is a buffer that differs from the model's (BatchNorm's statistics, say), "
            "and an adapter has none: load(…, buffers=True) returns it in .buffers; put it into the model, "
            "model.load_state_dict(loaded.buffers, strict=False)"
        )
    return value.to(buffer)
