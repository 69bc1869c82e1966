"""The slots of a bank: the resident adapters of one net, in a stack of fixed size."""

from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from peftfn.core.plan import Adapter
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


class Slots:
    """A stack of fixed size, and which adapter occupies which slot. Whoever calls holds the bank's lock."""

    def __init__(self, net: Adapted, capacity: int, prepared: bool):
        self.net, self.capacity, self.prepared = net, capacity, prepared
        leaf = net.prepare(net.init()) if prepared else net.init()
        self.stack: Adapter = mapped(leaf, lambda t: t.detach().expand(capacity, *t.shape).clone())  # [capacity, …]
        self.free = list(range(capacity))[::-1]
        self.names: OrderedDict[str, int] = OrderedDict()  # name → slot, least recently used first
        self.pins: Counter[int] = Counter()  # slot → calls that read it now
        self.retired: set[int] = set()  # slots to free when nobody reads them any more

    def idle(self) -> str | None:
        """The least recently used adapter that no call reads."""
        return next((name for name, slot in self.names.items() if slot not in self.pins), None)

    def check_room(self, name: str) -> None:
        """BankBusy where there is no slot for one more adapter."""
        if not self.free and self.idle() is None:
            raise BankBusy(
                f"{name!r}: running calls read all {self.capacity} slots: wait for one to end, with timeout=seconds, "
                "or make a bank with a larger capacity"
            )

    def write_(self, name: str, adapter: Mapping[str, Any]) -> None:
        """Make an adapter resident, in place of the least recently used one where no slot is free."""
        self.check_room(name)
        check_structure(name, adapter, self.stack)
        if not self.free:
            victim = self.idle()
            assert victim is not None
            self.drop_(victim)
        slot = self.free.pop()
        with torch.no_grad():
            for site, leaf in self.stack.items():
                for k, t in leaf.items():
                    t[slot].copy_(adapter[site][k])
        self.names[name] = slot

    def read(self, name: str) -> Adapter:
        """A resident adapter: views of the stack."""
        slot = self.names[name]
        out: Adapter = mapped(self.stack, lambda t: t[slot])
        return out

    def pin_(self, name: str) -> int:
        """Keep an adapter where it is until `unpin_`, and return its slot."""
        slot = self.names[name]
        self.names.move_to_end(name)
        self.pins[slot] += 1
        return slot

    def unpin_(self, slot: int) -> None:
        self.pins[slot] -= 1
        if not self.pins[slot]:
            del self.pins[slot]
            if slot in self.retired:
                self.retired.remove(slot)
                self.free.append(slot)

    def drop_(self, name: str) -> bool:
        """Empty an adapter's slot, once no call reads it any more. False: it is in none."""
        slot = self.names.pop(name, None)
        if slot is not None:
            self.retired.add(slot) if slot in self.pins else self.free.append(slot)
        return slot is not None


def check_structure(name: str, adapter: Mapping[str, Any], stack: Adapter, net: Adapted | None = None) -> None:
    """ValueError unless the adapter has the stack's tensors, or may have them once `net` has prepared it."""
    for site, leaf in stack.items():
        plain = net.plan[site].spec.keys() if net is not None and site in net.plan else leaf.keys()
        if adapter[site].keys() not in (leaf.keys(), plain):
            raise ValueError(
                f"{name}: {site} has {sorted(adapter[site])}, and its slot holds {sorted(leaf)}: a sum or scaling has "
                "no fixed shape, and prepared adapters need a bank with prepared=True"
            )
