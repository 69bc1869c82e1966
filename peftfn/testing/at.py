"""A method at one site of a case: what the core gives its functions there, and which it would call."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Leaf, Method, Weight
from peftfn.core.modules import Along, ModuleMethod, Tokens
from peftfn.core.rng import Rng
from peftfn.model.place import Place
from peftfn.tensors.precision import cast, wide
from peftfn.tensors.states import states_in, states_out
from peftfn.testing.case import Case
from peftfn.testing.meaning import Seen

Function = Callable[..., Any]


@dataclass(frozen=True)
class At:
    """A method at one site of a case: what its functions get there. Of a stack of experts, the first expert."""

    method: Any
    entry: Any
    w: Any  # canonical, or a `Place`
    raw: Leaf  # leaf, bank and constants, in fp32 or better

    @classmethod
    def of(cls, c: Case, name: str, seed: int = 0) -> "At":
        raise NotImplementedError

    @staticmethod
    def joined(c: Case, entry: Any, seed: int, w: Any) -> Leaf:
        """All the method's tensors at a site."""
        a = c.adapter(seed)
        raw: Leaf = entry.raw(a[entry.site.name], a[entry.bank] if entry.bank else {}, w)
        return raw

    def prepared(self, raw: Leaf | None = None) -> Leaf:
        made: Leaf = self.method.prepare(self.raw if raw is None else raw, self.w)
        return made

    def rng(self, seed: int) -> Rng:
        return Rng(seed, self.entry.site.name, site=self.entry.site, constants=self.entry.frozen, bias=self.b)

    @property
    def b(self) -> Tensor | None:
        return None

    @property
    def given(self) -> dict[str, Tensor]:
        """What no function may write to, by what messages call it."""
        raise NotImplementedError

    def drawn(self, name: str, seed: int) -> Leaf:
        """What `init` or `frozen` gives here."""
        made: Leaf = getattr(self.method, name)(self.rng(seed), self.w)
        return made

    def uses(self, method: Any = None, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Function]]:
        """(name, p ↦ its result) of the functions that take prepared tensors, those that the core would call."""
        raise NotImplementedError


@dataclass(frozen=True)
class AtWeight(At):
    """Of a method that changes a weight."""

    bias: Tensor | None

    @classmethod
    def of(cls, c: Case, name: str, seed: int = 0) -> "AtWeight":
        entry, tensors = c.net.plan[name], dict(c.model.named_parameters(remove_duplicate=False))
        w, b = entry.site.canonical(tensors[name].detach()).clone(), tensors.get(entry.site.bias or "")
        raw = cls.joined(c, entry, seed, w)
        if entry.site.stacked:
            raw, w = {k: t if k in entry.common else t[0] for k, t in raw.items()}, w[0]
        raw = {k: t.detach().clone() for k, t in raw.items()}
        return cls(entry.method, entry, w, raw, None if b is None else b.detach().clone())

    @property
    def b(self) -> Tensor | None:
        return self.bias

    @property
    def given(self) -> dict[str, Tensor]:
        return {"w": self.w, **({} if self.b is None else {"b": self.b})}

    def features(self, method: Weight, dtype: torch.dtype) -> tuple[str, Function] | None:
        """(name, p ↦ its result) of what runs at a linear layer; None where that is the dense weight."""
        if "linear" not in method.kinds or not method.fast_linear() or self.w.dim() != 2:
            return None
        x = torch.randn(2, 3, self.w.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
        return "linear" if method.overrides("linear") else "product", lambda p: method.linear(p, self.w, x)

    def uses(self, method: Any = None, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Function]]:
        m, w, dtype = method or self.method, self.w, dtype or self.w.dtype
        if m.mergeable and not m.only_bias():
            yield "delta", lambda p: m.delta(p, wide(w))
        if self.entry.adds_bias or (self.entry.changes_bias and self.b is not None):
            yield "bias", lambda p: m.bias(p, None if self.b is None else wide(self.b))
        if (features := self.features(m, dtype)) is not None:
            yield features
        if m.overrides("product") and w.dim() == 2:
            ids = torch.arange(w.shape[1])
            yield "product", lambda p: m.product(p, w, ids, lambda i, m: F.embedding(i, m.mT))


@dataclass(frozen=True)
class AtInputs(At):
    """Of a method on a backbone's inputs: what it makes are its prepared tensors."""

    @classmethod
    def of(cls, c: Case, name: str, seed: int = 0) -> "AtInputs":
        entry, place = c.net.plan[name], Place.of(copy.deepcopy(c.model).requires_grad_(False), name, tokens=True)
        raw = {k: t.detach().clone() for k, t in cls.joined(c, entry, seed, place).items()}
        return cls(entry.method, entry, place, raw)

    @property
    def given(self) -> dict[str, Tensor]:
        return {f"m.module.{k}": t for k, t in self.w.module.named_parameters()}

    def uses(self, method: Any = None, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Function]]:
        m = method or self.method
        if isinstance(m, Along):
            yield from self._along(m)
        elif isinstance(m, Tokens):
            yield "tokens", lambda p: p["tokens"]
        else:
            yield "prefix", lambda p: torch.stack([p["keys"], p["values"]])

    def _along(self, m: Along) -> Iterator[tuple[str, Function]]:
        ids = torch.tensor([[1, 2, 3], [3, 1, 2]])
        given = {"input_ids": ids, "inputs_embeds": self.w.embedding()(ids)}
        yield "start", lambda p: m.start(p, self.w, dict(given), lambda config: None)
        size, g = m.size(self.w), torch.Generator().manual_seed(0)
        x, state = (torch.randn(2, 3, size, generator=g).to(self.w.dtype) for _ in range(2))
        for i in range(len(m.blocks(self.w))):
            yield "into", lambda p, i=i: m.into(cast(p, x.dtype), i, x, state)  # type: ignore[misc]
            yield "onward", lambda p, i=i: m.onward(cast(p, x.dtype), i, x, state)  # type: ignore[misc]


@dataclass(frozen=True)
class AtModule(At):
    """Of a method around a module: with what the module gets and returns in the case's model."""

    args: Any
    kwargs: Any
    out: Any
    seen: list[Tensor]

    @classmethod
    def of(cls, c: Case, name: str, seed: int = 0) -> "AtModule":
        entry, model = c.net.plan[name], copy.deepcopy(c.model).requires_grad_(False)
        place, found = Place.of(model, name), list[Any]()

        def see(module: Any, args: Any, kwargs: Any, out: Any) -> None:
            found.append((args, kwargs, out))

        hook, seen = place.module.register_forward_hook(see, with_kwargs=True), Seen(model, entry.method)
        model(c.x)
        hook.remove()
        values = [t.detach() for t in seen.values(c.x)]
        seen.remove()
        raw = {k: t.detach().clone() for k, t in cls.joined(c, entry, seed, place).items()}
        args, kwargs, out = found[-1]
        return cls(entry.method, entry, place, raw, args, kwargs, out, values)

    @property
    def given(self) -> dict[str, Tensor]:
        x, y = states_in(self.args, self.kwargs)[0], states_out(self.out)[0]
        return {"x": x, "y": y, **{f"m.module.{k}": t for k, t in self.w.module.named_parameters()}}

    def points(self, method: Any = None) -> Iterator[tuple[str, Function, list[Tensor]]]:
        """(name, (p, hidden states …) ↦ its result, the hidden states) of `before` and `after`."""
        m, x, y = method or self.method, states_in(self.args, self.kwargs)[0], states_out(self.out)[0]
        if "before" in m.hooks and x.is_floating_point():
            yield "before", lambda p, x, *seen: m.before(cast(p, x.dtype), self.w, x, *seen), [x, *self.seen]
        if "after" in m.hooks:
            yield "after", lambda p, x, y, *seen: m.after(cast(p, y.dtype), self.w, x, y, *seen), [x, y, *self.seen]

    def uses(self, method: Any = None, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Function]]:
        m = method or self.method
        for name, f, xs in self.points(m):
            yield name, lambda p, f=f, xs=xs: f(p, *xs)  # type: ignore[misc]
        if "leave" in m.hooks:
            yield "leave", lambda p: states_out(m.leave(p, self.w, self.args, self.kwargs, self.out))[0]


def places(c: Case, seed: int = 0) -> list[Any]:
    kinds: dict[type[Method], type[At]] = {Weight: AtWeight, ModuleMethod: AtModule}
    kind = kinds.get(type(c.method).family, AtInputs)
    return [kind.of(c, name, seed) for name in c.net.plan]


def said(method: Any, name: str) -> str:
    return f"{type(method).__name__}.{name}"


def replace_method(at: At, method: Any) -> Any:
    return replace(at, method=method)
