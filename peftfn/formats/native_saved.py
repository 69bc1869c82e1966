"""A folder of the native format that is put with a net there is already, as a bank's are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from peftfn.core.plan import Plan
from peftfn.formats.bases import check_base
from peftfn.formats.buffers import compared, compared_rows
from peftfn.formats.native import CONFIG
from peftfn.formats.native_config import meaning, read, rules_of
from peftfn.formats.native_tensors import BUFFER, ROWS, constant_keys, one_save, places_in, put
from peftfn.formats.tensor_files import Tensors, opened
from peftfn.net.net import Adapted


def check_saved(path: Path, net: Adapted) -> str:
    """The id of the plan that a file of tensors was saved with.

    Raises:
        FileNotFoundError: it, or its configuration, is missing.
        ValueError: it does not hold an adapter, its plan is not the net's (same sites, methods and constants), or it
            was made on another base.
    """
    where = path.with_name(CONFIG)
    config = read(where)
    rules, taken = rules_of(config, where)
    theirs = {name: rules[rule] for name, rule in taken.items()}
    for name in dict.fromkeys([*theirs, *net.plan]):
        saved, mine = theirs.get(name), net.plan[name].method if name in net.plan else None
        if saved is None or mine is None or (saved != mine and meaning(saved) != meaning(mine)):
            raise ValueError(
                f"{path}: {name}: the file was saved with {saved or 'no method'} here, and the net it is put with has "
                f"{mine or 'none'}: put it with the net that it was saved with, which peftfn.load returns"
            )
        if (shape := config["sites"][name]["shape"]) != list(net.plan[name].site.shape):
            raise ValueError(f"{path}: {name} is {shape} in the file, and {list(net.plan[name].site.shape)} in the net")
    known = dict(net.model.named_parameters(remove_duplicate=False))
    with opened(path) as file:
        one_save(file, config, where)
        file, _ = compared_rows(file, known, config.get("grown", {}), False, ROWS)
        file, _ = compared(file, dict(net.model.named_buffers()), known, False, BUFFER)
        places_in(net.plan, config["constants"], file, True)
        _same_constants(net.plan, config["constants"], file)
    names = config.get("extra", {}).get("base_model_name_or_path"), getattr(net.model, "name_or_path", None)
    check_base(config.get("base", {}), known, names, where)
    return str(config["id"])


def read_saved(path: Path, net: Adapted, plan: str) -> dict[str, Any]:
    """The adapter in a file of tensors that fits the net, on the CPU. The file is mapped for as long as it takes.

    plan: what `check_saved` returned; a file that was saved with another plan since then is checked again.
    """
    with opened(path) as file:
        if file.metadata.get("id") != plan:
            check_saved(path, net)
        constants = {
            "": {key: key for key in file.meta if key.startswith(("frozen/", BUFFER, ROWS))}
        }  # by `check_saved`
        places, *_ = places_in(net.plan, constants, file, True)
        adapter: dict[str, Any] = {name: {} for name, e in net.plan.items() if not e.spec}
        for key, place in places.items():
            put(adapter, place, file.tensor(key, exact=True), path)
    return adapter


def _same_constants(plan: Plan, constants: Mapping[str, Mapping[str, str]], file: Tensors) -> None:
    """ValueError unless the file's constants are the plan's, bit for bit."""
    for name, entry in plan.items():
        keys = constant_keys(name, entry, constants, file)
        for k, key in keys.items():
            mine = entry.frozen[k]
            if not torch.equal(file.tensor(key, exact=True), mine.cpu()):
                raise ValueError(
                    f"{file.where}: {name}: its constant {k} differs from the net's: adapt with the same seed, or "
                    "put it with the net that it was saved with, which peftfn.load returns"
                )
