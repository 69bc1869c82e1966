"""Banks: adapters by name, of different methods, ranks and targets, in one batch and in bounded memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Condition
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Adapter
from peftfn.many.conform import conform
from peftfn.many.nets import Nets, check_nets
from peftfn.many.register import Register
from peftfn.many.residents import BASE, BankBusy, Slots
from peftfn.net.net import Adapted


class Bank:
    """Adapters by name, of which a fixed number is resident.

    Each of `nets` has its own slots, allocated once. Their number and the ranks of the nets bound the memory, and no
    shape changes (before you call `grow`), so nothing recompiles. You may register any number of adapters: they wait in
    CPU memory, or in files, which are mapped. When a batch names one, it is written into a slot and replaces the least
    recently used one. An adapter of smaller rank, other alpha or fewer targets goes to the smallest net that can hold
    it exactly (`conform`).

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
        self._register = Register([Slots(net, n, prepared) for net, n in zip(nets, sizes, strict=True)])

    def __len__(self) -> int:
        """How many adapters are registered."""
        return len(self._register.waiting)

    def __contains__(self, name: object) -> bool:
        """Whether an adapter of this name is registered."""
        return name in self._register.waiting

    def __repr__(self) -> str:
        slots, used = sum(s.capacity for s in self._register.slots), len(self.resident)
        nets = f"{len(self._register.slots)} net{'s' * (len(self._register.slots) > 1)}"
        model = type(self._register.slots[0].net.model).__name__
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
            return tuple(self._register.waiting)

    @property
    def resident(self) -> tuple[str, ...]:
        """The names of the adapters in slots, net by net, the least recently used first.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            bank = pf.bank({"a": (net, net.init())})
            assert bank.resident == ()
        """
        with self._lock:
            return tuple(name for slots in self._register.slots for name in slots.names)

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
        with self._lock:
            nets = self._register.nets
        found = self._register.made(name, net, adapter, nets)
        with self._lock:
            self._register.put_(name, found)

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
                name = next((victim for slots in self._register.slots if (victim := slots.idle()) is not None), None)
                if name is None:
                    raise ValueError("evict: no resident adapter is idle; wait for a call to end")
            if not self._register.drop_(name):
                raise KeyError(
                    f"{name!r} is not resident; resident: {[n for s in self._register.slots for n in s.names][:8]}"
                )
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
            self._register.check_known([name], "remove")
            self._register.drop_(name)
            del self._register.waiting[name]

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
                    self._register.check_known([name], "fetch")
                    held, _ = self._register.pin_([name])
                    self._register.unpin_(held)
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
            self._register.check_known(wanted, "check")
            self._register.check_room(wanted)

    @contextmanager
    @checks_numbers
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
        with self._held(names, timeout) as (_, stacks, index):
            yield stacks, index

    @checks_numbers
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
        with self._held(names, timeout) as (nets, stacks, index):
            how: Any = {"params": params, "method": method, "common": common, "owners": owners}
            return nets.mixed(stacks, index, *args, **how, **kwargs)

    def grow(self, net: Adapted, capacity: int, *, instead: Sequence[Adapted] = ()) -> None:
        """Give the bank slots of one more net. All adapters stay registered, and those in slots stay there.

        Calls that run end with the nets that they began with. A function that was compiled before compiles anew.

        Args:
            net: on the model of the others.
            capacity: slots of it.
            instead: nets of the bank that it takes the place of. Their adapters move to its slots: the last used ones,
                as many as it has. (Those of a bank with `prepared=True` are fetched again when a batch names them.)

        Raises:
            ValueError: a net on another model or a capacity below 1; what it takes the place of is none of the bank's
                nets, or has adapters that it cannot hold exactly.

        Example:
            model = torch.nn.Sequential(torch.nn.Linear(8, 4))
            small, large = (pf.adapt(model, {"0.weight": pf.LoRA(rank=r)}) for r in (2, 4))
            bank = pf.bank({"a": (small, small.init())})
            bank.grow(large, capacity=2, instead=[small])
            bank.put("b", large, large.init())
        """
        if not isinstance(capacity, int) or capacity < 1:
            raise ValueError(f"grow: capacity is {capacity!r}; give the number of slots of the net, at least 1")
        check_nets("grow", [net, *instead])
        if net.model is not self.nets.nets[0].model:
            raise ValueError("grow: the net adapts another model than the bank's; call adapt on one model object")
        for old in instead:
            if not any(old is mine for mine in self.nets.nets):
                raise ValueError("grow: a net of instead is none of bank.nets.nets: give those whose place it takes")
            try:
                conform(old.init(), old, net)
            except ValueError as e:
                raise ValueError(f"grow: the net cannot hold the adapters of a net of instead exactly. {e}") from e
        new = Slots(net, capacity, self.prepared)
        with self._lock:
            gone = [s for s in self._register.slots if any(s.net is old for old in instead)]
            nets = Nets([*(s.net for s in self._register.slots if s not in gone), net])  # which may refuse
            self._register.replace_(gone, new)
            self.nets = nets
            self._lock.notify_all()

    @contextmanager
    def _held(self, names: Sequence[str], timeout: float | None) -> Iterator[tuple[Nets, list[Adapter], Tensor]]:
        """`holding`, with the nets that the stacks are of."""
        if timeout is not None and not timeout >= 0:
            raise ValueError(f"Bank: timeout is {timeout}; give seconds >= 0, or None to wait without limit")
        end = None if timeout is None else monotonic() + timeout
        register = self._register
        with self._lock:
            while True:
                register.check_known(names, "row")
                wanted = [n for n in dict.fromkeys(names) if n != BASE]
                register.check_room(wanted)
                try:
                    held, place = register.pin_(wanted)
                    break
                except BankBusy:
                    left = None if end is None else end - monotonic()
                    if left is not None and left <= 0:
                        raise
                    self._lock.wait(left)  # holding nothing, so that no two calls wait for each other
            nets, stacks = self.nets, register.stacks
        try:
            yield nets, stacks, torch.tensor([place[n] for n in names], dtype=torch.long)
        finally:
            with self._lock:
                register.unpin_(held)
                self._lock.notify_all()
