"""Laws of a method's functions taken one by one, so that what is wrong is named: each is of one `Case`.

The laws of laws.py compare what nets do. A method that breaks one of them breaks it somewhere in a model; those here
come first and call `init`, `delta`, `linear`, … themselves, as the core does.
"""

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from peftfn.core import fields as fields_
from peftfn.core.made import memory
from peftfn.core.method import Leaf, Method, Weight
from peftfn.core.modules import Along, ModuleMethod, Prefix, Tokens
from peftfn.core.rng import Rng
from peftfn.model.model import weights_of
from peftfn.model.place import Place
from peftfn.tensors.precision import cast, wide
from peftfn.tensors.states import states_in, states_out
from peftfn.testing.case import Case, close
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


def functions(c: Case) -> None:
    """Functions are pure and return new tensors of the right dtype; draws come from rng; gradients come back; they run
    under vmap; low_rank is what linear and delta are; around a module, rows and later tokens are not mixed in."""
    for check in (
        own_draws,
        writes_nothing,
        repeats,
        new_names,
        own_dtypes,
        carries_gradients,
        maps,
        low_rank_is_linear,
        minds_rows_and_tokens,
    ):
        check(c)


def keeps(c: Case) -> None:
    """A method is a dataclass of its fields: it keeps no other value, and no tensor, on itself or on its class."""
    m, cls = c.method, type(c.method)
    named = {f.name for f in fields(m)}  # type: ignore[arg-type]
    c.net.apply(c.net.init(c.seed), c.x)
    if odd := sorted(vars(m).keys() - named):
        raise AssertionError(
            f"{cls.__name__} keeps {', '.join(odd)} beside its fields, so that methods with other values compare equal "
            "and files lose it: decorate the class with @dataclass(frozen=True), declare its hyper-parameters as "
            "fields, and keep nothing else"
        )
    for k, v in [(k, v) for owner in cls.__mro__[: cls.__mro__.index(cls.family)] for k, v in vars(owner).items()]:
        found = list(v.values()) if isinstance(v, Mapping) else list(v) if isinstance(v, list | tuple | set) else [v]
        assert not any(isinstance(t, Tensor) for t in found), (
            f"{cls.__name__} keeps a tensor in its class attribute {k}, which is then the same for every seed, site "
            "and adapter: make it in frozen (a constant of the site) or shared, with rng"
        )


def own_draws(c: Case) -> None:
    """init, frozen, shared and bank return new tensors, which depend on the seed, the sites and their weights alone."""
    for at in places(c):
        for name in ("init", "frozen"):
            if at.method.overrides(name):
                _drawn_alike(at.method, name, partial(at.drawn, name, c.seed))
        leaf, what = at.drawn("init", c.seed), said(at.method, "init")
        kinds = {k: t.dtype for k, t in leaf.items() if t.dtype != torch.float32}
        assert not kinds, f"{what} gives {kinds}; leaves are floating-point, in rng.dtype: make them by rng"
        assert not any(t.requires_grad for t in leaf.values()), (
            f"{what} gives tensors that require gradients, which is the caller's to say"
        )
    if not (c.method.overrides("shared") or c.method.overrides("bank")):
        return
    sites = {n: e.site for n, e in c.net.plan.items()}
    seen = weights_of(c.model, c.net.plan.places)
    weights = {n: s.canonical(seen[n]) for n, s in sites.items()}
    rng = partial(Rng, c.seed, "rule", sites=sites)

    def shared() -> Leaf:
        made = c.method.shared(rng(), weights)
        odd = sorted(made.keys() - weights.keys())
        assert not odd, f"{said(c.method, 'shared')} gives tensors to {odd}; the rule's sites are {sorted(weights)}"
        return {f"{site}: {k}": t for site, tensors in made.items() for k, t in tensors.items()}

    _drawn_alike(c.method, "shared", shared)
    _drawn_alike(c.method, "bank", lambda: c.method.bank(rng(), weights))
    other = c.method.bank(rng(), dict(reversed(weights.items())))
    for k, t in c.method.bank(rng(), weights).items():
        assert k in other and t.shape == other[k].shape and torch.equal(t, other[k]), (
            f"{said(c.method, 'bank')} gives another {k!r} where the sites come in another order: it belongs to all "
            "sites alike, so it may depend on their number and shapes alone"
        )


def _drawn_alike(method: Any, name: str, make: Callable[[], Leaf]) -> None:
    """AssertionError unless two calls give the same values in different memory, and leave global generators alone."""
    what, before = said(method, name), random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = make()
        touched = not torch.equal(state, torch.get_rng_state())
        torch.manual_seed(2)
        again = make()
    drawn = random.getstate() != before
    random.setstate(before)
    assert not touched and not drawn, (
        f"{what} draws from the global generator of {'torch' if touched else 'random'}, so that one seed gives many "
        "values: draw from rng alone"
    )
    assert first.keys() == again.keys(), f"{what} gives {sorted(first)}, then {sorted(again)}"
    for k, t in first.items():
        assert t.shape == again[k].shape and torch.equal(t, again[k]), (
            f"{what} gives other values of {k!r} when it is called again: it must draw from rng alone"
        )
        assert memory(t) is None or memory(t) != memory(again[k]), (
            f"{what} returns the same memory for {k!r} when it is called again: it keeps a tensor of another call. "
            "Return a new one"
        )


def writes_nothing(c: Case) -> None:
    """No function writes into w, p, b or x."""
    for at in places(c):
        p = at.prepared()
        tensors = {**at.given, **{f"p[{k!r}]": t for k, t in at.raw.items()}}
        tensors |= {f"p[{k!r}]": t for k, t in p.items()}
        calls: list[tuple[str, Function]] = [("prepare", partial(_prepared, at)), *at.uses()]
        calls += [("low_rank", at.method.low_rank)] if isinstance(at.method, Weight) else []
        for name, function in calls:
            before = {k: (t._version, t.clone()) for k, t in tensors.items()}
            try:
                function(p)
            finally:
                for k, (version, value) in before.items():
                    assert tensors[k]._version == version and torch.equal(tensors[k], value), (
                        f"{said(at.method, name)} writes into {k}, which is not its own: return new tensors"
                    )


def _prepared(at: At, p: Leaf) -> Leaf:
    return at.prepared()


def new_names(c: Case) -> None:
    """`prepare` gives what it changes another name."""
    for at in places(c):
        p = at.prepared()
        kept = [k for k in p.keys() & at.entry.spec.keys() if not _same(p[k], at.raw[k])]
        assert not kept or p.keys() & at.entry.spec.keys() != at.entry.spec.keys(), (
            f"{said(at.method, 'prepare')} changes {', '.join(kept)} and keeps the name, so that a prepared adapter "
            "cannot be told from a raw one and would be prepared twice: give it another name"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def own_dtypes(c: Case) -> None:
    """prepare, delta and bias compute in fp32 or better; linear and product in the dtype of x, or autocast's."""
    for dtype in (torch.float32, torch.bfloat16):
        for at in places(replace(c, dtype=dtype)):
            p = at.prepared()
            for k, t in p.items():
                assert not t.is_floating_point() or t.dtype == torch.float32, (
                    f"{said(at.method, 'prepare')} gives {k!r} in {t.dtype} for a {dtype} weight and {_of(at.raw)} "
                    "tensors: it must compute in fp32 or better"
                )
            for name, function in at.uses():
                fast = name not in ("delta", "bias")
                y = function({k: t.to(dtype) if t.is_floating_point() else t for k, t in p.items()} if fast else p)
                want = dtype if fast else torch.float32
                assert y.dtype == want, (
                    f"{said(at.method, name)} gives {y.dtype} where its tensors and x are {want}: return that dtype"
                )
            if dtype == torch.float32 and isinstance(at.method, Weight):
                _under_autocast(at, p)


def _under_autocast(at: AtWeight, p: Leaf) -> None:
    features = at.features(at.method, torch.float32)
    if features is not None:
        half = {k: t.bfloat16() if t.is_floating_point() else t for k, t in p.items()}
        with torch.autocast("cpu", torch.bfloat16):
            y, plain = features[1](half), F.linear(torch.zeros(1, at.w.shape[1]), at.w)
        assert y.dtype == plain.dtype, (
            f"{said(at.method, features[0])} gives {y.dtype} under autocast to {plain.dtype}: return what F.linear does"
        )


def _of(p: Leaf) -> str:
    return str(next((t.dtype for t in p.values() if t.is_floating_point()), torch.float32))


def repeats(c: Case) -> None:
    """In eval mode a function gives the same for the same arguments, and another change for another adapter."""
    for at, other in zip(places(c), places(c, 1), strict=True):
        method = at.method.eval()
        p, q = replace_method(at, method).prepared(), replace_method(other, method).prepared()
        for name, function in at.uses(method):
            first, again = _seeded(1, function, p), _seeded(2, function, p)
            assert torch.equal(first, again), (
                f"{said(method, name)} gives another result for the same arguments in eval mode: it draws random "
                "numbers. Only dropout may, in train mode; `in_eval` says which fields switch it off"
            )
            if name == "delta":
                assert memory(first) != memory(again) or memory(first) in {memory(t) for t in p.values()}, (
                    f"{said(method, name)} returns the memory of an earlier call: compute it anew"
                )
                assert not first.any() or not torch.equal(first, function(q)), (
                    f"{said(method, name)} gives the same change for other tensors: it depends on none of them, or "
                    "keeps a result of an earlier call"
                )


def _seeded(seed: int, function: Function, p: Leaf) -> Tensor:
    """What a function gives where dropout draws from this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        y: Tensor = function(p)
    return y


def replace_method(at: At, method: Any) -> Any:
    return replace(at, method=method)


def carries_gradients(c: Case) -> None:
    """Every trainable tensor reaches the output, and its gradient comes back."""
    for at in places(c):
        bank = c.net.plan.banks.get(at.entry.bank or "", {})
        trained = [k for k in at.raw if k in at.entry.spec or k in bank]
        raw = {k: t.requires_grad_() if k in trained else t for k, t in at.raw.items()}
        used: set[str] = set()
        for name, function in at.uses():
            y = _seeded(1, function, at.prepared(raw))
            got = (
                torch.autograd.grad(y.sum() + (y * y).sum(), [raw[k] for k in trained], allow_unused=True)
                if y.requires_grad and trained
                else [None] * len(trained)
            )
            for k, g in zip(trained, got, strict=True):
                moved = not torch.equal(y, _seeded(1, function, at.prepared(raw | {k: raw[k].detach() + 0.5})))
                assert g is not None or not moved, (
                    f"{said(at.method, name)} (or prepare) depends on {k!r} and gives no gradient for it: it was "
                    "detached, or read by .data. Use it as it is"
                )
                used |= {k} if g is not None else set()
        assert not at.entry.spec.keys() - used, (
            f"{said(at.method, 'init')} gives {', '.join(sorted(at.entry.spec.keys() - used))}, on which no result of "
            f"{', '.join(name for name, _ in at.uses())} depends: it would be stored and never trained"
        )


def maps(c: Case) -> None:
    """Under vmap over adapters a function gives what it gives for each, also where calls have a faster way."""
    for at, other in zip(places(c), places(c, 1), strict=True):
        method = at.method.eval()
        p, q = replace_method(at, method).prepared(), replace_method(other, method).prepared()
        axes = {k: None if _same(p[k], q[k]) else 0 for k in p}
        stack = {k: p[k] if axis is None else torch.stack([p[k], q[k]]) for k, axis in axes.items()}
        for name, function in at.uses(method):
            if any(axis == 0 for axis in axes.values()):
                got, want = vmap(function, (axes,))(stack), torch.stack([function(p), function(q)])
                close(got, want, f"{said(method, name)} under vmap")


def low_rank_is_linear(c: Case) -> None:
    """`low_rank` means what delta and linear do, dropout too: kernels and mixed batches run it in their place."""
    if not isinstance(c.method, Weight):
        return
    for at in places(c):
        low = at.method.eval().low_rank(at.prepared()) if at.w.dim() == 2 else None
        if low is not None and at.method.mergeable:
            dense = at.w + low.scale * (low.up @ low.down)
            dense = dense if low.gain is None else low.gain[:, None] * dense
            want = at.w + at.method.eval().delta(at.prepared(), at.w)
            error, size = (dense - want).abs().max().item(), max(want.abs().max().item(), 1.0)
            assert error <= 1e-4 * size, (
                f"{said(at.method, 'low_rank')} differs from delta by {error:.3g} where values reach {size:.3g}: "
                "diag(rows) (w + scale·up down) is not w + delta (is the scale in it?)"
            )
        if "linear" in at.method.kinds and at.w.dim() == 2 and not at.entry.site.stacked:
            _drops(at)


def minds_rows_and_tokens(c: Case) -> None:
    """What a method around a module makes of a row depends on that row alone, and of a token on no later one; and the
    place stays as it is."""
    for at in places(c) if isinstance(c.method, Along | Tokens | Prefix) else ():
        count, trained = at.prepared(), replace_method(at, at.method.eval()).prepared()
        assert {k: t.shape for k, t in count.items()} == {k: t.shape for k, t in trained.items()}, (
            f"{said(at.method, 'prepare')} gives other numbers of virtual tokens in eval mode: a cache and a batch "
            "have one"
        )
    if not isinstance(c.method, ModuleMethod):
        return
    for at in places(c):
        method = at.method.eval()
        p, before = replace_method(at, method).prepared(), dict(vars(at.w))
        for name, f, xs in at.points(method):
            y = f(p, *xs)
            alone = torch.cat([f(p, *(x[i : i + 1] for x in xs)) for i in range(len(y))])
            close(alone, y, f"{said(method, name)} mixes the rows of a batch: of each row alone")
            first = f(p, *(x[:, :-1] for x in xs))
            if method.causal:
                what = f"{said(method, name)} reads later tokens (where that is meant, say causal = False)"
                close(first, y[:, :-1], f"{what}: without the last token")
        for name, f in at.uses(method):
            f(p)
            kept = sorted(k for k, v in vars(at.w).items() if before.get(k) is not v)
            assert not kept, f"{said(method, name)} keeps {', '.join(kept)} on the place m, which other calls share"


def _drops(at: AtWeight) -> None:
    """The same dropout in `low_rank` as in `linear`."""
    method = _dropping(at.method)
    low = method.low_rank(replace_method(at, method).prepared())
    features = at.features(method, at.w.dtype)
    if low is None or features is None:
        return
    name, run = features
    with torch.random.fork_rng():
        torch.manual_seed(1)
        p = replace_method(at, method).prepared()
        drops = not torch.equal(run(p), run(p))
    assert drops == bool(low.dropout), (
        f"{said(method, 'low_rank' if drops else name)} has other dropout than {name if drops else 'low_rank'}: with "
        f"{method} in train mode, {name} drops {'features' if drops else 'none'}, and low_rank gives "
        f"dropout={low.dropout}. Give LowRank(…, dropout=self.dropout), and use self.dropped(x) in {name}"
    )


def _dropping(method: Any) -> Any:
    """The method with dropout, if it has that field and takes it."""
    return _with(method, "dropout", 0.5) or method


def _with(method: Any, field: str, value: Any) -> Any:
    """The method with another value of a field; None where it has no such field, or refuses the value."""
    if all(f.name != field for f in fields(method)):  # type: ignore[arg-type]
        return None
    try:
        return replace(method, **{field: value})
    except ValueError:
        return None


def _variants(method: Any) -> list[Any]:
    """The method with dropout, and with each of its switches turned."""
    switches = [f.name for f in fields(method) if isinstance(getattr(method, f.name), bool)]  # type: ignore[arg-type]
    turned = [_with(method, name, not getattr(method, name)) for name in switches]
    return [m for m in (_with(method, "dropout", 0.5), *turned) if m is not None]


def every_field(c: Case) -> None:
    """Every field is read by one of the method's functions, in one of the class's `cases` at least."""
    cls, m = type(c.method), c.method
    own = {f.name for f in fields(m)} - cls.outside  # type: ignore[arg-type]
    read: set[str] = set()

    def get(self: Any, name: str) -> Any:
        if name in own:
            frame = sys._getframe(1)
            aside = frame.f_code.co_name in ("__post_init__", "__eq__", "__hash__", "__str__", "__repr__", "eval")
            if not aside and frame.f_globals.get("__name__") not in ("dataclasses", fields_.__name__, __name__):
                read.add(name)
        return object.__getattribute__(self, name)

    spy = type(f"_{cls.__name__}", (cls,), {"__getattribute__": get})
    given = {f.name: getattr(m, f.name) for f in fields(m)}  # type: ignore[arg-type]
    bases = [spy(**case) for case in (given, *cls.cases)]
    for method in [*bases, *(v for base in bases for v in _variants(base))]:
        case = replace(c, method=method)
        try:
            case.net  # noqa: B018
        except ValueError:
            if method is bases[0]:
                raise
            continue  # a size does not fit with a switch turned, or the case is for another model
        case.net.apply(case.net.init(), case.x)
        case.model.train()
        case.net.apply(case.net.init(), case.x)
        for at in places(case):
            if isinstance(method, Weight):
                method.low_rank(at.prepared())
                method.acts_on(torch.arange(3)[None])
            for _, function in at.uses():
                function(at.prepared())
    assert not own - read, (
        f"{cls.__name__} has the field {', '.join(sorted(own - read))}, which none of init, frozen, shared, bank, "
        "prepare and the family's own functions (delta, linear, product, bias, low_rank, acts_on; before, after, "
        "leave) reads: it changes nothing. Use it, or take it out"
    )
