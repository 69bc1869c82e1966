"""What a method needs at a site, found by a run on the meta device, where everything that can be wrong is found."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Size, Tensor, nn

from peftfn.core.made import called, check_own, check_tensors, held_at
from peftfn.core.method import Leaf, Method, Weight
from peftfn.core.modules import Along, ModuleMethod, Prefix, Tokens
from peftfn.core.plan import Entry, WeightEntry
from peftfn.core.rng import Rng
from peftfn.model.model import modules_of
from peftfn.model.place import Place
from peftfn.model.site import Site
from peftfn.model.structure import copy_structure, reachable
from peftfn.tensors.loaded import unhook_
from peftfn.tensors.precision import wide


@dataclass(frozen=True)
class Shared:
    """What the sites of a rule share: constants, by site; and trainable tensors. On the meta device."""

    frozen: Mapping[str, Leaf]
    bank: Leaf


class _Probe:
    """A run of a method at a site on meta tensors: every function of it once, its results checked."""

    made: ClassVar[type[Entry]] = Entry

    def __init__(self, site: Site, method: Any, w: Any, shared: Shared, biased: bool):
        self.site, self.method, self.bank, self.w = site, method, shared.bank, w
        self.common = shared.frozen.get(site.name, {})
        self.given: Tensor | None = None  # the layer's bias
        self.source = dict.fromkeys(self.common, "shared") | dict.fromkeys(self.bank, "bank")  # tensor → its function

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.w.dtype, torch.float32)

    def entry(self, rule: str, bank: str | None) -> Entry:
        site, method = self.site, self.method
        try:
            leaf, own = self.drawn()
            p = self.joined(leaf, own)
            found = self.used(p)
        except ValueError as e:
            raise ValueError(f"{site.label} {list(site.shape)}: {e}") from e
        except Exception as e:
            e.add_note(f"at {site.label} {list(site.shape)}: {method}")
            raise
        return self.made(
            site,
            rule,
            method,
            frozen={},
            spec={k: self.stacked(t) for k, t in leaf.items()},
            prepared=self.prepared(p, own),
            common=frozenset({*self.common, *self.bank}),
            bank=bank,
            **found,
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
        theirs = [*held_at(self.w), ("the layer's bias", self.given)]
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

    def ready(self, p: Leaf) -> Leaf:
        """What `prepare` returns."""
        made: Leaf = called(self.method, "prepare", self.method.prepare, p, self.w, p=self.source)
        return made

    def used(self, p: Leaf) -> dict[str, Any]:
        """What else the entry is to have, after a run of `prepare` and of the functions that take what it returns."""
        self.ready(p)
        return {}

    def prepared(self, p: Leaf, own: Leaf) -> dict[str, Size]:
        """The shapes of a prepared leaf, which is one for eval mode: what `prepare` returns but for constants."""
        made = self.method.eval().prepare(p, self.w)
        constants = {*self.common, *own}
        changed = {k: t for k, t in made.items() if k not in constants or t is not p[k]}
        return {k: t.shape if k in self.bank and t is p[k] else self.stacked(t) for k, t in changed.items()}


class _WeightProbe(_Probe):
    """Of a method that changes a weight."""

    made = WeightEntry

    def __init__(self, site: Site, method: Weight, w: Tensor, shared: Shared, biased: bool):
        super().__init__(site, method, w[0] if site.stacked else w, shared, biased)
        self.given = torch.empty(len(self.w), dtype=self.w.dtype, device="meta") if biased else None

    def used(self, p: Leaf) -> dict[str, Any]:
        """(whether the method adds a bias to a layer without one, whether it changes the bias of a layer)"""
        method, w, cls, source = self.method, self.w, type(self.method).__name__, self.source
        if method.mergeable and method.overrides("acts_on"):
            raise ValueError(
                f"{cls} acts on some tokens alone (it defines acts_on), so no change of the weight is what it means: "
                "set mergeable = False in its class"
            )
        ready = self.ready(p)
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
        if adds_bias and self.site.bias is None:
            raise ValueError(
                f"{method} adds to the layer's bias, and a {self.site.kind} site has no place for one. Choose a method "
                "without a bias here."
            )
        return {"adds_bias": adds_bias, "changes_bias": new is not b}


class _ModuleProbe(_Probe):
    """Of a method around a module's forward."""

    def used(self, p: Leaf) -> dict[str, Any]:
        method, m = self.method, self.w
        ready, dim = self.ready(p), getattr(method, "dim", 0)
        seen = [torch.empty(2, 3, dtype=torch.bool, device="meta")] if method.sees_mask else []
        if not method.hooks:
            raise ValueError(f"{type(method).__name__} must define before, after or leave: otherwise it does nothing")
        x, y = (torch.empty(2, 3, dim or size, device="meta", dtype=self.dtype) for size in m.sizes)
        for hook, xs in (("before", (x,)), ("after", (x, y))):
            known = method.features_last and not (method.watched or method.entered) and xs[-1].shape[-1]
            if hook not in method.hooks or not known:
                continue  # what others return or are given is not known, nor the size of some modules' hidden states
            new = called(method, hook, getattr(method, hook), ready, m, *xs, *seen, p=self.source, names="xy")
            if not isinstance(new, Tensor) or new.shape != xs[-1].shape:
                raise ValueError(
                    f"{type(method).__name__}.{hook} returns {list(getattr(new, 'shape', ()))} for hidden states "
                    f"{list(xs[-1].shape)}; it must return hidden states of that shape"
                )
        return {}


PROBES: dict[type[Method], type[_Probe]] = {
    Weight: _WeightProbe,
    ModuleMethod: _ModuleProbe,
    Tokens: _Probe,
    Prefix: _Probe,
    Along: _Probe,
}
"""Family → what finds out what its methods need at a site."""


class _Sketch(Place):
    """A place without values: its module is a copy on the meta device, made when it is asked for."""

    def __init__(self, m: Place):
        vars(self).update({k: v for k, v in vars(m).items() if k != "module"})
        self._of = m.module

    @cached_property
    def module(self) -> Any:  # type: ignore[override]
        root, copies = copy_structure(self._of, reachable(modules_of(self._of))[0], {})
        for copied in copies:
            unhook_(copied)
        for slots in (d for copied in copies for d in (copied._parameters, copied._buffers)):
            for k, t in slots.items():
                if t is not None:
                    empty: Any = torch.empty(t.shape, dtype=t.dtype, device="meta")
                    slots[k] = nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty
        return root

    @property
    def forward(self) -> Any:
        return self.module.forward

    @property
    def device(self) -> torch.device:
        return torch.device("meta")


def sketch(w: Any) -> Any:
    """What stands for w without values: an empty tensor on the meta device, or a place without values."""
    return _Sketch(w) if isinstance(w, Place) else torch.empty(w.shape, dtype=w.dtype, device="meta")
