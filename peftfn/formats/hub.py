"""Where an adapter's files are: a path, or a repository of the Hugging Face hub. All that ever touches the network."""

import re
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

NAMES = ("*.json", "*.safetensors")
TOKENIZER = ("*.txt", "*.model", "*.jinja")
"""What a tokenizer may have besides json."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find(
    path: str | PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    pickled: bool = False,
    more: Iterable[str] = (),
    options: Mapping[str, Any] | None = None,
) -> Path:
    """The local path of `path`, or of the hub's repository of that name, or of what is at `subfolder` in it.

    more: further files to fetch. options: further arguments of `snapshot_download`.
    """
    where = Path(path)
    if not where.exists():
        wanted = [*NAMES, *(("*.bin",) if pickled else ()), *more]
        if subfolder:
            wanted = [subfolder, *(f"{subfolder}/{n}" for n in wanted)]
        # without a subfolder, only what is at the top ("*" would match a "/" too)
        where = _fetched(path, revision, wanted, None if subfolder else ["*/*"], options or {})
    elif options:
        raise ValueError(f"load: hub_options are for the Hub, and {where} is a local path: leave them out")
    elif revision is not None:
        raise ValueError(f"load: revision={revision!r} is for the Hub, and {where} is a local path: leave it out")
    where = where / subfolder if subfolder else where
    if not where.exists():
        raise FileNotFoundError(f"{where} does not exist")
    return where


def find_all(
    path: str | PathLike[str],
    files: Iterable[str],
    *,
    revision: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """The local path of `path`, or of the hub's repository of that name with these files at the top and in the folders
    below: adapters, and not the models that may be there too.
    """
    where = Path(path)
    if where.exists():
        return find(path, revision=revision, options=options)
    return _fetched(path, revision, [n for f in files for n in (f, f"*/{f}")], None, options or {})


def _fetched(
    path: str | PathLike[str],
    revision: str | None,
    wanted: list[str],
    ignored: list[str] | None,
    options: Mapping[str, Any],
) -> Path:
    name = str(path)
    if not isinstance(path, str) or not is_repository(name):
        raise FileNotFoundError(f'{name} does not exist and is not a Hub repository ("owner/name")')
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as e:
        raise FileNotFoundError(f"{name} does not exist; to read it from the Hub, pip install huggingface_hub") from e
    mine: dict[str, Any] = {"revision": revision, "allow_patterns": wanted, "ignore_patterns": ignored}
    if taken := sorted(mine.keys() & options.keys()):
        raise ValueError(f"load: hub_options has {taken[0]!r}, which load itself gives")
    return Path(snapshot_download(name, **mine, **options))


def is_repository(name: str) -> bool:
    """Whether the hub could have a repository of this name, "owner/name"."""
    return _REPOSITORY.fullmatch(name) is not None and ".." not in name
