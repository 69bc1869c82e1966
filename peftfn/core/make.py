"""Rules on a model → a plan, in three phases.

1. Rules and sites are matched.
2. Each kind of site is probed: its method runs on the meta device, where everything that can be wrong is found.
3. The constants are drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from peftfn.core import functions
from peftfn.core.made import check_own, held_at
from peftfn.core.method import Leaf, Method
from peftfn.core.modules import Companion
from peftfn.core.plan import Entry, Plan
from peftfn.core.probe import PROBES, Shared, sketch
from peftfn.core.rng import Rng
from peftfn.core.rules import checked, match, offered
from peftfn.model.model import Model
from peftfn.model.place import MODULE, TOKENS, Place
from peftfn.model.site import Site, refuse_occupied, refuse_partial, refuse_split
from peftfn.tensors.loaded import Weights
from peftfn.tensors.quantised import QuantisedWeight
from peftfn.tensors.sharded import on_mesh
from peftfn.tensors.transform import lasting


@lasting()
def make(
    model: Model,
    given: Mapping[str, Method],
    seed: int,
    *,
    taken: Mapping[str, str] | None = None,
    constants: bool = True,
) -> Plan:
    """The plan of the rules `given` on `model`. No large tensor is allocated before everything is checked.

    taken: site name → its rule, where that is known already: no pattern is matched then.
    constants: if False, the plan's frozen tensors are on the meta device, for the caller to replace.
    """
    matched = _matched(model, given, taken)
    shared = {pattern: _shared_probe(matched, pattern) for pattern in matched.rules}
    entries = _probed(matched, shared)
    entries = _filled(matched, entries, seed) if constants else _hollow(matched, entries, shared, seed)
    banks = {name: {k: t.shape for k, t in shared[pattern].bank.items()} for pattern, name in matched.banks.items()}
    return Plan(entries, matched.rules, banks)


@dataclass(frozen=True)
class _Matched:
    """Rules that have found their sites."""

    model: Model
    rules: Mapping[str, Method]
    sites: dict[str, Site]  # those that a rule takes, in the model's order, the modules last
    taken: Mapping[str, str]  # site name → its rule

    @cached_property
    def weights(self) -> Weights:
        """The model's weights, and the places of the sites that are modules."""
        places = [s for s in self.sites.values() if s.kind in (MODULE, TOKENS)]
        return self.model.weights | self.model.at(places)

    @property
    def sites_known(self) -> dict[str, Site]:
        """The model's parameters as sites, and the modules that a rule takes."""
        return {**self.model.sites, **self.sites}

    @cached_property
    def canonical(self) -> Mapping[str, Any]:
        """The adapted weights, and places, as methods see them."""
        return functions.Canonical(self.sites, self.weights)

    @cached_property
    def banks(self) -> dict[str, str]:
        """rule → name of its bank in the adapter: the method's class name, numbered from the second on."""
        out: dict[str, str] = {}
        for pattern, method in self.rules.items():
            if method.overrides("bank"):
                n = sum(name.split(".")[0] == type(method).__name__ for name in out.values())
                out[pattern] = type(method).__name__ + (f".{n}" if n else "")
        return out

    def of_rule(self, pattern: str) -> Mapping[str, Any]:
        """What a rule's method sees at its sites."""
        mine = {name: site for name, site in self.sites.items() if self.taken[name] == pattern}
        return functions.Canonical(mine, self.weights)


# Phase 1: rules and sites.


def _matched(model: Model, given: Mapping[str, Method], taken: Mapping[str, str] | None) -> _Matched:
    """The rules' sites. Raises ValueError or TypeError for a rule without any, and a site that cannot be adapted."""
    for name, module in model.distinct.items():
        refuse_split(module, name)
        if any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
            raise TypeError(
                f"{name or 'the model'}: fully_shard moves this module's parameters in and out by hooks of its own, so "
                "there are none to adapt. Adapt the model first and shard the module: m = peftfn.as_module(net, a); "
                "fully_shard(m)"
            )
    rules = checked(given)
    found = {pattern: offered(model, method) for pattern, method in rules.items()}
    if taken is None:
        taken = match(rules, found)
        for name, pattern in taken.items():
            refuse_occupied(model.root, name, pattern)
            if (layer := model.modules.get(name.rpartition(".")[0])) is not None:
                refuse_partial(layer, name)
    order = {name: None for sites in {id(v): v for v in (model.sites, *found.values())}.values() for name in sites}
    matched = _Matched(model, rules, {n: found[taken[n]][n] for n in order if n in taken}, taken)
    for name in matched.sites:
        w = matched.weights[name]
        if isinstance(w, QuantisedWeight) and (problem := w.problem()):
            raise ValueError(f"{name}: {type(w.layer).__name__} cannot be adapted as it is: {problem}")
        if not w.is_floating_point():
            raise ValueError(
                f"{name}: the weight is {w.dtype}, and a method needs a floating-point one: dequantise it, or leave "
                "this site out of the rules"
            )
    return matched


# Phase 2: shapes, by runs on the meta device.


def _shared_probe(matched: _Matched, pattern: str) -> Shared:
    method = matched.rules[pattern]
    if not method.overrides("shared") and not method.overrides("bank"):
        return Shared({}, {})
    rng = Rng(0, pattern, sites=matched.sites_known, device="meta")
    empty = {n: sketch(w) for n, w in matched.of_rule(pattern).items()}
    return Shared(method.shared(rng, empty), method.bank(rng, empty))


def _probed(matched: _Matched, shared: Mapping[str, Shared]) -> dict[str, Entry]:
    """The entries without constants. Parameters of one rule that a method cannot tell apart are probed once."""
    model, probes, out = matched.model, dict[Any, Entry](), dict[str, Entry]()
    for name, site in matched.sites.items():
        pattern, w = matched.taken[name], matched.weights[name]
        biased = site.bias in model.weights
        which = name if isinstance(w, Place) else None
        alike = pattern, site.kind, site.shape, w.dtype, site.bias is None, biased, which
        if alike not in probes:
            method = matched.rules[pattern]
            probe = PROBES[method.family](site, method, sketch(matched.canonical[name]), shared[pattern], biased)
            entry = probe.entry(pattern, matched.banks.get(pattern))
            probes[alike] = entry if which is None else replace(entry, companions=_companions(method, w, model))
        out[name] = replace(probes[alike], site=site)
    return out


def _companions(method: Any, m: Place, model: Model) -> tuple[Companion, ...]:
    """What the method needs at other modules."""
    try:
        found: tuple[Companion, ...] = method.companions(m, model)
    except ValueError as e:
        raise ValueError(f"{m.name or 'the model'}: {e}") from e
    return found


# Phase 3: constants.


def _filled(matched: _Matched, entries: Mapping[str, Entry], seed: int) -> dict[str, Entry]:
    """The entries with their constants, on their weights' devices."""
    weights, out = matched.weights, dict[str, Entry]()
    shared = {pattern: _shared(matched, pattern, seed) for pattern in matched.rules}
    moved: dict[tuple[int, torch.device], Tensor] = {}  # what several sites share, once for each device
    for name, entry in entries.items():
        w = weights[name]
        common = {
            k: moved.setdefault((id(t), w.device), on_mesh(t.to(w.device), w))
            for k, t in shared[entry.rule].get(name, {}).items()
        }
        frozen = common | functions.constants(entry, weights, seed)
        out[name] = replace(entry, frozen=frozen) if frozen else entry
    return out


def _hollow(
    matched: _Matched, entries: Mapping[str, Entry], shared: Mapping[str, Shared], seed: int
) -> dict[str, Entry]:
    """The entries with constants that have shapes and no values."""
    empty = matched.weights | {n: sketch(matched.weights[n]) for n in entries}
    return {
        name: replace(e, frozen={**shared[e.rule].frozen.get(name, {}), **functions.constants(e, empty, seed)})
        for name, e in entries.items()
    }


def _shared(matched: _Matched, pattern: str, seed: int) -> Mapping[str, Leaf]:
    """The constants that the sites of a rule share, none of it memory of their weights."""
    method = matched.rules[pattern]
    if not method.overrides("shared"):
        return {}
    weights = matched.of_rule(pattern)
    made = method.shared(Rng(seed, pattern, sites=matched.sites_known), weights)
    flat = {f"{name}: {k}": t for name, tensors in made.items() for k, t in tensors.items()}
    theirs = [held for n, w in weights.items() for held in held_at(w, n)]
    check_own(f"{type(method).__name__}.shared", flat, theirs, alike=True)
    return made
