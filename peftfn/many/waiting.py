"""What a bank keeps of an adapter that is in no slot: its tensors in memory, or the place of its file."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftfn.core.plan import Adapter, Entry
from peftfn.formats import load
from peftfn.formats.native import TENSORS, check_saved, meaning, read_saved
from peftfn.net.net import Adapted


@dataclass(frozen=True)
class Waiting:
    """A registered adapter outside the slots."""

    net: Adapted
    kept: Adapter | Path
    home: int  # number of the slots it fits
    saved: str | None = None  # the id of the plan that a native file was saved with; None for other formats

    def load(self) -> Mapping[str, Any]:
        if not isinstance(self.kept, Path):
            return self.kept
        if self.saved is not None:
            return read_saved(self.kept, self.net, self.saved)
        net, adapter = load(self.kept, self.net.model)
        same_plan(self.kept, net, self.net)
        return adapter


def located(name: str, path: str | Path, net: Adapted) -> tuple[Path, str | None]:
    """(file or folder, id of its plan if it is native) of an adapter of `net` on disk.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it has another plan than the net.
    """
    path = Path(path)
    file = path / TENSORS if path.is_dir() else path
    if file.is_file() and file.name == TENSORS:
        return file, check_saved(file, net)
    try:
        other, _ = load(path, net.model)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{name}: {e}") from e
    same_plan(path, other, net)
    return path, None


def net_of(path: str | Path, model: nn.Module, known: Iterable[Adapted]) -> Adapted:
    """The net of a file: one of those known, if its adapters mean the same there, or a new one."""
    net, _ = load(path, model)
    return next((other for other in known if _difference(net, other) is None), net)


def same_plan(path: Path, theirs: Adapted, net: Adapted) -> None:
    """ValueError unless an adapter of one net means the same on the other."""
    if (odd := _difference(theirs, net)) is not None:
        have, want = (n.plan[odd].method if odd in n.plan else "no method" for n in (theirs, net))
        raise ValueError(
            f"{path}: {odd}: the file was saved with {have} here, and the net it is put with has {want}, or other "
            "constants: put it with the net that it was saved with, or by its path alone, bank.put(name, path)"
        )


def _difference(one: Adapted, two: Adapted) -> str | None:
    """The first site at which a leaf means one thing for one net and another for the other."""
    return next((n for n in {**one.plan, **two.plan} if not _alike(one.plan.get(n), two.plan.get(n))), None)


def _alike(a: Entry | None, b: Entry | None) -> bool:
    if a is None or b is None or meaning(a.method) != meaning(b.method) or a.frozen.keys() != b.frozen.keys():
        return False
    return a.bank == b.bank and all(torch.equal(t, b.frozen[k]) for k, t in a.frozen.items())
