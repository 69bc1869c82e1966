"""Rules → plan: which method stands at which site, and what a plan gives without running the model."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.func import vmap

from peftfn.core.combine import is_expression, own_name, resolve, terms
from peftfn.core.made import called, check_own, check_tensors
from peftfn.core.method import Leaf, Method, Weight
from peftfn.core.rng import Rng
from peftfn.core.rules import checked, match
from peftfn.model.names import near
from peftfn.model.site import Site, refuse_occupied, sites
from peftfn.tensors.precision import wide
from peftfn.tensors.quantised import QuantisedWeight, parameters
from peftfn.tensors.sharded import is_sharded, on_mesh, placed
from peftfn.tensors.transform import exactly, lasting

Adapter = dict[str, Leaf]
"""site name (or bank name) → trainable tensors"""


@dataclass(frozen=True)
class Entry:
    """One site of a plan: the method that stands there, and what of it does not depend on the adapter."""

    site: Site
    rule: str  # the pattern that took the site
    method: Weight
    frozen: Leaf  # constants: the site's own and those its rule shares
    spec: dict[str, Size]  # what a leaf must look like
    prepared: dict[str, Size]  # what a prepared leaf looks like
    common: frozenset[str]  # names of tensors without an expert axis at a stacked site
    bank: str | None = None  # the adapter's entry with the rule's trainable shared tensors
    adds_bias: bool = False  # gives a bias also to a layer that has none
    changes_bias: bool = False  # makes another bias of the one the layer has, or adds one
    # What a call would ask at every site, answered once:
    prepares: bool = field(init=False)  # `prepare` does something
    fast: bool = field(init=False)  # `linear` is more than the dense weight
    low: bool = field(init=False)  # `low_rank` may say that it is a low-rank change
    plain: bool = field(init=False)  # no constants
    to_matrix: Callable[[Tensor], Tensor] | None = field(init=False)  # the parameter ↦ canonical; None: it is

    def __post_init__(self) -> None:
        turn = None if self.site.kind in ("linear", "stack", "other") else self.site.canonical
        decided = {
            "prepares": self.method.overrides("prepare"),
            "fast": self.method.fast_linear(),
            "low": self.method.overrides("low_rank"),
            "plain": not self.frozen,
            "to_matrix": turn,
        }
        for name, value in decided.items():
            object.__setattr__(self, name, value)

    def __iter__(self) -> Iterator[Any]:
        """method, frozen: a plan reads as dict[site, (method, frozen tensors)]."""
        return iter((self.method, self.frozen))

    def axes(self, p: Mapping[str, Any]) -> dict[str, Any]:
        """`in_dims` of p over the experts of a stacked site."""
        return {k: None if (name := own_name(k)) in self.common or name == "scale" else 0 for k in p}

    def tensors(self, leaf: Mapping[str, Any], bank: Mapping[str, Any], w: Tensor) -> tuple[Weight, dict[str, Any]]:
        """(method, prepared tensors) for `leaf` at the canonical weight w. Prepared in fp32 or better."""
        if "of" in leaf or "add.0" in leaf:
            with exactly(w):
                return resolve(self.method, leaf, bank, partial(self._prepare, w=w))
        if not self.prepares:
            return self.method, self.raw(leaf, bank, w)
        with exactly(w):
            return self.method, self._prepare(leaf, bank, w=w)

    def _prepare(self, leaf: Mapping[str, Tensor], bank: Mapping[str, Tensor], *, w: Tensor) -> Leaf:
        p = self.raw(leaf, bank, w)
        if not self.prepares or (leaf.keys() == self.prepared.keys() and leaf.keys() != self.spec.keys()):
            return p
        if not self.site.stacked:
            return self.method.prepare(p, w)
        constant: Leaf = {}

        def one(p: Leaf, w: Tensor) -> Leaf:
            out = self.method.prepare(p, w)
            constant.update({k: t for k, t in out.items() if k in self.common and t is p[k]})
            return {k: t for k, t in out.items() if k not in constant}

        return {**vmap(one, (self.axes(p), 0), randomness="different")(p, w), **{k: p[k] for k in constant}}

    def raw(self, leaf: Mapping[str, Tensor], bank: Mapping[str, Tensor], w: Tensor) -> Leaf:
        """Everything the method has at this site, in fp32 or better."""
        dtype = w.dtype if w.dtype == torch.float32 else torch.promote_types(w.dtype, torch.float32)
        p: Any = leaf if self.plain and not bank else {**self.frozen, **bank, **leaf}
        for t in p.values():
            if t.dtype is not dtype:
                break
        else:
            return p  # type: ignore[no-any-return]
        p = dict(p)
        for k, t in p.items():
            if t.dtype != dtype and t.is_floating_point():
                p[k] = t.to(dtype)
        return p

    def delta(self, method: Weight, p: dict[str, Any], w: Tensor) -> Tensor:
        """The change of the canonical weight w, in fp32 or better; p prepared, expert by expert if stacked."""
        with exactly(w):
            if self.site.stacked:
                return vmap(method.delta, (self.axes(p), 0), randomness="different")(p, wide(w))
            return method.delta(p, wide(w))

    def new_bias(self, method: Weight, p: dict[str, Any], b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What the method makes of the layer's bias b, in b's dtype; `dtype` is the weight's, for a layer without one.

        None where the layer has no bias and gets none.
        """
        new = method.bias(p, None if b is None else wide(b))
        return None if new is None else new.to(dtype if b is None else b.dtype)

    def dense(self, method: Weight, p: dict[str, Any], w: Tensor) -> Tensor:
        """The adapted weight, in the shape and dtype of w (the parameter itself): computed wide, rounded once."""
        m = self.site.canonical(w)
        return self.site.original((wide(m) + self.delta(method, p, m)).to(w.dtype))


class Plan(Mapping[str, Entry]):
    """site name → Entry, in the model's order. Static: nothing in it is ever trained."""

    def __init__(self, entries: dict[str, Entry], rules: Mapping[str, Weight], banks: dict[str, Any]):
        self.entries, self.rules, self.banks = entries, dict(rules), banks
        # what delta, merge and prepare are about, and eval mode: no dropout
        self.meant = {name: replace(e, method=e.method.eval()) for name, e in entries.items()}
        # bias slot → the site whose method changes it
        self.owners = {e.site.bias: name for name, e in entries.items() if e.site.bias and e.changes_bias}
        self.slots = list(dict.fromkeys([*entries, *self.owners]))

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def check(self, adapter: Mapping[str, Any], lead: int = 0) -> None:
        """Raise unless `adapter` fits: KeyError for names, ValueError for shapes and dtypes. `lead`: stacked axes."""
        if not isinstance(adapter, Mapping):
            raise TypeError(f"an adapter is a dict of site name → dict of tensors, not {type(adapter).__name__}")
        if adapter.keys() != self.entries.keys() | self.banks.keys():
            known = [*self.entries, *self.banks]
            for name in adapter:
                if name not in self.entries and name not in self.banks:
                    raise KeyError(f"the adapter has {name!r}, which the plan does not adapt{near(name, known)}")
            missing = [n for n in known if n not in adapter]
            raise KeyError(
                f"the adapter lacks {len(missing)} of the plan's {len(known)} sites, {missing[0]!r} first: it was made "
                "for other rules. Start from net.init() and fill in what you have."
            )
        for name, leaf in adapter.items():
            entry = self.entries.get(name)
            if lead or entry is None or not _fits(leaf, entry.spec):
                self._check_leaf(name, leaf, lead)

    def _check_leaf(self, name: str, leaf: Any, lead: int) -> None:
        entry = self.entries.get(name)
        spec, prepared = (entry.spec, entry.prepared) if entry else (self.banks[name], {})
        if not isinstance(leaf, Mapping):
            raise TypeError(f"{name}: its leaf is a {type(leaf).__name__}; give a dict of tensors {sorted(spec)}")
        for part in terms(leaf, name, lead) if is_expression(leaf) else (leaf,):
            if part.keys() == spec.keys() or (entry and part.keys() == prepared.keys()):
                want = spec if part.keys() == spec.keys() else prepared
                for k, t in part.items():
                    if not isinstance(t, Tensor):
                        raise TypeError(f"{name}: {k} is a {type(t).__name__}; leaves are floating-point tensors")
                    if t.shape[lead:] != want[k] or t.dim() < lead or not t.is_floating_point():
                        _bad_tensor(name, k, t, want[k], lead)
            else:
                raise KeyError(
                    f"{name}: the leaf has {sorted(part)}, and {entry.method if entry else 'the bank'} has "
                    f"{sorted(spec)}"
                )


def _fits(leaf: Any, spec: Mapping[str, Size]) -> bool:
    """Whether `leaf` is exactly what `spec` says: the common case of `check`, in the fewest steps."""
    if type(leaf) is not dict or len(leaf) != len(spec):
        return False
    for k, shape in spec.items():
        t = leaf.get(k)
        if not isinstance(t, Tensor) or t.shape != shape or not t.is_floating_point():
            return False
    return True


def _bad_tensor(name: str, key: str, t: Tensor, shape: Size, lead: int) -> None:
    if not t.is_floating_point():
        raise ValueError(f"{name}: {key} is {t.dtype}; leaves are floating-point tensors: convert it with .float()")
    stacked = (
        " (this looks like a stack of adapters: use vmap(net.apply, …) or net.mixed)"
        if (not lead and t.shape[1:] == shape)
        else ""
    )
    want = ["k"] * lead + list(shape)
    raise ValueError(f"{name}: {key} has shape {list(t.shape)}, and the plan wants {want}{stacked}")


@lasting()
def make(
    model: nn.Module,
    given: Mapping[str, Method],
    seed: int,
    *,
    taken: Mapping[str, str] | None = None,
    constants: bool = True,
) -> Plan:
    """The plan of the rules `given` on `model`. Everything that can be wrong is found on meta tensors first.

    taken: site name → its rule, where that is known already: no pattern is matched then.
    constants: if False, the plan's frozen tensors are on the meta device, for the caller to replace.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"adapt takes a torch.nn.Module, not {type(model).__name__}")
    for name, module in model.named_modules():
        if any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
            raise TypeError(
                f"{name or 'the model'}: fully_shard moves this module's parameters in and out by hooks of its own, so "
                "there are none to adapt. Adapt the model first and shard the module: m = peftfn.as_module(net, a); "
                "fully_shard(m)"
            )
    rules = checked(given)
    found = sites(model)
    if taken is None:
        taken = match(rules, found)
        for name, pattern in taken.items():
            refuse_occupied(model, name, pattern)
    taken = {n: taken[n] for n in found if n in taken}
    values = parameters(model)
    weights = {name: p for name, p in values.items() if name in taken}
    for name, w in weights.items():
        if isinstance(w, QuantisedWeight) and (problem := w.problem()):
            raise ValueError(f"{name}: {type(w.layer).__name__} cannot be adapted as it is: {problem}")
        if not w.is_floating_point():
            raise ValueError(
                f"{name}: the weight is {w.dtype}, and a method needs a floating-point one: dequantise it, or leave "
                "this site out of the rules"
            )
    canonical = {name: found[name].canonical(w) for name, w in weights.items()}
    of_rule = {pattern: [n for n in taken if taken[n] == pattern] for pattern in rules}
    banks = _bank_names(rules)
    probes: dict[tuple[Any, ...], Entry] = {}
    dry = {
        p: _Shared.of(m, Rng(seed, p, sites=found, device="meta"), {n: canonical[n] for n in of_rule[p]})
        for p, m in rules.items()
    }

    def kind_of(name: str) -> tuple[Any, ...]:
        site = found[name]
        return taken[name], site.kind, site.shape, weights[name].dtype, site.bias is None, site.bias in values

    for name, pattern in taken.items():
        if kind_of(name) not in probes:
            empty = torch.empty(canonical[name].shape, dtype=weights[name].dtype, device="meta")
            probes[kind_of(name)] = _probe(
                found[name],
                pattern,
                rules[pattern],
                empty,
                dry[pattern],
                banks.get(pattern),
                found[name].bias in values,
            )
    real = {
        p: _shared(m, Rng(seed, p, sites=found), {n: canonical[n] for n in of_rule[p]}) if constants else dry[p].frozen
        for p, m in rules.items()
    }
    moved: dict[tuple[int, torch.device], Tensor] = {}
    entries = {}
    for name, pattern in taken.items():
        method, w = rules[pattern], weights[name] if constants else torch.empty_like(weights[name], device="meta")
        frozen = {
            k: moved.setdefault((id(t), w.device), on_mesh(t.to(w.device), w))
            for k, t in real[pattern].get(name, {}).items()
        }
        if method.overrides("frozen"):
            frozen |= draw(method.frozen, found[name], w, seed, bias=values.get(found[name].bias or ""))
        entries[name] = replace(probes[kind_of(name)], site=found[name], frozen=frozen)
    return Plan(entries, rules, {banks[p]: {k: t.shape for k, t in dry[p].bank.items()} for p in rules if p in banks})


@dataclass
class _Shared:
    frozen: Mapping[str, Leaf]
    bank: Leaf

    @classmethod
    def of(cls, method: Weight, rng: Rng, weights: Mapping[str, Tensor]) -> "_Shared":
        if not method.overrides("shared") and not method.overrides("bank"):
            return cls({}, {})
        empty = {n: torch.empty(w.shape, dtype=w.dtype, device="meta") for n, w in weights.items()}
        return cls(method.shared(rng, empty), method.bank(rng, empty))


def _shared(method: Weight, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
    """What the sites of a rule share, none of it memory of theirs."""
    made = method.shared(rng, weights)
    flat = {f"{name}: {k}": t for name, tensors in made.items() for k, t in tensors.items()}
    check_own(f"{type(method).__name__}.shared", flat, [(f"the weight {n}", w) for n, w in weights.items()], alike=True)
    return made


def _bank_names(rules: Mapping[str, Weight]) -> dict[str, str]:
    """rule → name of its bank in the adapter: the method's class name, numbered from the second on."""
    out: dict[str, str] = {}
    for pattern, method in rules.items():
        if method.overrides("bank"):
            n = sum(name.split(".")[0] == type(method).__name__ for name in out.values())
            out[pattern] = type(method).__name__ + (f".{n}" if n else "")
    return out


def _probe(
    site: Site, rule: str, method: Weight, empty: Tensor, shared: _Shared, bank: str | None, biased: bool
) -> Entry:
    """The entry of a site without its tensors, from a run of the method on meta tensors."""
    w = empty[0] if site.stacked else empty
    dtype = torch.promote_types(w.dtype, torch.float32)
    given = torch.empty(len(w), dtype=w.dtype, device="meta") if biased else None
    rng = Rng(0, site.name, site=site, dtype=dtype, device="meta", bias=given)
    common, cls = shared.frozen.get(site.name, {}), type(method).__name__
    source = dict.fromkeys(common, "shared") | dict.fromkeys(shared.bank, "bank")
    try:
        for what, made in (("shared", common), ("bank", shared.bank)):
            check_tensors(f"{cls}.{what}", made)
        leaf, own = (called(method, f, getattr(method, f), rng, w) for f in ("init", "frozen"))
        theirs = [("the weight w", w), ("the layer's bias", given)]
        for what, made in (("init", leaf), ("frozen", own)):
            check_tensors(f"{cls}.{what}", made)
            check_own(f"{cls}.{what}", made, theirs, alike=what == "frozen")
            source |= dict.fromkeys(made, what)
        constants = {**common, **own}
        p = {k: t.to(dtype) if t.is_floating_point() else t for k, t in {**constants, **shared.bank, **leaf}.items()}
        if len(p) != len(common) + len(own) + len(shared.bank) + len(leaf):
            raise ValueError(f"{method} gives one name to two of its tensors: {sorted(p)}")
        ready = called(method, "prepare", method.prepare, p, w, p=source)
        change = called(method, "delta", method.delta, ready, wide(w), p=source) if method.mergeable else w
        if change.shape != w.shape:
            raise ValueError(f"{cls}.delta gives {list(change.shape)} for a weight {list(w.shape)}")
        adds_bias = called(method, "bias", method.bias, ready, None, p=source) is not None
        b = torch.empty(len(w), device="meta") if site.bias else None
        new = called(method, "bias", method.bias, ready, b, p=source)
        if b is not None and (new is None or new.shape != b.shape):
            raise ValueError(
                f"{cls}.bias gives {None if new is None else list(new.shape)} for a bias {list(b.shape)}: return the "
                "adapted bias, or b itself where it stays as it is"
            )
        changes_bias = new is not b
    except ValueError as e:
        raise ValueError(f"{site.name} {list(site.shape)}: {e}") from e
    except Exception as e:
        e.add_note(f"at {site.name} {list(site.shape)}: {method}")
        raise
    if adds_bias and site.bias is None:
        raise ValueError(
            f"{site.name}: {method} adds to the layer's bias, and a {site.kind} site has no place for one. Choose a "
            "method without a bias here."
        )
    experts = site.shape[:1] if site.stacked else Size()
    meant = method.eval().prepare(p, w)  # a prepared leaf is one for eval mode
    changed = {k: t for k, t in meant.items() if k not in constants or t is not p[k]}
    prepared = {
        k: t.shape if k in shared.bank and t is p[k] else Size((*experts, *t.shape)) for k, t in changed.items()
    }
    spec = {k: Size((*experts, *t.shape)) for k, t in leaf.items()}
    names = frozenset({*common, *shared.bank})
    return Entry(site, rule, method, {}, spec, prepared, names, bank, adds_bias, changes_bias)


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
        bias = (bias.full_tensor() if is_sharded(bias) else bias).to(w.device)  # type: ignore[attr-defined]
    rng = partial(Rng, seed, site=site, dtype=dtype, device=w.device)
    if is_sharded(w):
        whole = draw(make, site, w.full_tensor(), seed, dtype, bias=bias)  # every rank draws the same
        return {k: placed(t, m) for k, t in whole.items()}
    if not site.stacked:
        made = make(rng(site.name, constants=constants, bias=bias), m)
        theirs = [("the weight w", m), ("the layer's bias", bias)]
        theirs += [(f"the constant {k!r}", t) for k, t in (constants or {}).items()]
        what = f"{site.name}: {type(make.__self__).__name__}.{make.__name__}"
        check_own(what, made, theirs, alike=make.__name__ == "frozen")
        return {k: t.contiguous() for k, t in made.items()}
    if w.is_meta:
        return {k: t.expand(len(m), *t.shape) for k, t in make(rng(site.name), m[0]).items()}
    each = [make(rng(f"{site.name}[{e}]"), m[e]) for e in range(len(m))]
    return {k: torch.stack([leaf[k] for leaf in each]) for k in each[0]}
