"""A plan: which method stands at which site, and what an entry makes of its tensors. `make.py` makes one of rules."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Size, Tensor
from torch.func import vmap

from peftfn.core.combine import is_expression, own_name, resolve, terms
from peftfn.core.method import Leaf, Method, Weight
from peftfn.core.modules import Companion
from peftfn.model.names import near
from peftfn.model.place import MODULE, TOKENS
from peftfn.model.site import Site
from peftfn.tensors.precision import wide
from peftfn.tensors.transform import exactly

Adapter = dict[str, Leaf]
"""site name (or bank name) → trainable tensors"""


@dataclass(frozen=True)
class Entry:
    """One site of a plan: the method that stands there, and what of it does not depend on the adapter.

    It serves the methods at modules as it is; those that change a weight have a `WeightEntry`.
    """

    # Where, and which method.
    site: Site
    rule: str  # the pattern that took the site
    method: Any
    frozen: Leaf  # constants: the site's own and those its rule shares
    # What a run of the method on the meta device showed (`probe.py`).
    spec: dict[str, Size]  # the shapes of a leaf
    prepared: dict[str, Size]  # the shapes of a prepared leaf
    common: frozenset[str]  # names of tensors without an expert axis at a stacked site
    bank: str | None = None  # the adapter's entry with the rule's trainable shared tensors
    adds_bias: bool = False  # gives a bias also to a layer that has none
    changes_bias: bool = False  # makes another bias of the one the layer has, or adds one
    companions: tuple[Companion, ...] = ()  # what the method puts at other modules
    fp32: bool = False  # on half-precision inputs, its products are in fp32; the base's own stays in half precision
    # What a call would ask at every site, answered once, from the fields above.
    family: type[Method] = field(init=False)
    hooks: frozenset[str] = field(init=False)  # the functions that a method around a module has
    prepares: bool = field(init=False)  # the method has a `prepare`
    plain: bool = field(init=False)  # it has no constants here

    to_matrix: ClassVar[Any] = None  # the parameter ↦ canonical; None: it is
    gated: ClassVar[bool] = False  # the method acts on some tokens alone, those that `acts_on` says

    def __post_init__(self) -> None:
        self._decide(
            family=self.method.family,
            hooks=getattr(self.method, "hooks", frozenset()),
            prepares=self.method.overrides("prepare"),
            plain=not self.frozen,
        )

    def _decide(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def eval(self) -> Self:
        """The entry with its method as it is in eval mode."""
        meant = self.method.eval()
        return self if meant is self.method else replace(self, method=meant)

    def __iter__(self) -> Iterator[Any]:
        """method, frozen: a plan reads as dict[site, (method, frozen tensors)]."""
        return iter((self.method, self.frozen))

    def axes(self, p: Mapping[str, Any]) -> dict[str, Any]:
        """`in_dims` of p over the experts of a stacked site."""
        shared = {*self.common, "scale"}  # no assignment inside the comprehension: the compiler cannot trace one
        return {k: None if own_name(k) in shared else 0 for k in p}

    def tensors(self, leaf: Mapping[str, Any], bank: Mapping[str, Any], w: Any) -> tuple[Any, dict[str, Any]]:
        """(method, prepared tensors) for `leaf` at the canonical weight w. Prepared in fp32 or better."""
        if "of" in leaf or "add.0" in leaf:
            with exactly(w):
                return resolve(self.method, leaf, bank, partial(self._prepare, w=w))
        if not self.prepares:
            return self.method, self.raw(leaf, bank, w)
        with exactly(w):
            return self.method, self._prepare(leaf, bank, w=w)

    def _prepare(self, leaf: Mapping[str, Tensor], bank: Mapping[str, Tensor], *, w: Any) -> Leaf:
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

    def raw(self, leaf: Mapping[str, Tensor], bank: Mapping[str, Tensor], w: Any) -> Leaf:
        """Everything the method has at this site, in fp32 or better."""
        dtype = w.dtype if w.dtype == torch.float32 else torch.promote_types(w.dtype, torch.float32)
        p: Any = leaf if self.plain and not bank and type(leaf) is dict else {**self.frozen, **bank, **leaf}
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

    # What an adapter changes of a weight: of these sites, nothing.

    def check_merge(self) -> None:
        """ValueError unless the method changes a weight, into which the change can be folded."""
        raise ValueError(
            f"{self.site.label}: {self.method} acts on what this module takes or returns, so it is no change of a "
            "weight and cannot be merged. Use net.apply or as_module; for a merge of the rest, call adapt without this "
            "rule, and merge the adapter without this site"
        )

    def delta(self, method: Any, p: dict[str, Any], w: Any) -> Tensor:
        """The change of the canonical weight w, in fp32 or better; ValueError as in `check_merge`."""
        self.check_merge()
        raise NotImplementedError

    def dense(self, method: Any, p: dict[str, Any], w: Any) -> Tensor:
        """The adapted weight, in the shape and dtype of w (the parameter itself); ValueError as in `check_merge`."""
        self.check_merge()
        raise NotImplementedError

    def new_bias(self, method: Any, p: dict[str, Any], b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What the method makes of the layer's bias b, in b's dtype; `dtype` is the weight's, for a layer without one.

        None where the layer has no bias and gets none.
        """
        return b


@dataclass(frozen=True)
class WeightEntry(Entry):
    """One site of a plan that is a parameter."""

    fast: bool = field(init=False)  # the method's `linear` is more than the product with the dense weight
    low: bool = field(init=False)  # it has a `low_rank`
    gated: bool = field(init=False)  # type: ignore[misc]
    to_matrix: Callable[[Tensor], Tensor] | None = field(init=False)  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        is_matrix = self.site.kind in ("linear", "stack", "other")
        self._decide(
            fast=self.method.fast_linear(),
            low=self.method.overrides("low_rank"),
            gated=self.method.overrides("acts_on"),
            to_matrix=None if is_matrix else self.site.canonical,
        )

    def check_merge(self) -> None:
        if not self.method.mergeable:
            raise ValueError(
                f"{self.site.name}: {self.method} depends on the input, so it is no change of the weight and cannot be "
                "merged. Use net.apply or as_module, or leave this site out"
            )

    def delta(self, method: Weight, p: dict[str, Any], w: Tensor) -> Tensor:
        """p prepared, expert by expert if stacked."""
        self.check_merge()
        with exactly(w):
            if self.site.stacked:
                return vmap(method.delta, (self.axes(p), 0), randomness="different")(p, wide(w))
            return method.delta(p, wide(w))

    def new_bias(self, method: Weight, p: dict[str, Any], b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        new = method.bias(p, None if b is None else wide(b))
        return None if new is None else new.to(dtype if b is None else b.dtype)

    def dense(self, method: Weight, p: dict[str, Any], w: Tensor) -> Tensor:
        """Computed wide, rounded once."""
        m = self.site.canonical(w)
        return self.site.original((wide(m) + self.delta(method, p, m)).to(w.dtype))


class Plan(Mapping[str, Entry]):
    """site name → Entry, in the model's order. Static: nothing in it is ever trained."""

    def __init__(self, entries: dict[str, Entry], rules: Mapping[str, Method], banks: dict[str, Any]):
        self.entries, self.rules, self.banks = entries, dict(rules), banks
        # what delta, merge and prepare are about, and eval mode: no dropout
        self.meant = {name: e.eval() for name, e in entries.items()}
        # bias slot → the site whose method changes it
        self.owners = {e.site.bias: name for name, e in entries.items() if e.site.bias and e.changes_bias}
        self.places = tuple(e.site for e in entries.values() if e.site.kind in (MODULE, TOKENS))
        others = [c.at for e in entries.values() for c in e.companions]
        self.accompanied = {name: e.companions for name, e in entries.items() if e.companions}
        self.gated = tuple(name for name, e in entries.items() if e.gated)
        self.slots = list(dict.fromkeys([*entries, *self.owners, *others]))

    def __getitem__(self, name: str) -> Entry:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def check(self, adapter: Mapping[str, Any], lead: int = 0) -> None:
        """Raise unless `adapter` fits: KeyError for names, ValueError for shapes and dtypes. `lead`: stacked axes."""
        if not isinstance(adapter, Mapping):
            cure = ": give a stack, peftfn.stack(adapters)" if lead and isinstance(adapter, list | tuple) else ""
            raise TypeError(f"an adapter is a dict of site name → dict of tensors, not {type(adapter).__name__}{cure}")
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
        if entry is not None and is_expression(leaf) and not entry.method.combines:
            raise ValueError(
                f"{entry.site.label}: {entry.method} has no scaling and no sum: give an adapter with a plain leaf here"
            )
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
    stacked = ""
    if not lead and t.shape[1:] == shape:
        stacked = " (this looks like a stack of adapters: use vmap(net.apply, …) or net.mixed)"
    elif lead and t.shape == shape:
        stacked = " (this looks like one adapter: a stack is peftfn.stack([adapter, …]))"
    want = ["k"] * lead + list(shape)
    raise ValueError(f"{name}: {key} has shape {list(t.shape)}, and the plan wants {want}{stacked}")
