"""adapter.safetensors: which key of the file is which tensor of an adapter, or which constant of a plan."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.core.plan import Entry, Plan
from peftfn.formats.files import mismatch
from peftfn.formats.tensor_files import Tensors

BUFFER = "buffer/"
"""What stands before a buffer's name in the file, and before that of a parameter that the base does not have."""
ROWS = "rows/"
"""What stands before the name of a parameter of which the file has the rows that the base does not have."""


def one_save(file: Tensors, config: Mapping[str, Any], where: Path) -> None:
    if file.metadata.get("id") != config["id"]:
        raise ValueError(f"{file.where} and {where} are of different saves: one was interrupted, or is a copy")


def places_in(
    plan: Plan, constants: Mapping[str, Mapping[str, str]], file: Tensors, strict: bool
) -> tuple[dict[str, list[str]], set[str], set[str], dict[str, tuple[torch.Size, torch.Size]]]:
    """(the file's key → the path to its place in the adapter, missing keys, keys without a place, shapes of those of
    another shape).

    Raises ValueError for tensors that do not fit the plan, and, if strict, for missing and unexpected ones.
    """
    specs = {**{n: e.spec for n, e in plan.items()}, **plan.banks}
    places = {key: path_of(key.removeprefix("adapter/"), specs) for key in file.meta if key.startswith("adapter/")}
    want_at = {f"adapter/{n}/{k}": (n, k) for n, spec in specs.items() for k in spec}
    want = want_at.keys()
    used = {key for keys in constants.values() for key in keys.values()}
    stray = {k for k in file.meta if k not in places and k not in used}
    tree: dict[str, Any] = {name: {} for name, spec in specs.items() if not spec}  # all they train is in a bank
    for key, path in places.items():
        put(tree, path, file.meta[key], file.where)
    shapes = {k: (file.meta[k].shape, torch.Size(specs[want_at[k][0]][want_at[k][1]])) for k in want & places.keys()}
    wrong = {} if strict else {k: pair for k, pair in shapes.items() if pair[0] != pair[1]}
    try:
        plan.check(tree)
        missing, unexpected = set[str](), stray
    except (KeyError, ValueError, TypeError) as error:
        missing, unexpected = (want - places.keys()) | wrong.keys(), places.keys() - want | stray
        if not missing and not unexpected:
            raise ValueError(f"{file.where}: {error.args[0]}") from error
    if strict and (missing or unexpected):
        raise mismatch(file.where, missing, unexpected)
    for key in (want & places.keys()) - wrong.keys() if missing or unexpected - stray else ():
        name, k = places[key]
        file.check(key, specs[name][k])
    places = {key: place for key, place in places.items() if key not in wrong}
    return places, missing, unexpected, wrong


def constant_keys(
    name: str, entry: Entry, constants: Mapping[str, Mapping[str, str]], file: Tensors
) -> Mapping[str, str]:
    """Where the file has the constants of a site. ValueError where it has others than the method."""
    keys = constants.get(name, {})
    if keys.keys() != entry.frozen.keys() or not file.meta.keys() >= set(keys.values()):
        raise ValueError(
            f"{file.where}: {name} has constants {sorted(keys)}, and {entry.method} has {sorted(entry.frozen)}"
        )
    for k, key in keys.items():
        like = entry.frozen[k]
        file.check(key, like.shape, like.is_floating_point())
        if not like.is_floating_point() and file.meta[key].dtype != like.dtype:
            raise ValueError(f"{file.where}: {key} is {file.meta[key].dtype}; its indices are {like.dtype}")
    return keys


def flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for k, v in tree.items():
        if isinstance(v, Mapping):
            yield from flat(v, f"{prefix}{k}/")
        else:
            yield f"{prefix}{k}", v


def path_of(key: str, names: Mapping[str, Any]) -> list[str]:
    """A key of `flat` as a path: the first part is one of the names, which may have a slash in it."""
    parts = key.split("/")
    for i in range(1, len(parts)):
        if (name := "/".join(parts[:i])) in names:
            return [name, *parts[i:]]
    return parts


def put(tree: dict[str, Any], path: list[str], t: Tensor, where: Path) -> None:
    *folders, last = path
    for folder in folders:
        tree = tree.setdefault(folder, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{where}: adapter/{'/'.join(path)} is below a tensor")
    if isinstance(tree.get(last), dict):
        raise ValueError(f"{where}: adapter/{'/'.join(path)} is a tensor, and others are below it")
    tree[last] = t
