"""PEFT's tensors in the places of a checked plan: the net and the adapter of a file, each tensor moved once."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from peftfn.core.make import make
from peftfn.core.method import Leaf, Weight
from peftfn.core.plan import Adapter, Entry, Plan
from peftfn.formats import peft_keys as keys
from peftfn.formats.peft_sort import Sorted
from peftfn.net.net import Adapted
from peftfn.tensors.precision import wide


class Filling:
    """One load's values, which the reader checks against the plan before it asks for them.

    at: where the file has each tensor. methods: those of PEFT at its places. The reader notes in made what a method's
    `leaf_from` returned at a site, and in zeros our names of tensors that PEFT left out there.
    """

    def __init__(self, at: Sorted, plan: Plan, methods: Mapping[str, Weight]):
        self.at, self.plan, self.methods = at, plan, methods
        self.made: dict[str, Leaf] = {}
        self.zeros: dict[str, set[str]] = {}
        self.adapter: Adapter = {}
        self.copied = set[tuple[str | None, str, int | None]]()  # (bank, tensor, row) that a site has filled
        self.moved: dict[tuple[str, torch.device], Tensor] = {}  # shared tensors, once for each device
        self.fresh: Plan | None = None

    def filled(self) -> tuple[Adapted, Adapter]:
        """The net and the adapter; of an adapter with missing tensors, those that are there."""
        entries = {name: self.site(name, entry) for name, entry in self.plan.items()}
        weights = self.at.model.weights
        if any(t.is_meta != weights[n].is_meta for n, e in entries.items() for t in e.frozen.values()):
            drawn = self.drawn()
            for n, e in entries.items():
                kept = {k: t for k, t in e.frozen.items() if not t.is_meta}
                entries[n] = replace(e, frozen={**drawn[n].frozen, **kept})
        return Adapted(self.at.model.model, Plan(entries, self.plan.rules, self.plan.banks)), self.adapter

    def site(self, name: str, entry: Entry) -> Entry:
        """Fill one site's leaf; the entry with its constants."""
        at, w = self.at, self.at.model.weights[name]
        leaf, frozen = Leaf(), dict(entry.frozen)
        if name in at.whole:
            diff = entry.site.canonical(at.file.tensor(at.whole[name], w.device)) - wide(entry.site.canonical(w))
            leaf["0.diff" if at.inside(name) else "diff"] = diff
        if name in self.made:
            leaf |= {k: t for k, t in self.made[name].items() if k in entry.spec}
            frozen |= {k: t for k, t in self.made[name].items() if k in frozen}
        elif name in at.places:
            self.method(name, entry, leaf, frozen)
        for k, s in entry.spec.items():
            if k not in leaf and (k in self.zeros.get(name, ()) or name not in at.places):
                leaf[k] = torch.zeros(s, device=w.device)
        self.adapter[name] = leaf
        return replace(entry, frozen=frozen)

    def method(self, name: str, entry: Entry, leaf: Leaf, frozen: Leaf) -> None:
        """The tensors of PEFT's method at a site: its own, its constants, and those it shares."""
        at, place, device = self.at, self.at.places[name], self.at.model.weights[name].device
        before, peft = at.inside(name), keys.described(self.methods[name])
        bank = self.plan.banks[entry.bank] if entry.bank else {}
        for k, key in peft.keys.items():
            into = leaf if before + k in entry.spec else frozen if before + k in frozen else None
            if (source := at.found[name].get(place.key(key))) is None or (into is None and k not in bank):
                continue  # the same key under another name of ours, at other layers
            if into is None:
                self.copy(name, entry, k, source)
                continue
            shape = entry.spec[before + k] if into is leaf else frozen[before + k].shape
            t = place.read(key, at.file.tensor(source, device), shape)
            into[before + k] = t if into is leaf else t.to(frozen[before + k].dtype)
        for k, key in peft.shared.items():
            like = frozen[k].shape if k in frozen else bank.get(k)
            if like is not None and at.shared.keys() >= set(named := keys.rows(key, like)):
                (frozen if k in frozen else self.bank(entry))[k] = self.common(key, named, device)

    def copy(self, name: str, entry: Entry, k: str, source: str) -> None:
        """A bank's tensor, of which every layer has a copy, or one of a row. ValueError where two copies differ."""
        at, w, mine = self.at, self.at.model.weights[name], self.bank(entry)
        shape, peft = self.plan.banks[str(entry.bank)][k], keys.described(self.methods[name])
        if w.is_meta:  # shapes are all there is
            mine.setdefault(k, torch.empty(shape, device=w.device))
            return
        row = int(self.drawn()[name].frozen[peft.rows[k]]) if k in peft.rows else None
        t = at.places[name].read(peft.keys[k], at.file.tensor(source, w.device), shape if row is None else shape[1:])
        whole = mine.setdefault(k, t if row is None else t.new_zeros(shape))
        part = whole if row is None else whole[row]
        if (entry.bank, k, row) in self.copied and not torch.equal(part.to(w.device), t):
            raise ValueError(f"{at.file.where}: {source} differs from other layers' copies")
        if row is not None:
            part.copy_(t)
        self.copied.add((entry.bank, k, row))

    def bank(self, entry: Entry) -> Leaf:
        """The leaf of the entry's bank; one that nobody reads where it has none."""
        return self.adapter.setdefault(entry.bank, {}) if entry.bank else {}  # type: ignore[no-any-return]

    def common(self, key: str, named: list[str], device: torch.device) -> Tensor:
        """A shared tensor, moved once to each device."""
        if (named[0], device) not in self.moved:
            parts = [self.at.file.tensor(self.at.shared[r], device) for r in named]
            self.moved[named[0], device] = torch.stack(parts) if key.endswith("*") else parts[0]
        return self.moved[named[0], device]

    def drawn(self) -> Plan:
        """The plan with the constants that the methods themselves make."""
        if self.fresh is None:
            taken = {n: e.rule for n, e in self.plan.items()}
            self.fresh = make(self.at.model.read, self.plan.rules, 0, taken=taken)
        return self.fresh
