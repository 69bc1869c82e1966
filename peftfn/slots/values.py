"""What stands in the slots of a call: every adapted weight, and every bias that a method changes."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from peftfn.core.functions import bank_of, current
from peftfn.core.method import Method, Weight
from peftfn.core.modules import Along, Companion, ModuleMethod, Prefix, Tokens
from peftfn.core.plan import Entry, Plan
from peftfn.slots.acting import Acting
from peftfn.slots.call import alone, mixed
from peftfn.slots.companions import accompany
from peftfn.slots.gates import Gates
from peftfn.slots.mixed import MixedWeight
from peftfn.slots.part import Part, Stack
from peftfn.slots.weight import AdaptedWeight
from peftfn.tensors.transform import moment

EMPTY: Any = {}


class Given(NamedTuple):
    """One plan's adapters in a call. gates number the adapters of all of a call's plans one after the other."""

    plan: Plan
    adapter: Any  # one adapter; a stack of `size` where the call has gates
    start: int = 0
    size: int = 1
    seen: Any = None  # what a keeper knows it by


class Family(NamedTuple):
    """How the methods of a family stand in the slots of a call."""

    single: Any  # (entry, method, tensors, what the slot holds, moment) ↦ the value of one adapter
    part: Any  # the adapters that one plan brings to a site of a call with gates
    mixed: Any  # (parts, what the slot holds, gates) ↦ the value of all of them


_AT_MODULES = Family(alone, Stack, mixed)
FAMILIES: dict[type[Method], Family] = {
    Weight: Family(AdaptedWeight, Part, MixedWeight),
    ModuleMethod: _AT_MODULES,
    Tokens: _AT_MODULES,
    Prefix: _AT_MODULES,
    Along: _AT_MODULES,
}


def values(
    given: Sequence[Given],
    gates: Gates | None,
    slot: Callable[[str], Any],
    training: bool,
    but: Collection[str] = (),
    only: Collection[str] | None = None,
) -> dict[str, Any]:
    """slot → what stands in it. slot(name) is what the slot holds without an adapter; gates: None for one adapter.

    but, only: sites without a value for now, and the only ones with one: a layer may get its weights when it is called.
    """
    made = (
        _single(given[0], gates, slot, training, but, only)
        if gates is None or (isinstance(gates, Acting) and gates.inner is None)
        else _mixed(given, gates, slot, training, but, only)
    )
    wanted: dict[str, dict[Companion, None]] = {}  # once each, also where several plans want the same
    for plan, *_ in given:
        for site, companions in plan.accompanied.items():
            wanted.setdefault(site, {}).update(dict.fromkeys(companions))
    if wanted:
        accompany(wanted, made, slot, gates)
    return made


def _here(plan: Plan, training: bool, but: Collection[str], only: Collection[str] | None) -> Mapping[str, Entry]:
    entries = plan.entries if training else plan.meant
    if only is None and not but:
        return entries
    return {n: e for n, e in entries.items() if n not in but and (only is None or n in only)}


def _single(
    given: Given,
    gates: Gates | None,
    slot: Callable[[str], Any],
    training: bool,
    but: Collection[str],
    only: Collection[str] | None,
) -> dict[str, Any]:
    """gates: of the sites whose methods act on some tokens alone."""
    plan, adapter = given.plan, given.adapter
    now, families = moment(), FAMILIES
    held: dict[str, Any] = {}
    for name, entry in _here(plan, training, but, only).items():
        w = slot(name)  # `current`, `bank_of` and `canonical` are written out: this runs once a site and call
        if w is None or w.shape != entry.site.shape:
            current(entry, w)  # raises
        m = w if entry.to_matrix is None else entry.to_matrix(w)
        method, p = entry.tensors(adapter[name], adapter[entry.bank] if entry.bank else EMPTY, m)
        if entry.gated and gates is not None:
            held[name] = MixedWeight([Part.alone(entry, method, p, w)], w, gates.site(name))
            continue
        held[name] = families[entry.family].single(entry, method, p, w, now)
    # norms, biases and other vectors stand there as plain tensors, so that fused norms work
    out: dict[str, Any] = {
        n: w.dense() if w.entry.site.kind == "other" and not isinstance(w, MixedWeight) else w for n, w in held.items()
    }
    for bias, name in plan.owners.items():
        if name not in held:
            continue
        weight, own = held[name], out[bias] if bias in out else slot(bias)
        if isinstance(weight, MixedWeight):
            new, last = weight.bias(own), False
        else:
            new, last = weight.entry.new_bias(weight.method, weight.p, own, weight.dtype), weight.method.only_bias()
        if new is not None:
            out[bias] = new
        if last:
            del out[name]
    return out


def _mixed(
    given: Sequence[Given],
    gates: Gates,
    slot: Callable[[str], Any],
    training: bool,
    but: Collection[str],
    only: Collection[str] | None,
) -> dict[str, Any]:
    parts: dict[str, list[Any]] = {}
    owners: dict[str, str] = {}
    for plan, stacked, start, size, _ in given:
        if not gates.uses(start, size):
            continue
        for name, entry in _here(plan, training, but, only).items():
            w = current(entry, slot(name))
            part = FAMILIES[entry.family].part(entry, stacked[name], bank_of(entry, stacked), w, start, size)
            parts.setdefault(name, []).append(part)
        owners |= {bias: name for bias, name in plan.owners.items() if name in parts}
    out: dict[str, Any] = {
        name: FAMILIES[some[0].entry.family].mixed(some, slot(name), gates.site(name)) for name, some in parts.items()
    }
    for bias, name in owners.items():
        new = out[name].bias(out.get(bias, slot(bias)))
        if new is not None:
            out[bias] = new
    return out
