"""What a bank keeps of an adapter that is in no slot: its tensors in memory, or the place of its file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftfn.core.plan import Adapter, Entry
from peftfn.formats import load
from peftfn.formats.native import TENSORS
from peftfn.formats.native_config import meaning
from peftfn.formats.native_saved import check_saved, read_saved
from peftfn.many.conform import conform
from peftfn.many.residents import BASE, Slots, check_structure
from peftfn.net.net import Adapted
from peftfn.tensors.tree import mapped


@dataclass(frozen=True)
class Waiting:
    """A registered adapter outside the slots."""

    net: Adapted
    kept: Adapter | Path
    home: Slots  # those that it fits
    saved: str | None = None  # the id of the plan that a native file was saved with; None for other formats

    def ready(self) -> Mapping[str, Any]:
        """The adapter in the form that its slot holds."""
        net, adapter = self.home.net, self._loaded()
        if self.net is not net:
            adapter = conform(adapter, self.net, net)
        return net.prepare(adapter) if self.home.prepared else adapter

    def _loaded(self) -> Mapping[str, Any]:
        if not isinstance(self.kept, Path):
            return self.kept
        if self.saved is not None:
            return read_saved(self.kept, self.net, self.saved)
        net, adapter = load(self.kept, self.net.model)
        same_plan(self.kept, net, self.net)
        return adapter


def waiting(
    name: str,
    net: Adapted | str | Path,
    adapter: Mapping[str, Any] | str | Path | None,
    known: Sequence[Adapted],
    home: Callable[[Adapted], tuple[Slots, bool]],
) -> Waiting:
    """What a bank keeps of an adapter that it is given: see `Bank.put`.

    Args:
        name, net, adapter: as for `Bank.put`.
        known: nets that the adapter of a path may be of.
        home: the slots that hold any adapter of a net, and whether the two have the same plan.
    """
    if not isinstance(name, str) or name == BASE:
        raise ValueError(
            f"put: {name!r} cannot name an adapter: give a string other than {BASE!r}, which names the base"
        )
    alone = isinstance(net, str | Path) and adapter is None
    if not alone and (not isinstance(net, Adapted) or adapter is None):
        raise TypeError(
            f"put: {name!r}: give put(name, net, adapter), with the net that the adapter belongs to, or "
            f"put(name, path); net is a {type(net).__name__} and adapter a {type(adapter).__name__}"
        )
    kept: Adapter | Path | None = None
    saved, path = None, net if alone else adapter
    if isinstance(path, str | Path):
        net, kept, saved = located(name, path, net if isinstance(net, Adapted) else None, known)
    assert isinstance(net, Adapted)
    slots, same = home(net)
    if kept is None:
        assert isinstance(adapter, Mapping)
        net.plan.check(adapter)
        copy: Adapter = mapped(adapter, lambda t: t.detach().to("cpu", copy=True))
        check_structure(name, copy if net is slots.net else conform(copy, net, slots.net), slots.stack, slots.net)
        kept = copy
    return Waiting(slots.net if same else net, kept, slots, saved)


def located(
    name: str, path: str | Path, net: Adapted | None, known: Sequence[Adapted]
) -> tuple[Adapted, Path, str | None]:
    """(net, file or folder, id of its plan if it is native) of an adapter on disk.

    Args:
        net: the net that it belongs to; None is what the file says: one of those known, if it means the same, or a new
            one of their model.

    Raises:
        FileNotFoundError: there is no adapter.
        ValueError: it has another plan than the net.
    """
    path = Path(path)
    file = path / TENSORS if path.is_dir() else path
    native = file.is_file() and file.name == TENSORS
    if net is None or not native:
        try:
            theirs, _ = load(path, known[0].model)
        except FileNotFoundError as e:
            raise FileNotFoundError(f"{name}: {e}") from e
        if net is None:
            net = next((other for other in known if _difference(theirs, other) is None), theirs)
        same_plan(path, theirs, net)
    return (net, file, check_saved(file, net)) if native else (net, path, None)


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
