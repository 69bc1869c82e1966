"""Laws of a method's functions taken one by one, so that what is wrong is named: each is of one `Case`.

The laws of laws.py compare what nets do. A method that breaks one of them breaks it somewhere in a model; those here
come first and call `init`, `delta`, `linear`, … themselves, as the core does.
"""

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F

from peftfn.core.made import memory
from peftfn.core.method import Leaf, Weight
from peftfn.core.modules import Along, ModuleMethod, Prefix, Tokens
from peftfn.core.rng import Rng
from peftfn.model.model import weights_of
from peftfn.testing.at import At, AtWeight, Function, places, replace_method, said
from peftfn.testing.case import Case, close
from peftfn.testing.declared import with_field


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
    return with_field(method, "dropout", 0.5) or method
