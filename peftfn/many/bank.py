"""Banks: adapters by name, of different methods, ranks and targets, in one batch and in bounded memory."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from peftfn.core.plan import Adapter
from peftfn.many.conform import conform
from peftfn.many.nets import Nets, check_nets
from peftfn.many.waiting import Waiting, located
from peftfn.model.names import near
from peftfn.net.net import Adapted
from peftfn.tensors.tree import mapped

BASE = "__base__"
"""The name of a row without an adapter."""


class BankBusy(ValueError):
    """Raised when running calls read all slots that a batch needs. Wait for one to end with `timeout=`.

    Example:
        assert issubclass(pf.BankBusy, ValueError)
        # with bank.holding(names, timeout=5.0): … waits five seconds before it raises
    """


@dataclass
class _Slots:
    """The resident adapters of one net: a fixed-size stack, and which adapter occupies which slot."""

    net: Adapted
    start: int  # number of its first slot among those of all nets
    stack: Adapter  # [capacity, …]
    capacity: int
    free: list[int]
    names: "OrderedDict[str, int]" = field(default_factory=OrderedDict)  # name → slot, least recently used first
    pins: dict[int, int] = field(default_factory=dict)  # slot → calls that read it now
    retired: set[int] = field(default_factory=set)  # slots to free when nobody reads them any more


class Bank:
    """Adapters by name, of which a fixed number is resident.

    Each of `nets` has its own slots, allocated once. Their number and the ranks of the nets bound the memory, and no
    shape ever changes, so nothing recompiles. You may register any number of adapters: they wait in CPU memory, or in
    files, which are mapped. When a batch names one, it is written into a slot and replaces the least recently used one.
    An adapter of smaller rank, other alpha or fewer targets goes to the smallest net that can hold it exactly
    (`conform`).

    Many threads may call `apply` while others call `put` and `evict`. A call holds the slots it reads until it ends; an
    adapter put meanwhile goes to another slot. A bank does not train: the gradient of a call reaches its inputs only,
    and torch raises if a slot was written since. Train with `net.mixed` or `Nets.mixed`.

    Args:
        nets: nets on one model; they set the shapes of the slots.
        capacity: slots of each net; one number, or one for each net.
        prepared: whether to keep adapters prepared (`net.prepare`), which saves work in each call. Valid until the
            base's parameters change; `put` again after that.

    Raises:
        ValueError: no nets, nets on different models, or a capacity below 1.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        bank = pf.Bank([net], capacity=2)
        for i in range(5):
            bank.put(f"user{i}", net, net.init(seed=i))
        y = bank.apply(["user0", "user3", "__base__"], torch.randn(3, 8))
    """

    def __init__(self, nets: Sequence[Adapted], capacity: int | Sequence[int], *, prepared: bool = False):
        check_nets("Bank", nets)
        sizes = [capacity] * len(nets) if isinstance(capacity, int) else list(capacity)
        if len(sizes) != len(nets) or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(f"Bank: capacity is {capacity!r}; give the number of slots of each net, at least 1")
        self.nets, self.prepared = Nets(nets), prepared
        self._lock = Condition()
        self._waiting: dict[str, Waiting] = {}
        self._homes: WeakKeyDictionary[Adapted, tuple[int, bool]] = WeakKeyDictionary()
        self._slots: list[_Slots] = []
        start = 0
        for net, n in zip(nets, sizes, strict=True):
            leaf = net.prepare(net.init()) if prepared else net.init()
            room = mapped(leaf, lambda t, n=n: t.detach().expand(n, *t.shape).clone())  # type: ignore[misc]
            self._slots.append(_Slots(net, start, room, n, list(range(n))[::-1]))
            start += n

    def __len__(self) -> int:
        """How many adapters are registered."""
        return len(self._waiting)

    def __contains__(self, name: object) -> bool:
        """Whether an adapter of this name is registered."""
        return name in self._waiting

    def __repr__(self) -> str:
        slots, used = sum(s.capacity for s in self._slots), len(self.resident)
        nets = f"{len(self._slots)} net{'s' * (len(self._slots) > 1)}"
        model = type(self._slots[0].net.model).__name__
        return f"Bank({len(self)} adapters, {used} of them in {slots} slots, {nets} of {model})"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all registered adapters.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            bank = pf.bank({"a": (net, net.init()), "b": (net, net.init())})
            assert bank.names == ("a", "b")
        """
        with self._lock:
            return tuple(self._waiting)

    @property
    def resident(self) -> tuple[str, ...]:
        """The names of the adapters in slots, net by net, the least recently used first.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            bank = pf.bank({"a": (net, net.init())})
            assert bank.resident == ()
        """
        with self._lock:
            return tuple(name for slots in self._slots for name in slots.names)

    def put(self, name: str, net: Adapted | str | Path, adapter: Mapping[str, Any] | str | Path | None = None) -> None:
        """Register an adapter, or replace the one of that name. Running calls finish with the old one.

        Write `put(name, net, adapter)` or `put(name, path)`.

        Args:
            name: any name but "__base__".
            net: the net of the adapter. It may have another rank and other targets than the bank's nets. Or the path of
                an adapter in any format that `peftfn.load` reads, which says its net itself.
            adapter: a tree, which is copied to the CPU; or a path. A file is read again each time its adapter is
                fetched: the native format is mapped, any other goes through `peftfn.load`, which takes longer.

        Raises:
            ValueError: no net of the bank can hold it exactly, with the reason for each; or the file was saved with
                other rules than the net's.
            FileNotFoundError: the path has no adapter.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            bank = pf.Bank([net], capacity=1)
            bank.put("a", net, net.init())
            pf.save("b", net, net.init(seed=1), format="peft")
            bank.put("b", "b")
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
        kept: Any = None
        saved, path = None, net if alone else adapter
        if isinstance(path, str | Path):
            known = list(dict.fromkeys([*(s.net for s in self._slots), *self._homes]))
            net, kept, saved = located(name, path, net if isinstance(net, Adapted) else None, known)
        assert isinstance(net, Adapted)
        home, same = self._home(net)
        mine = self._slots[home].net
        if kept is None:
            assert isinstance(adapter, Mapping)
            net.plan.check(adapter)
            kept = mapped(adapter, lambda t: t.detach().to("cpu", copy=True))
            _same_structure(name, kept if net is mine else conform(kept, net, mine), self._slots[home].stack, mine)
        with self._lock:
            self._drop(name)
            self._waiting[name] = Waiting(mine if same else net, kept, home, saved)

    def evict(self, name: str | None = None) -> str:
        """Remove an adapter from its slot; it stays registered.

        Args:
            name: which; None: the least recently used one that no call reads.

        Returns:
            Its name.

        Raises:
            KeyError: it is not resident.
            ValueError: `name` is None, and running calls read every resident adapter, or none is resident.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            bank = pf.bank({"a": (net, net.init())})
            bank.apply(["a"], torch.randn(1, 8))
            assert bank.evict() == "a" and bank.names == ("a",)
        """
        with self._lock:
            if name is None:
                name = next((victim for slots in self._slots if (victim := _idle(slots)) is not None), None)
                if name is None:
                    raise ValueError("evict: no resident adapter is idle; wait for a call to end")
            if not self._drop(name):
                raise KeyError(f"{name!r} is not resident; resident: {[n for s in self._slots for n in s.names][:8]}")
            return name

    def remove(self, name: str) -> None:
        """Unregister an adapter. Running calls finish with it.

        Raises:
            KeyError: the bank has no adapter of this name.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            bank = pf.bank({"a": (net, net.init())})
            bank.remove("a")
        """
        with self._lock:
            self._known([name], "remove")
            self._drop(name)
            del self._waiting[name]

    def fetch(self, names: Iterable[str]) -> dict[str, Exception]:
        """Write adapters into slots before a batch names them, and return those that fail.

        So one bad name need not end a batch: give its rows to the base, or answer them alone.

        Args:
            names: of adapters; "__base__" is passed over.

        Returns:
            {name: error}, empty where all is well: KeyError for an unknown name, FileNotFoundError or ValueError for a
            file that is gone, broken, or of another adapter, BankBusy where running calls read all slots.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            bank, names = pf.bank({"a": (net, net.init())}), ["a", "b"]
            bad = bank.fetch(names)
            y = bank.apply(["__base__" if n in bad else n for n in names], torch.randn(2, 8))
        """
        failed: dict[str, Exception] = {}
        for name in dict.fromkeys(n for n in names if n != BASE):
            try:
                with self._lock:
                    self._known([name], "fetch")
                    held, _ = self._pinned([name])
                    self._release(held)
            except (KeyError, ValueError, OSError) as e:
                failed[name] = e
        return failed

    def check(self, names: Iterable[str]) -> None:
        """Raise where a batch with these adapters cannot run, whatever else runs; nothing is fetched.

        Args:
            names: of adapters; "__base__" is passed over.

        Raises:
            KeyError: an unknown name.
            ValueError: more adapters of one net than it has slots.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            pf.bank({"a": (net, net.init())}).check(["a", "__base__"])
        """
        with self._lock:
            wanted = [n for n in dict.fromkeys(names) if n != BASE]
            self._known(wanted, "check")
            self._room_for(wanted)

    @contextmanager
    def holding(self, names: Sequence[str], *, timeout: float | None = 0.0) -> Iterator[tuple[list[Adapter], Tensor]]:
        """Keep every named adapter resident until the block ends, and return the arguments of `bank.nets.mixed`.

        Use it with a compiled function: the stacks and the index have the same shapes whatever the names.

        Args:
            names: the adapter of each row; "__base__" is the base.
            timeout: seconds to wait for slots that other calls read; None: without limit. (A block inside another one
                in the same thread would wait for itself.)

        Returns:
            A context manager of (stacks, index): a list with the stack of each net, and an integer tensor [rows].

        Raises:
            KeyError: an unknown name, with its row.
            ValueError: more adapters than slots; or a file that does not fit its net.
            BankBusy: other calls still read all slots after `timeout` seconds.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            bank = pf.bank({"a": (net, net.init())})
            with bank.holding(["a", "__base__"], timeout=1.0) as (stacks, index):
                y = bank.nets.mixed(stacks, index, torch.randn(2, 8))
        """
        end = None if timeout is None else monotonic() + timeout
        with self._lock:
            while True:
                self._known(names, "row")
                wanted = [n for n in dict.fromkeys(names) if n != BASE]
                self._room_for(wanted)
                try:
                    held, place = self._pinned(wanted)
                    break
                except BankBusy:
                    left = None if end is None else end - monotonic()
                    if left is not None and left <= 0:
                        raise
                    self._lock.wait(left)  # holding nothing, so that no two calls wait for each other
        try:
            yield [slots.stack for slots in self._slots], torch.tensor([place[n] for n in names], dtype=torch.long)
        finally:
            with self._lock:
                self._release(held)
                self._lock.notify_all()

    def apply(
        self,
        names: Sequence[str],
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        common: Sequence[str] | None = None,
        owners: Mapping[str, Any] | None = None,
        timeout: float | None = 0.0,
        **kwargs: Any,
    ) -> Any:
        """Run the model on a batch whose row i uses the adapter names[i], in one pass.

        Args:
            names: the adapter of each row; "__base__" is the base. In `generate`, all beams of a row have its adapter.
            args, kwargs, params, method, common, owners: as for `Nets.mixed`.
            timeout: seconds to wait for slots, as for `holding`.

        Returns:
            The model's output.

        Raises:
            KeyError, ValueError, BankBusy: as for `holding`; ValueError also as for `Nets.mixed`.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            bank = pf.bank({"a": (net, net.init(seed=0)), "b": (net, net.init(seed=1))})
            y = bank.apply(["b", "a", "__base__"], torch.randn(3, 8))
        """
        with self.holding(names, timeout=timeout) as (stacks, index):
            how: Any = {"params": params, "method": method, "common": common, "owners": owners}
            return self.nets.mixed(stacks, index, *args, **how, **kwargs)

    # Under the lock.

    def _pinned(self, wanted: list[str]) -> tuple[list[tuple[_Slots, int]], dict[str, int]]:
        """(slots that are held now, {name: number of its slot}), with every adapter resident."""
        held: list[tuple[_Slots, int]] = []
        place: dict[str, int] = {BASE: -1}
        try:
            for absent in (False, True):  # pin what is there first, so that it is not what has to go
                for n in wanted:
                    slots = self._slots[self._waiting[n].home]
                    if n not in place and (absent or n in slots.names):
                        slot = self._fetch(n, slots) if absent else slots.names[n]
                        slots.names.move_to_end(n)
                        slots.pins[slot] = slots.pins.get(slot, 0) + 1
                        held.append((slots, slot))
                        place[n] = slots.start + slot
        except BaseException:
            self._release(held)
            raise
        return held, place

    def _known(self, names: Sequence[str], what: str) -> None:
        if isinstance(names, str):
            raise TypeError(f"names is the string {names!r}; give a list, one name for each row")
        for row, name in enumerate(names):
            if name not in self._waiting and (name != BASE or what != "row"):
                where = f"row {row}: " if what == "row" else ""
                known = list(self._waiting)
                hint = near(name, known) if known else "; the bank is empty"
                raise KeyError(f"{where}the bank has no adapter {name!r}{hint}. Register it with bank.put first.")

    def _room_for(self, wanted: list[str]) -> None:
        for home in {self._waiting[n].home for n in wanted}:
            here = [n for n in wanted if self._waiting[n].home == home]
            n = self._slots[home].capacity
            if len(here) > n:
                raise ValueError(
                    f"{here[n]!r}: the batch names {len(here)} adapters of one net, and the bank has {n} slots for it: "
                    "split the batch, or make a bank with a larger capacity"
                )

    def _fetch(self, name: str, slots: _Slots) -> int:
        if not slots.free:
            victim = _idle(slots)
            if victim is None:
                raise BankBusy(
                    f"{name!r}: running calls read all {slots.capacity} slots: wait for one to end, with "
                    "timeout=seconds, or make a bank with a larger capacity"
                )
        else:
            victim = None
        try:
            adapter = self._ready(self._waiting[name])
        except FileNotFoundError as e:
            raise FileNotFoundError(
                f"{name!r}: {self._waiting[name].kept} no longer exists; restore it, or call bank.remove({name!r})"
            ) from e
        except ValueError as e:
            raise ValueError(f"{name!r}: {e}") from e
        _same_structure(name, adapter, slots.stack)
        if victim is not None:
            self._drop(victim)
        slot = slots.free.pop()
        with torch.no_grad():
            for site, leaf in slots.stack.items():
                for k, t in leaf.items():
                    t[slot].copy_(adapter[site][k])
        slots.names[name] = slot
        return slot

    def _ready(self, waiting: Waiting) -> Mapping[str, Any]:
        """The adapter in the form that its slot holds."""
        net, adapter = self._slots[waiting.home].net, waiting.load()
        if waiting.net is not net:
            adapter = conform(adapter, waiting.net, net)
        return net.prepare(adapter) if self.prepared else adapter

    def _drop(self, name: str) -> bool:
        for slots in self._slots:
            slot = slots.names.pop(name, None)
            if slot is not None:
                if slots.pins.get(slot):
                    slots.retired.add(slot)
                else:
                    slots.free.append(slot)
                return True
        return False

    def _release(self, held: list[tuple[_Slots, int]]) -> None:
        for slots, slot in held:
            slots.pins[slot] -= 1
            if not slots.pins[slot]:
                del slots.pins[slot]
                if slot in slots.retired:
                    slots.retired.remove(slot)
                    slots.free.append(slot)

    def _home(self, net: Adapted) -> tuple[int, bool]:
        """(number of the smallest of the bank's nets that holds any adapter of `net`, whether it is the same plan)."""
        if net not in self._homes:
            why = []
            for i in sorted(range(len(self._slots)), key=lambda i: size(self._slots[i].net)):
                mine = self._slots[i].net
                try:
                    given = net.init()
                    fitted = given if net is mine else conform(given, net, mine)
                    same = fitted.keys() == given.keys() and all(fitted[n] is given[n] for n in given)
                except ValueError as e:
                    why.append(str(e))
                else:
                    self._homes[net] = i, same
                    break
            else:
                raise ValueError("put: no net of the bank can hold this adapter exactly. " + " ".join(why))
        return self._homes[net]


def bank(adapters: Mapping[str, tuple[Adapted, Mapping[str, Any]]], *, prepared: bool = False) -> Bank:
    """Return a bank with a slot for each of these adapters.

    Adapters share a stack where one net can hold them all and its padding at most doubles their size.

    Args:
        adapters: {"a": (net_a, a), "b": (net_b, b), …}, all nets on one model.
        prepared: as for `Bank`.

    Returns:
        A `Bank` in which they are registered.

    Raises:
        ValueError: no adapters, or nets on different models.
        TypeError: not a dict of (net, adapter).

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        bank = pf.bank({"a": (net, net.init(seed=0)), "b": (net, net.init(seed=1))})
        y = bank.apply(["b", "a", "__base__"], torch.randn(3, 8))
    """
    if not adapters:
        raise ValueError("bank: give at least one adapter, as {name: (net, adapter)}")
    if not isinstance(adapters, Mapping) or not all(
        isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], Adapted) for v in adapters.values()
    ):
        raise TypeError("bank: give a dict of name → (net, adapter), with the net that the adapter belongs to")
    nets: list[Adapted] = []
    counts: list[int] = []
    for net in sorted((net for net, _ in adapters.values()), key=size, reverse=True):
        for i, other in enumerate(nets):
            if net is other or (size(other) <= 2 * size(net) and fits(net, other)):
                counts[i] += 1
                break
        else:
            nets.append(net)
            counts.append(1)
    out = Bank(nets, counts, prepared=prepared)
    for name, (net, adapter) in adapters.items():
        out.put(name, net, adapter)
    return out


def size(net: Adapted) -> int:
    """Parameters of an adapter of the net."""
    specs = [e.spec for e in net.plan.values()] + list(net.plan.banks.values())
    return sum(shape.numel() for spec in specs for shape in spec.values())


def fits(net: Adapted, other: Adapted) -> bool:
    """Whether a slot of `other` holds any adapter of `net` exactly."""
    try:
        conform(net.init(), net, other)
    except ValueError:
        return False
    return True


def _idle(slots: _Slots) -> str | None:
    return next((name for name, slot in slots.names.items() if not slots.pins.get(slot)), None)


def _same_structure(name: str, adapter: Mapping[str, Any], stack: Adapter, net: Adapted | None = None) -> None:
    """ValueError unless the adapter has the stack's tensors, or may have them once `net` has prepared it."""
    for site, leaf in stack.items():
        plain = net.plan[site].spec.keys() if net is not None and site in net.plan else leaf.keys()
        if adapter[site].keys() not in (leaf.keys(), plain):
            raise ValueError(
                f"{name}: {site} has {sorted(adapter[site])}, and its slot holds {sorted(leaf)}: a sum or scaling has "
                "no fixed shape, and prepared adapters need a bank with prepared=True"
            )
