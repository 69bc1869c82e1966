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
    names: Mapping[str, str] | Iterable[str] | None = None,
    **options: Any,
) -> dict[str, Loaded]:
    """{name: (net, adapter)} of the adapters in the sub-folders of `path`, all bound to `model`.

    Args:
        names: the sub-folders to load, in that order; or sub-folder → the name to give its adapter here. Without it,
            all of them.
        options: as for `load`.

    Raises:
        FileNotFoundError: there is none, or none of a given name.
        ValueError: two would get one name; or as for `load`.
    """
    folder = Path(path)
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
    """{name: sub-folder} of those that hold an adapter each."""
    below = sorted(path.iterdir()) if path.is_dir() else []
    mine = [p for p in below if p.is_dir() and p.name != EXTRA]
    return {p.name: p for p in mine if any(m.is_mine(p) for m in FORMATS.values())}
