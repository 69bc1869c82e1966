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
from torch import Size, Tensor

from peftfn.core import functions
from peftfn.core.made import called, check_own, check_tensors
from peftfn.core.method import Leaf, Method, Weight
from peftfn.core.plan import Entry, Plan
from peftfn.core.rng import Rng
from peftfn.core.rules import checked, match
from peftfn.model.model import Model
from peftfn.model.site import Site, refuse_occupied
from peftfn.tensors.precision import wide
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
    rules: Mapping[str, Weight]
    taken: dict[str, str]  # site name → its rule, in the model's order

    @cached_property
    def canonical(self) -> dict[str, Tensor]:
        """The adapted weights as methods see them."""
        return {name: self.model.sites[name].canonical(self.model.weights[name]) for name in self.taken}

    @cached_property
    def banks(self) -> dict[str, str]:
        """rule → name of its bank in the adapter: the method's class name, numbered from the second on."""
        out: dict[str, str] = {}
        for pattern, method in self.rules.items():
            if method.overrides("bank"):
                n = sum(name.split(".")[0] == type(method).__name__ for name in out.values())
                out[pattern] = type(method).__name__ + (f".{n}" if n else "")
        return out

    def of_rule(self, pattern: str) -> dict[str, Tensor]:
        """The canonical weights of a rule's sites."""
        return {name: self.canonical[name] for name, rule in self.taken.items() if rule == pattern}


# Phase 1: rules and sites.


def _matched(model: Model, given: Mapping[str, Method], taken: Mapping[str, str] | None) -> _Matched:
    """The rules' sites. Raises ValueError or TypeError for a rule without any, and a site that cannot be adapted."""
    for name, module in model.distinct.items():
        if any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
            raise TypeError(
                f"{name or 'the model'}: fully_shard moves this module's parameters in and out by hooks of its own, so "
                "there are none to adapt. Adapt the model first and shard the module: m = peftfn.as_module(net, a); "
                "fully_shard(m)"
            )
    rules = checked(given)
    if taken is None:
        taken = match(rules, model.sites)
        for name, pattern in taken.items():
            refuse_occupied(model.root, name, pattern)
    for name in taken:
        w = model.weights[name]
        if isinstance(w, QuantisedWeight) and (problem := w.problem()):
            raise ValueError(f"{name}: {type(w.layer).__name__} cannot be adapted as it is: {problem}")
        if not w.is_floating_point():
            raise ValueError(
                f"{name}: the weight is {w.dtype}, and a method needs a floating-point one: dequantise it, or leave "
                "this site out of the rules"
            )
    return _Matched(model, rules, {name: taken[name] for name in model.sites if name in taken})


# Phase 2: shapes, by runs on the meta device.


@dataclass(frozen=True)
class _Shared:
    """What the sites of a rule share: constants, by site; and trainable tensors. On the meta device."""

    frozen: Mapping[str, Leaf]
    bank: Leaf


def _shared_probe(matched: _Matched, pattern: str) -> _Shared:
    method = matched.rules[pattern]
    if not method.overrides("shared") and not method.overrides("bank"):
        return _Shared({}, {})
    rng = Rng(0, pattern, sites=matched.model.sites, device="meta")
    empty = {n: torch.empty(w.shape, dtype=w.dtype, device="meta") for n, w in matched.of_rule(pattern).items()}
    return _Shared(method.shared(rng, empty), method.bank(rng, empty))


def _probed(matched: _Matched, shared: Mapping[str, _Shared]) -> dict[str, Entry]:
    """The entries without constants. Sites of one rule that a method cannot tell apart are probed once."""
    model, probes, out = matched.model, dict[Any, Entry](), dict[str, Entry]()
    for name, pattern in matched.taken.items():
        site, w = model.sites[name], model.weights[name]
        alike = pattern, site.kind, site.shape, w.dtype, site.bias is None, site.bias in model.weights
        if alike not in probes:
            bank = matched.banks.get(pattern)
            empty = torch.empty(matched.canonical[name].shape, dtype=w.dtype, device="meta")
            probe = _Probe(site, matched.rules[pattern], empty, shared[pattern], site.bias in model.weights)
            probes[alike] = probe.entry(pattern, bank)
        out[name] = replace(probes[alike], site=site)
    return out


class _Probe:
    """A run of a method at a site on meta tensors: every function of it once, its results checked."""

    def __init__(self, site: Site, method: Weight, empty: Tensor, shared: _Shared, biased: bool):
        self.site, self.method, self.bank = site, method, shared.bank
        self.common = shared.frozen.get(site.name, {})
        self.w = empty[0] if site.stacked else empty
        self.dtype = torch.promote_types(self.w.dtype, torch.float32)
        self.given = torch.empty(len(self.w), dtype=self.w.dtype, device="meta") if biased else None
        self.source = dict.fromkeys(self.common, "shared") | dict.fromkeys(self.bank, "bank")  # tensor → its function

    def entry(self, rule: str, bank: str | None) -> Entry:
        site, method = self.site, self.method
        try:
            leaf, own = self.drawn()
            p = self.joined(leaf, own)
            adds_bias, changes_bias = self.used(p)
        except ValueError as e:
            raise ValueError(f"{site.name} {list(site.shape)}: {e}") from e
        except Exception as e:
            e.add_note(f"at {site.name} {list(site.shape)}: {method}")
            raise
        if adds_bias and site.bias is None:
            raise ValueError(
                f"{site.name}: {method} adds to the layer's bias, and a {site.kind} site has no place for one. Choose "
                "a method without a bias here."
            )
        return Entry(
            site,
            rule,
            method,
            frozen={},
            spec={k: self.stacked(t) for k, t in leaf.items()},
            prepared=self.prepared(p, own),
            common=frozenset({*self.common, *self.bank}),
            bank=bank,
            adds_bias=adds_bias,
            changes_bias=changes_bias,
        )

    def stacked(self, t: Tensor) -> Size:
        """The shape of a tensor that every expert has, where the site is a stack of experts."""
        return Size((*self.site.shape[:1], *t.shape)) if self.site.stacked else t.shape

    def drawn(self) -> tuple[Leaf, Leaf]:
        """What `init` and `frozen` return."""
        method, cls = self.method, type(self.method).__name__
        rng = Rng(0, self.site.name, site=self.site, dtype=self.dtype, device="meta", bias=self.given)
        for what, made in (("shared", self.common), ("bank", self.bank)):
            check_tensors(f"{cls}.{what}", made)
        leaf, own = (called(method, f, getattr(method, f), rng, self.w) for f in ("init", "frozen"))
        theirs = [("the weight w", self.w), ("the layer's bias", self.given)]
        for what, made in (("init", leaf), ("frozen", own)):
            check_tensors(f"{cls}.{what}", made)
            check_own(f"{cls}.{what}", made, theirs, alike=what == "frozen")
            self.source |= dict.fromkeys(made, what)
        return leaf, own

    def joined(self, leaf: Leaf, own: Leaf) -> Leaf:
        """All tensors that the method has here, as `Entry.raw` gives them."""
        parts = [self.common, own, self.bank, leaf]
        p = {k: t.to(self.dtype) if t.is_floating_point() else t for part in parts for k, t in part.items()}
        if len(p) != sum(map(len, parts)):
            raise ValueError(f"{self.method} has one name for two of its tensors: {sorted(p)}")
        return p

    def used(self, p: Leaf) -> tuple[bool, bool]:
        """(whether the method adds a bias where there is none, whether it changes the one there is), after a run of
        `prepare`, `delta` and `bias`."""
        method, w, cls, source = self.method, self.w, type(self.method).__name__, self.source
        ready = called(method, "prepare", method.prepare, p, w, p=source)
        change = called(method, "delta", method.delta, ready, wide(w), p=source) if method.mergeable else w
        if change.shape != w.shape:
            raise ValueError(f"{cls}.delta returns {list(change.shape)} for a weight {list(w.shape)}")
        adds_bias = called(method, "bias", method.bias, ready, None, p=source) is not None
        b = torch.empty(len(w), device="meta") if self.site.bias else None
        new = called(method, "bias", method.bias, ready, b, p=source)
        if b is not None and (new is None or new.shape != b.shape):
            raise ValueError(
                f"{cls}.bias returns {None if new is None else list(new.shape)} for a bias {list(b.shape)}: return the "
                "adapted bias, or b itself where it stays as it is"
            )
        return adds_bias, new is not b

    def prepared(self, p: Leaf, own: Leaf) -> dict[str, Size]:
        """The shapes of a prepared leaf, which is one for eval mode: what `prepare` returns but for constants."""
        made = self.method.eval().prepare(p, self.w)
        constants = {*self.common, *own}
        changed = {k: t for k, t in made.items() if k not in constants or t is not p[k]}
        return {k: t.shape if k in self.bank and t is p[k] else self.stacked(t) for k, t in changed.items()}


# Phase 3: constants.


def _filled(matched: _Matched, entries: Mapping[str, Entry], seed: int) -> dict[str, Entry]:
    """The entries with their constants, on their weights' devices."""
    weights, out = matched.model.weights, dict[str, Entry]()
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
    matched: _Matched, entries: Mapping[str, Entry], shared: Mapping[str, _Shared], seed: int
) -> dict[str, Entry]:
    """The entries with constants that have shapes and no values."""
    weights = matched.model.weights
    empty = {**weights, **{n: torch.empty_like(weights[n], device="meta") for n in entries}}
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
    made = method.shared(Rng(seed, pattern, sites=matched.model.sites), weights)
    flat = {f"{name}: {k}": t for name, tensors in made.items() for k, t in tensors.items()}
    check_own(f"{type(method).__name__}.shared", flat, [(f"the weight {n}", w) for n, w in weights.items()], alike=True)
    return made
