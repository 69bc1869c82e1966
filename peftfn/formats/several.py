"""A folder of several adapters: ms-swift's, PEFT's with names of their own, what `save(…, split=True)` writes."""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from peftfn.formats import FORMATS, load
from peftfn.formats.files import Loaded
from peftfn.formats.swift import EXTRA


def load_all(
    path: str | PathLike[str],
    model: nn.Module,
    names: Mapping[str, str] | Iterable[str] | str | None = None,
    **options: Any,
) -> dict[str, Loaded]:
    """{name: (net, adapter)} of the adapters in a folder, all bound to `model`: those in its sub-folders, by their
    names, and the one in `path` itself as "default", which is where PEFT puts the adapter of that name.

    Args:
        names: the adapters to load, in that order, or one; or name → the name to give the adapter here. Without it,
            all of them.
        options: as for `load`.

    Raises:
        FileNotFoundError: there is none, or none of a given name.
        ValueError: two would get one name; or as for `load`.
    """
    folder, names = Path(path), [names] if isinstance(names, str) else names
    found = folders(folder)
    wanted = (
        {n: n for n in found} if names is None else dict(names) if isinstance(names, Mapping) else {n: n for n in names}
    )
    if lacks := [n for n in wanted if n not in found]:
        raise FileNotFoundError(f"{folder} holds no adapter {lacks[0]!r}; it has {', '.join(found) or 'none'}")
    if not wanted:
        raise FileNotFoundError(f"{folder} holds no adapters")
    if len(set(wanted.values())) < len(wanted):
        raise ValueError(f"load_all: names gives one name to two adapters: {wanted}")
    return {new: load(found[old], model, **options) for old, new in wanted.items()}


def folders(path: Path) -> dict[str, Path]:
    """{name: folder} of those that hold an adapter each: the sub-folders, and the folder itself as "default"."""
    below = sorted(path.iterdir()) if path.is_dir() else []
    mine = [p for p in below if p.is_dir() and p.name != EXTRA]
    found = {p.name: p for p in mine if any(m.is_mine(p) for m in FORMATS.values())}
    if path.is_dir() and any(m.is_mine(path) for name, m in FORMATS.items() if name != "swift"):
        if "default" in found:
            raise ValueError(f"{path} and {found['default']} are both the adapter 'default': load each by its own path")
        found = {"default": path, **found}
    return found
