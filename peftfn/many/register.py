"""What a bank holds: the adapters that are registered, and the slots of its nets in which some of them are resident."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from peftfn.core.plan import Adapter
from peftfn.many.conform import conform
from peftfn.many.homes import home
from peftfn.many.residents import BASE, Slots
from peftfn.many.waiting import Waiting, waiting
from peftfn.model.names import near
from peftfn.net.net import Adapted

Pins = list[tuple[Slots, int]]
"""Slots that a call reads."""


class Register:
    """The state of a bank. Whoever calls holds its lock, except for `made`, which may take its time."""

    def __init__(self, slots: list[Slots]):
        self.slots = slots
        self.waiting: dict[str, Waiting] = {}
        self._homes: WeakKeyDictionary[Adapted, tuple[Slots, bool]] = WeakKeyDictionary()

    @property
    def stacks(self) -> list[Adapter]:
        return [s.stack for s in self.slots]

    @property
    def nets(self) -> list[Adapted]:
        """Those that an adapter may be of: the slots', and others that were put before."""
        return list(dict.fromkeys([*(s.net for s in self.slots), *self._homes]))

    def made(
        self, name: str, net: Adapted | str | Path, adapter: Mapping[str, Any] | str | Path | None, nets: list[Adapted]
    ) -> Waiting:
        """What is to be put: `waiting` of it."""
        return waiting(name, net, adapter, nets, self._home)

    def put_(self, name: str, found: Waiting) -> None:
        self.drop_(name)
        if found.home not in self.slots:  # a wider net took its place meanwhile
            found = replace(found, home=self._home(found.net)[0])
        self.waiting[name] = found

    def drop_(self, name: str) -> bool:
        """Empty the slot of an adapter. False: it is in none."""
        return any(slots.drop_(name) for slots in self.slots)

    def replace_(self, gone: Sequence[Slots], new: Slots) -> None:
        """Give the bank new slots, for all adapters of those that go: what is resident moves, the last used last."""
        self.slots = [s for s in self.slots if s not in gone] + [new]
        self.waiting = {n: replace(w, home=new) if w.home in gone else w for n, w in self.waiting.items()}
        for slots in gone if not new.prepared else ():  # a prepared leaf cannot be padded: it is made again when named
            for name in slots.names:
                new.write_(name, conform(slots.read(name), slots.net, new.net))

    def check_known(self, names: Sequence[str], what: str) -> None:
        """KeyError where a name is not registered; of a row ("row"), it may be the base's."""
        if isinstance(names, str) or not isinstance(names, Iterable):
            what = f"the string {names!r}" if isinstance(names, str) else f"a {type(names).__name__}"
            raise TypeError(f"names is {what}; give a list, one name for each row")
        for row, name in enumerate(names):
            where = f"row {row}: " if what == "row" else ""
            if not isinstance(name, str):
                cure = f"give the name of an adapter{f', or {BASE!r} for the base' if what == 'row' else ''}"
                raise TypeError(f"{where}a name is a string, not {type(name).__name__}: {cure}")
            if name not in self.waiting and (name != BASE or what != "row"):
                known = list(self.waiting)
                hint = near(name, known) if known else "; the bank is empty"
                raise KeyError(f"{where}the bank has no adapter {name!r}{hint}. Register it with bank.put first.")

    def check_room(self, wanted: Sequence[str]) -> None:
        """ValueError where there are more adapters than slots, whoever else reads them."""
        for slots in {self.waiting[n].home for n in wanted}:
            here = [n for n in wanted if self.waiting[n].home is slots]
            n = slots.capacity
            if len(here) > n:
                raise ValueError(
                    f"{here[n]!r}: the batch names {len(here)} adapters of one net, and the bank has {n} slots for it: "
                    "split the batch, or make a bank with a larger capacity"
                )

    def pin_(self, wanted: Sequence[str]) -> tuple[Pins, dict[str, int]]:
        """(slots that are held now, {name: number of its slot among all nets'}), with every adapter resident."""
        held: Pins = []
        place: dict[str, int] = {BASE: -1}
        start = dict(zip(self.slots, accumulate((s.capacity for s in self.slots), initial=0), strict=False))
        try:
            for absent in (False, True):  # pin what is there first, so that it is not what has to go
                for name in wanted:
                    slots = self.waiting[name].home
                    if name not in place and (absent or name in slots.names):
                        if absent:
                            self._fetch_(name, slots)
                        held.append((slots, slots.pin_(name)))
                        place[name] = start[slots] + held[-1][1]
        except BaseException:
            self.unpin_(held)
            raise
        return held, place

    def unpin_(self, held: Pins) -> None:
        for slots, slot in held:
            slots.unpin_(slot)

    def _fetch_(self, name: str, slots: Slots) -> None:
        slots.check_room(name)  # before the file is read
        try:
            adapter = self.waiting[name].ready()
        except FileNotFoundError as e:
            raise FileNotFoundError(
                f"{name!r}: {self.waiting[name].kept} no longer exists; restore it, or call bank.remove({name!r})"
            ) from e
        except ValueError as e:
            raise ValueError(f"{name!r}: {e}") from e
        slots.write_(name, adapter)

    def _home(self, net: Adapted) -> tuple[Slots, bool]:
        """`home`, which is asked once for each net."""
        found = self._homes.get(net)
        if found is None or found[0] not in self.slots:
            found = self._homes[net] = home(net, self.slots)
        return found
