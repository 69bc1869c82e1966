"""Values beside an adapter: BatchNorm's running statistics, and what else training changes that is no parameter; heads
and rows of a vocabulary that the base does not have."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.formats.tensor_files import Tensors
from peftfn.methods.weights.full import Full
from peftfn.net.net import Adapted
from peftfn.tensors.precision import wide

BUFFER = "is a buffer that differs from the model's (BatchNorm's statistics, say)"
HEAD = "is a parameter that the base did not have (a fresh head), and differs from the model's"
ROWS = "has rows of new tokens that differ from the model's"


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
    file: Tensors, buffers: Mapping[str, Tensor], fresh: Mapping[str, Tensor], wanted: bool, prefix: str = ""
) -> tuple[Tensors, dict[str, Tensor]]:
    """(the file without its buffers and fresh parameters, those that differ from the model's). ValueError, unless they
    are `wanted`, for one that differs, and for one that the model does not have.
    """
    different: dict[str, Tensor] = {}
    mine = [k for k in file.meta if k.startswith(prefix)]
    for key in mine:
        name = key.removeprefix(prefix)
        if name not in buffers and name not in fresh:
            raise ValueError(f"{file.where}: {file.names[key]} is a value that the model does not have")
        have, what = (buffers[name], BUFFER) if name in buffers else (fresh[name], HEAD)
        if (value := differs(file, key, have, wanted, what)) is not None:
            different[name] = value
    return file.renamed(lambda k: None if k in mine else k), different


def compared_rows(
    file: Tensors, known: Mapping[str, Tensor], grown: Any, wanted: bool, prefix: str
) -> tuple[Tensors, dict[str, Tensor]]:
    """(the file without rows of a grown vocabulary, whole parameters with them where they differ from the model's).

    grown: parameter → the rows before those in the file. ValueError as in `compared`, and with its cure where the
    model's vocabulary did not grow.
    """
    mine, different = [k for k in file.meta if k.startswith(prefix)], dict[str, Tensor]()
    for key in mine:
        name = key.removeprefix(prefix)
        first = grown.get(name) if isinstance(grown, dict) else None
        if name not in known or type(first) is not int or first < 0 or not file.meta[key].dim():
            raise ValueError(
                f"{file.where}: {file.names[key]} has rows of a parameter, and nothing says of which, or where"
            )
        have, rows = known[name], file.meta[key].shape[0]
        if len(have) != first + rows:
            raise ValueError(
                f"{file.where}: {file.names[key]}: the vocabulary had {first + rows} rows, and the model has "
                f"{len(have)}: tokens were added before training. "
                f"Do so first: model.resize_token_embeddings({first + rows})"
            )
        if (value := differs(file, key, have[first:], wanted, ROWS)) is not None:
            different[name] = torch.cat([have[:first].detach(), value])
    return file.renamed(lambda k: None if k in mine else k), different


def differs(file: Tensors, key: str, buffer: Tensor, wanted: bool, what: str) -> Tensor | None:
    """The file's value of a buffer where it differs from the model's. ValueError unless it is `wanted`."""
    file.check(key, buffer.shape, buffer.is_floating_point())
    value = file.tensor(key)
    if buffer.is_meta:  # shapes are all there is
        return None
    if torch.equal(wide(buffer).cpu(), value):
        return None
    if not wanted:
        raise ValueError(
            f"{file.where}: {file.names[key]} {what}, and an adapter has none: load(…, buffers=True) returns it in "
            ".buffers; put it into the model, model.load_state_dict(loaded.buffers, strict=False). load_model does both"
        )
    return value.to(buffer)
