"""Folders of several adapters: ms-swift's, PEFT's with named adapters, and those of `save(…, split=True)`."""

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftfn.formats import FILES, FORMATS, hub, load, save
from peftfn.formats.files import Loaded, write
from peftfn.formats.kohya import FILE
from peftfn.formats.peft import PICKLE
from peftfn.formats.peft_write import documents
from peftfn.formats.swift import EXTRA
from peftfn.net.net import Adapted

DEFAULT = "default"
"""The name of the adapter in the folder itself, as PEFT has it."""
FOLDER_FILES = (*sorted(FILES - {PICKLE}), FILE)
"""What adapters in folders have: all that is fetched of a repository of several."""


def load_all(
    path: str | PathLike[str],
    model: nn.Module,
    names: Mapping[str, str] | Iterable[str] | str | None = None,
    *,
    revision: str | None = None,
    hub_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Loaded]:
    """Read the adapters in a folder, and bind them to `model`.

    They are those in its sub-folders, by their names, and the one in `path` itself as "default", which is where PEFT
    puts the adapter of that name.

    Args:
        path: the folder, or a Hub repository "owner/name", of which the adapters' files alone are fetched.
        model: the base.
        names: the adapters to load, in that order, or one name; or {name: name in the result}. None: all of them.
        revision, hub_options: as for `load`.
        options: further options of `load`.

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
    names = [names] if isinstance(names, str) else names
    if "subfolder" in options:
        raise TypeError("load_all has no subfolder: give the folder's own path, or names=")
    files = (*FOLDER_FILES, *((PICKLE,) if options.get("pickled") else ()))
    folder = hub.find_all(path, files, revision=revision, options=hub_options)
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
    """{name: folder} of those that hold an adapter each: the sub-folders, and the folder itself as "default"."""
    below = sorted(path.iterdir()) if path.is_dir() else []
    mine = [p for p in below if p.is_dir() and p.name != EXTRA]
    found = {p.name: p for p in mine if any(m.is_mine(p) for m in FORMATS.values())}
    if path.is_dir() and any(m.is_mine(path) for name, m in FORMATS.items() if name != "swift"):
        if DEFAULT in found:
            raise ValueError(f"{path} and {found[DEFAULT]} are both the adapter 'default': load each by its own path")
        found = {DEFAULT: path, **found}
    return found


def save_view(
    path: Path,
    adapters: Mapping[str, tuple[Adapted, Mapping[str, Any]]],
    buffers: Mapping[str, Tensor],
    name: str,
    state: Mapping[str, Tensor],
) -> None:
    """Write the adapters of a module view where `load_all` reads them, each in PEFT's format if it has a form there,
    and else in the native one; and the view's `state` to the file `name`. buffers: as for `save`.
    """
    formats = {n: "peft" if _in_peft(*pair, buffers) else "native" for n, pair in adapters.items()}
    for n, (net, adapter) in adapters.items():
        save(path if n == DEFAULT else path / n, net, adapter, format=formats[n], buffers=buffers)
    write(path / name, state)


def _in_peft(net: Adapted, adapter: Mapping[str, Any], buffers: Mapping[str, Tensor]) -> bool:
    try:
        documents(net, adapter, buffers=buffers)
    except ValueError:
        return False
    return True
