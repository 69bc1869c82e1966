"""PEFT's Poly, whose file has several tasks: they share the skills, and each is an adapter here, so that the file is a
stack. What the tasks share is one tensor, expanded."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.formats.files import Loaded
from peftfn.formats.peft_keys import PREFIX
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.weights.poly import Poly
from peftfn.net.net import Adapted
from peftfn.tensors.tree import mapped

LOGITS = "poly_router.module_logits"
COUNT = "n_tasks"


def first_task(config: dict[str, Any], file: Tensors, where: Path) -> Tensors | None:
    """The file as it was, where its configuration has several tasks; `file` and `config` then have the first alone."""
    n = config.get(COUNT)
    if config["peft_type"] != "POLY" or n == 1:
        return None
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{where}: {COUNT} is {n!r}; it must be a positive integer")
    whole = file.renamed(str)
    for key in [k for k in file.meta if k.endswith(f".{LOGITS}")]:
        shape = file.meta[key].shape
        if len(shape) != 2 or len(file.meta[key]) != n or not file.meta[key].is_floating_point():
            raise ValueError(f"{file.where}: {key} has shape {list(shape)}, and {COUNT} is {n}: a row for each task")
        file.replaced([key], key, partial(_first, file.sources[key]), (1, shape[1]))
    config[COUNT] = 1
    return whole


def _first(read: Callable[[], Tensor]) -> Tensor:
    return read()[:1]


def all_tasks(loaded: Loaded, whole: Tensors, found: Mapping[str, Mapping[str, str]]) -> Loaded:
    """The stack of tasks of which `loaded` has the first. found: site → {PEFT's key: the file's key}."""
    keys = {name: found[name][LOGITS] for name in found if LOGITS in found[name]}
    n = len(whole.meta[next(iter(keys.values()))])
    adapter = mapped(loaded.adapter, lambda t: t.expand(n, *t.shape))
    for name, key in keys.items():
        leaf = adapter[name]
        z = next(k for k in leaf if k.rpartition(".")[2] == "z")  # of a chain, where the layer is saved whole too
        leaf[z] = whole.tensor(key, leaf[z].device)
    return replace(loaded, adapter=adapter)


def one_of(net: Adapted, adapter: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the first task of a stack, {PEFT's key: the logits of all tasks}). ValueError unless all but those is shared."""
    if not any(isinstance(e.method, Poly) for e in net.plan.values()):
        raise ValueError(
            "save: tasks=True is for multitask prompts and for Poly; save the adapters of a stack one by one"
        )
    logits = dict[str, Tensor]()
    for name, leaf in adapter.items():
        poly = name in net.plan and isinstance(net.plan[name].method, Poly)
        for k, t in leaf.items():
            if poly and k == "z":
                logits[f"{PREFIX}{name.rpartition('.')[0]}.{LOGITS}"] = t
            elif not torch.equal(t, t[:1].expand_as(t)):
                raise ValueError(
                    f"{name}: PEFT's tasks share all but their weights of the skills, and here {k} differs between "
                    "tasks: save the adapters of the stack one by one, in folders"
                )
    return mapped(adapter, lambda t: t[0]), logits
