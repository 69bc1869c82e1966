"""The pure functions of a plan, the base's weights and an adapter: each operation is defined once, here.

The net calls them with the model's parameters, the module view with its originals, the command line with mapped files.
`weights` is a mapping of parameter name → tensor; it may make each tensor when it is asked for. A name that it lacks,
or that maps to None, is an empty slot (a layer without a bias).
"""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftfn.core.made import check_own, held_at
from peftfn.core.method import Leaf, Weight
from peftfn.core.plan import Adapter, Entry, Plan
from peftfn.core.rng import Rng
from peftfn.model.site import Site
from peftfn.tensors.loaded import peek
from peftfn.tensors.precision import wide
from peftfn.tensors.sharded import equal, is_sharded, on_mesh, placed, whole
from peftfn.tensors.transform import exactly

Weights = Mapping[str, Any]

UNTIED = (
    "{name}: it is tied to {other}, and the adapter makes the two different, so a model that ties them would keep only "
    "one of the two. Adapt both alike (TiedTokens does), or say untied=True and put the result into a model that "
    "does not tie them (transformers: tie_word_embeddings=False in its config)"
)


def current(entry: Entry, w: Any) -> Any:
    """Return w, the model's parameter or `Place` at a site. ValueError if its shape has changed since `adapt`."""
    if w is None or w.shape != entry.site.shape:
        what = "parameter" if entry.family is Weight else "module"
        now = "no longer exists" if w is None else f"has shape {list(w.shape)} now"
        raise ValueError(
            f"{entry.site.label}: the model's {what} {now}; it had shape {list(entry.site.shape)} when it was "
            "adapted. Call adapt again."
        )
    return w


def checked(plan: Plan, weights: Weights) -> Weights:
    """Return the weights. ValueError if the shape of one that the plan adapts has changed since `adapt`."""
    for name, entry in plan.items():
        current(entry, peek(weights, name))
    return weights


def bank_of(entry: Entry, adapter: Mapping[str, Any]) -> Mapping[str, Any]:
    """The trainable tensors that the sites of the entry's rule share."""
    return adapter[entry.bank] if entry.bank else {}


# Making an adapter.


def init(plan: Plan, weights: Weights, seed: int, dtype: torch.dtype = torch.float32) -> Adapter:
    """Return a fresh adapter. The values of a site depend on (seed, site name) alone."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"init: dtype is {dtype!r}; give a floating-point dtype, like torch.bfloat16")
    adapter: Adapter = {name: leaf(e, weights, seed, dtype, e.frozen) for name, e in plan.items()}
    return adapter | {bank: shared_leaf(plan, bank, weights, seed, dtype) for bank in plan.banks}


def leaf(entry: Entry, weights: Weights, seed: int, dtype: torch.dtype, constants: Mapping[str, Tensor]) -> Leaf:
    """Return the fresh leaf of one site."""
    bias = bias_at(entry.site, weights)
    return draw(entry.method.init, entry.site, weights[entry.site.name], seed, dtype, constants, bias)


def bias_at(site: Site, weights: Weights) -> Any:
    """The bias of the layer whose weight is at the site; None if it has none."""
    return None if site.bias is None else weights.get(site.bias)


def constants(entry: Entry, weights: Weights, seed: int) -> Leaf:
    """Return the constants that a method draws for one site alone."""
    if not entry.method.overrides("frozen"):
        return {}
    bias = bias_at(entry.site, weights)
    return draw(entry.method.frozen, entry.site, weights[entry.site.name], seed, bias=bias)


def draw(
    make: Any,
    site: Site,
    w: Any,
    seed: int,
    dtype: torch.dtype = torch.float32,
    constants: Mapping[str, Tensor] | None = None,
    bias: Tensor | None = None,
) -> Leaf:
    """`make(rng, w)` (a method's `init` or `frozen`) at a site; expert by expert where the site is a stack."""
    m = site.canonical(w)
    if bias is not None:
        bias = whole(bias).to(w.device)
    rng = partial(Rng, seed, site=site, dtype=dtype, device=w.device)
    if is_sharded(w):
        known = {k: whole(t) for k, t in (constants or {}).items()}
        drawn = draw(make, site, whole(w), seed, dtype, known, bias)  # every rank draws the same
        return {k: placed(t, m) for k, t in drawn.items()}
    if not site.stacked:
        made = make(rng(site.name, constants=constants, bias=bias), m)
        theirs = [*held_at(m), ("the layer's bias", bias)]
        theirs += [(f"the constant {k!r}", t) for k, t in (constants or {}).items()]
        what = f"{site.name}: {type(make.__self__).__name__}.{make.__name__}"
        check_own(what, made, theirs, alike=make.__name__ == "frozen")
        return {k: t.contiguous() for k, t in made.items()}
    if w.is_meta:
        return {k: t.expand(len(m), *t.shape) for k, t in make(rng(site.name), m[0]).items()}
    each = [make(rng(f"{site.name}[{e}]"), m[e]) for e in range(len(m))]
    return {k: torch.stack([leaf[k] for leaf in each]) for k in each[0]}


def shared_leaf(plan: Plan, bank: str, weights: Weights, seed: int, dtype: torch.dtype) -> Leaf:
    """Return the fresh trainable tensors that the sites of one rule share."""
    entries = {name: e for name, e in plan.items() if e.bank == bank}
    first = next(iter(entries))
    w = weights[first]
    rng = Rng(seed, bank, sites={n: e.site for n, e in plan.items()}, dtype=dtype, device=w.device)
    method, mine = plan[first].method, Canonical({n: e.site for n, e in entries.items()}, weights)
    made = method.bank(rng, mine)
    theirs = [held for n, w in mine.items() for held in held_at(w, n)]
    check_own(f"{bank}: {type(method).__name__}.bank", made, [*theirs, *plan[first].frozen.items()])
    return {k: on_mesh(t, w) for k, t in made.items()}


class Canonical(Mapping[str, Tensor]):
    """A mapping of the weights of some sites as methods see them, [out, in] or a `Place`, each made on access."""

    def __init__(self, sites: Mapping[str, Site], weights: Weights):
        self.sites, self.weights = sites, weights

    def __getitem__(self, name: str) -> Tensor:
        return self.sites[name].canonical(self.weights[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


# What an adapter means. All of these use eval mode: no dropout.


def tensors(entry: Entry, weights: Weights, adapter: Mapping[str, Any]) -> tuple[Any, dict[str, Any], Any]:
    """Return (method, prepared tensors, the parameter) at one site."""
    w = current(entry, weights.get(entry.site.name))
    method, p = entry.tensors(adapter[entry.site.name], bank_of(entry, adapter), entry.site.canonical(w))
    return method, p, w


def value(plan: Plan, weights: Weights, adapter: Mapping[str, Any], slot: str) -> Any:
    """Return the content of a slot with the adapter folded in: an adapted parameter, or a bias that a method changes.

    The sum is computed in fp32 or wider and rounded once to the parameter's dtype. Returns the parameter itself
    if the adapter does not change it, and None for an empty slot that stays empty.
    """
    out = weights.get(slot)
    if slot in plan.meant:
        entry = plan.meant[slot]
        method, p, w = tensors(entry, weights, adapter)
        out = entry.dense(method, p, w)
    if slot in plan.owners:
        entry = plan.meant[plan.owners[slot]]
        method, p, w = tensors(entry, weights, adapter)
        new = entry.new_bias(method, p, out, w.dtype)
        out = out if new is None else new
    return out


def merge(plan: Plan, weights: Weights, adapter: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Iterate over (slot, its value with the adapter folded in) for every slot that the adapter may change.

    Raises ValueError, before the first, if the adapter adds a bias to a layer without one.
    """
    for name, entry in plan.items():
        entry.check_merge()
        if entry.adds_bias and bias_at(entry.site, weights) is None:
            raise ValueError(
                f"{name}: {entry.method} adds a bias and this layer has none to merge it into. Use net.apply, or "
                "give the layer a bias of zeros first."
            )
    for slot in plan.slots:
        new = value(plan, weights, adapter, slot)
        if new is not None:
            yield slot, new


def tie(plan: Plan, weights: Weights, merged: dict[str, Tensor]) -> None:
    """Make slots that share a tensor in `weights` share one in `merged`. ValueError if their merged values differ."""
    for name, entry in plan.items():
        for other in entry.site.tied:
            if weights.get(other) is not weights.get(name) or merged[other] is merged[name]:
                continue
            if not equal(merged[name], merged[other]):
                raise ValueError(UNTIED.format(name=name, other=other))
            for alias, w in weights.items():
                if w is weights[name]:
                    merged[alias] = merged[name]


def delta(plan: Plan, weights: Weights, adapter: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return {site: change of the parameter, in its own shape}, in fp32 or wider."""
    for entry in plan.values():
        entry.check_merge()
    out = {}
    for name, entry in plan.meant.items():
        method, p, w = tensors(entry, weights, adapter)
        out[name] = entry.site.original(entry.delta(method, p, entry.site.canonical(w)))
    return out


def bias_deltas(plan: Plan, weights: Weights, adapter: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return {site: change of its layer's bias}, in fp32 or wider, if a method changes it. No bias counts as zeros."""
    out = {}
    for slot, name in plan.owners.items():
        entry, b = plan.meant[name], weights.get(slot)
        method, p, _ = tensors(entry, weights, adapter)
        new = method.bias(p, None if b is None else wide(b))
        if new is not None:
            out[name] = new if b is None else new - wide(b)
    return out


def prepared(
    entries: Mapping[str, Entry], weights: Weights, adapter: Mapping[str, Any]
) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return `Entry.tensors` of all sites; a method with `prepare_all` prepares sites of one shape together."""
    out: dict[str, tuple[Any, dict[str, Any]]] = {}
    alike: dict[Any, list[tuple[str, Leaf, Tensor]]] = {}
    for name, entry in entries.items():
        here, bank = adapter[name], bank_of(entry, adapter)
        m = entry.site.canonical(current(entry, weights.get(name)))
        if not entry.method.overrides("prepare_all") or entry.site.stacked or here.keys() != entry.spec.keys():
            out[name] = entry.tensors(here, bank, m)
        else:
            kind = entry.method, m.shape, m.dtype, m.device
            alike.setdefault(kind, []).append((name, entry.raw(here, bank, m), m))
    for (method, *_), found in alike.items():
        names, ps, ws = zip(*found, strict=True)
        with exactly(ws[0]):
            out |= {n: (method, p) for n, p in zip(names, method.prepare_all(ps, ws), strict=True)}
    return {name: out[name] for name in entries}


def prepare(plan: Plan, weights: Weights, adapter: Mapping[str, Any]) -> Adapter:
    """Return the adapter with all computed that depends on parameters alone. Valid until it or the base changes."""
    out: dict[str, Any] = {bank: adapter[bank] for bank in plan.banks}
    for name, (method, p) in prepared(plan.meant, weights, adapter).items():
        entry = plan.meant[name]
        if method != entry.method:
            raise ValueError(
                f"{name}: a sum or scaling of {entry.method} has no prepared form; prepare before you scale or add"
            )
        out[name] = {k: t for k, t in p.items() if k in entry.prepared}
    return out
