"""Folders of several adapters: ms-swift's, PEFT's with named adapters, and those of `save(…, split=True)`."""

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
    """Read the adapters in the sub-folders of `path`, and bind them to `model`.

    Args:
        path: the folder.
        model: the base.
        names: the sub-folders to load, in that order; or {sub-folder: name in the result}. None: all of them.
        options: as for `load`.

    Returns:
        {name: Loaded}.

    Raises:
        FileNotFoundError: `path` has no adapters, or no adapter of a given name.
        ValueError: two adapters would get the same name; or as for `load`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pf.save("adapters/one", net, net.init(seed=1))
        pf.save("adapters/two", net, net.init(seed=2))
        net, adapter = pf.load_all("adapters", net.model)["two"]
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
        raise ValueError(f"load_all: two adapters have the same name in {wanted}: give each its own")
    return {new: load(found[old], model, **options) for old, new in wanted.items()}


def folders(path: Path) -> dict[str, Path]:
    """{name: sub-folder} of those that hold an adapter each."""
    below = sorted(path.iterdir()) if path.is_dir() else []
    mine = [p for p in below if p.is_dir() and p.name != EXTRA]
    return {p.name: p for p in mine if any(m.is_mine(p) for m in FORMATS.values())}
