"""What holds for every method at every kind of site: one function a law, each of one `Case`, and the table of all.

The laws of purity, of transforms, of what is stored and of single functions are in files of their own.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional as F

import peftfn as pf
from peftfn.core.method import Weight
from peftfn.tensors.precision import wide
from peftfn.testing.case import Case, close, leaves, refused, runs_in
from peftfn.testing.contract import functions
from peftfn.testing.declared import every_field, keeps
from peftfn.testing.meaning import meaning_of
from peftfn.testing.party import Party
from peftfn.testing.purity import purity
from peftfn.testing.routes import ROUTES
from peftfn.testing.stored import indices, round_trip, values
from peftfn.testing.transforms import compiled, gradients, modes, per_sample


def identity(c: Case) -> None:
    """A fresh adapter leaves the output unchanged."""
    if c.method.identity:
        what = f"{type(c.method).__name__}.init gives a start that changes the model: apply(init)"
        close(c.net.apply(c.net.init(c.seed), c.x), c.model(c.x), what, 1e-5)
    else:
        assert not torch.allclose(c.net.apply(c.net.init(c.seed), c.x), c.model(c.x)), (
            "claims a random start, is the identity"
        )


def effect(c: Case) -> None:
    """Random leaves change the output, so that the other laws compare something."""
    assert not torch.allclose(c.net.apply(c.adapter(), c.x), c.model(c.x), atol=1e-4), "random leaves change nothing"


def meaning_is_speed(c: Case) -> None:
    """linear and product equal the dense weight w + delta, in eval mode."""
    entry: Any = c.net.plan[c.site]
    if not c.merges or entry.site.stacked or c.kind.kind == "other":
        return
    a, m = c.adapter(), entry.site.canonical(c.model.get_parameter(c.site).detach())
    method, p = entry.tensors(a[c.site], a.get(entry.bank or "", {}), m)
    method = method.eval()
    dense, name = m + method.delta(p, m), type(method).__name__
    x = torch.randn(c.rows, 3, m.shape[1], generator=torch.Generator().manual_seed(c.seed))
    if "linear" in c.method.kinds:
        fast = "linear" if method.overrides("linear") else "product"
        for y in (x, x[0], x[:, :, None]):
            what = f"{name}.{fast} of x {list(y.shape)} against w + {name}.delta: linear"
            close(method.linear(p, m, y), F.linear(y, dense), what)
    if method.overrides("product"):
        ids = torch.arange(m.shape[1])
        got = method.product(p, m, ids, lambda i, m: F.embedding(i, m.mT))
        close(got, dense.mT, f"{name}.product against w + {name}.delta: product")


def routes(c: Case, among: Collection[str] = tuple(ROUTES)) -> None:
    """Every way from an adapter to an output gives what the method means, in value and gradient: the dense weight
    w + delta and the bias of `bias`, or `before`, `after` and `leave` around the module. Of `ROUTES`, each that the
    case has.
    """
    party = Party.of(c)
    base, trained = c.model(party.x), party.trained
    wanted = meaning_of(party, base)
    weights = torch.linspace(-1, 1, base.numel()).view_as(base)

    def slope(y: Tensor, of: list[Tensor]) -> list[Tensor]:
        got = torch.autograd.grad((y * y * weights).sum(), of, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(t) if g is None else g for g, t in zip(got, of, strict=True)]

    known: dict[Any, tuple[Tensor, list[Tensor]]] = {}  # routes of the same gates want the same
    for name, route in ROUTES.items():
        if name not in among or not route.where(c):
            continue
        gates = route.gates(party)
        of = [*trained, gates] if gates.requires_grad else trained
        key = gates.shape, *gates.flatten().tolist()
        if key not in known:
            want = wanted(gates)
            known[key] = want.detach(), slope(want, of)
        want, slopes = known[key]
        got = route.run(party, gates)
        close(got.detach(), want, name)
        if route.differentiable:
            for g, w, t in zip(slope(got, of), slopes, of, strict=True):
                close(g, w, f"gradient of {name} in {'the gates' if t is gates else list(t.shape)}", 1e-3)


def merging(c: Case) -> None:
    """merge keeps names, shapes and dtypes, and refuses a bias for a layer without one; delta is what it changes. Of a
    method that changes no weight, both are refused, with the site's name."""
    a = c.adapter()
    if not isinstance(c.method, Weight):
        for function in (c.net.merge, c.net.delta):
            refused(function, a, naming=c.site)
        return
    if not c.merges:
        return
    if c.net.plan[c.site].adds_bias and "layer.bias" not in dict(c.model.named_parameters()):
        refused(c.net.merge, a, naming=c.site)
        return
    merged = c.net.merge(a)
    base = dict(c.model.named_parameters(remove_duplicate=False))
    assert merged.keys() == base.keys()
    assert all(merged[n].shape == p.shape and merged[n].dtype == p.dtype for n, p in base.items())
    if not c.method.overrides("bias"):
        w = c.model.get_parameter(c.site).detach()
        close(c.net.delta(a)[c.site], wide(merged[c.site]) - wide(w), "delta")


def no_rows(c: Case) -> None:
    """A batch of no rows goes through, as it does through the base."""
    try:
        want = c.model(c.x[:0])
    except RuntimeError:  # which some of transformers' cannot
        return
    close(c.net.apply(c.adapter(), c.x[:0]), want, "apply without rows", 0)


def conformed(c: Case) -> None:
    """An adapter fitted to a wider plan does there what it does in its own."""
    a, padding = c.adapter(), c.method.padding
    by = "" if padding is None else f", by {type(c.method).__name__}.padding = {padding}"
    method = c.method
    if padding is not None:
        wider: dict[str, Any] = {"rank": method.rank + 2, "alpha": 5.0, "init_weights": "default"}  # type: ignore[attr-defined]
        names = {f.name for f in fields(method)}  # type: ignore[arg-type]
        method = replace(method, **{k: v for k, v in wider.items() if k in names & padding.fields})
    more = {"bias": pf.Full()} if "layer.bias" in dict(c.model.named_parameters()) else {}
    to = pf.adapt(c.model, {c.rule: method, **more}, seed=c.seed)
    try:
        b = pf.conform(a, c.net, to)
    except ValueError as e:
        assert c.site in str(e) and c.net.plan[c.site].frozen, f"{c.method} has padding, and conform says {e}"
        return
    to.plan.check(b)
    if c.merges and not c.method.overrides("bias"):
        close(to.delta(b)[c.site], c.net.delta(a)[c.site], f"delta of the wider adapter{by}")
    close(to.apply(b, c.x), c.net.apply(a, c.x), f"apply with the wider adapter{by}")


def structure(c: Case) -> None:
    """Leaves are floating tensors of a shape that init on meta tells, and depend on the seed and the site alone, also
    inside a transform."""
    a, b = c.net.init(1), c.net.init(1)
    close(a, b, "init repeated, which draws from rng alone", 0)
    z = torch.zeros(2)
    made = grad(lambda z: (z.sum(), pf.adapt(c.model, {c.rule: c.method}, seed=c.seed).init(1)), has_aux=True)(z)[1]
    close(made, a, "adapt and init inside grad", 0)
    if leaves(a):
        close(pf.unstack(vmap(lambda z: c.net.init(1))(z))[1], a, "init inside vmap", 0)
    other = c.net.init(2)
    assert {n: {k: t.shape for k, t in leaf.items()} for n, leaf in a.items()} == {
        n: {k: t.shape for k, t in leaf.items()} for n, leaf in other.items()
    }
    empty = pf.adapt(c.kind.build(c.seed).to("meta"), {c.rule: c.method}).init()
    assert all(t.is_meta for t in leaves(empty))
    assert [t.shape for t in leaves(empty)] == [t.shape for t in leaves(a)], "other shapes on meta"
    names = [n for n, s in pf.sites(c.model).items() if s.kind == "other" and n != c.site]
    if names:
        wider = pf.adapt(c.model, {names[0]: pf.Full(), c.rule: c.method}, seed=c.seed)
        close(wider.init(1)[c.site], a[c.site], "init beside another site", 0)


@dataclass(frozen=True)
class Nothing(pf.ModuleMethod, abstract=True):
    """y: the identity around a module, for `chain`."""

    def init(self, rng: pf.Rng, m: pf.Place) -> dict[str, Tensor]:
        return {"zero": rng.zeros(1)}

    def after(self, p: Any, m: pf.Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return y + p["zero"]


def algebra(c: Case) -> None:
    """scale(a, 0) is the base, scale(a, 1) is a; add commutes; adding or chaining nothing changes nothing. Where a
    method has neither, an error names the site before any work."""
    if not c.method.combines:
        refused(c.net.apply, pf.scale(c.adapter(), 0.5), c.x, naming=c.site)
        return
    linear_in, scales_with = (getattr(c.method, k, ()) for k in ("linear_in", "scales_with"))
    named, has = {*linear_in, *scales_with}, c.net.prepare(c.net.init())[c.site].keys()
    assert not named or named & has, (
        f"linear_in or scales_with is {sorted(named)}; a prepared adapter has {sorted(has)}"
    )
    a, b = c.adapter(0), c.adapter(1)
    scaled = f" (scales_with is {', '.join(scales_with)})" if scales_with else ""
    close(c.net.apply(pf.scale(a, 0.0), c.x), c.model(c.x), f"scale(a, 0){scaled}", 1e-5)
    close(c.net.apply(pf.scale(a, 1.0), c.x), c.net.apply(a, c.x), f"scale(a, 1){scaled}")
    if c.merges:
        want = c.net.delta(a)[c.site]
        close(c.net.delta(pf.scale(a, 0.5))[c.site], 0.5 * want, f"delta(a/2) against delta(a)/2{scaled}")
    closed = f" (linear_in is {', '.join(linear_in)}: all else is taken for constant)" if linear_in else ""
    close(c.net.apply(pf.add(a, b), c.x), c.net.apply(pf.add(b, a), c.x), f"add commutes{closed}")
    close(c.net.apply(pf.add(a, pf.scale(b, 0.0)), c.x), c.net.apply(a, c.x), "a + 0·b")
    halves = pf.add(pf.scale(a, 0.5), pf.scale(a, 0.5))
    close(c.net.apply(halves, c.x), c.net.apply(a, c.x), f"a/2 + a/2{scaled}")
    if ROUTES["mixed"].where(c):
        more = pf.add(a, pf.scale(b, 0.5))
        close(c.net.mixed(pf.stack([more]), [0] * c.rows, c.x), c.net.apply(more, c.x), "mixed(a + b/2)")
    if c.merges:
        both = c.net.delta(pf.add(a, b))[c.site]
        close(both, c.net.delta(a)[c.site] + c.net.delta(b)[c.site], f"delta(a + b){closed}")
    if c.method.overrides("shared") or c.method.overrides("bank"):
        return
    if isinstance(c.method, Weight) and c.method.overrides("acts_on"):  # which is in no chain
        return
    if isinstance(c.method, Weight) and not c.merges:  # which only the last of a chain may be
        inside, chained = "1.", pf.chain(pf.Full(), c.method)
    else:
        inside = "" if isinstance(c.method, pf.Chain | pf.ModuleChain) else "0."
        chained = pf.chain(c.method, pf.Full() if c.merges else Nothing())
    then = pf.adapt(c.model, {c.site: chained}, seed=c.seed)
    leaf = {inside + k: t for k, t in a[c.site].items()}
    none = {k: torch.zeros(shape) for k, shape in then.plan[c.site].spec.items() if k not in leaf}
    close(then.apply({c.site: leaf | none}, c.x), c.net.apply(a, c.x), "chain(m, identity)")


def half_precision(c: Case) -> None:
    """fp32 leaves on a bf16 or fp16 base: outputs in the base's dtype, near fp32's, also where products are in fp32;
    merge rounds once."""
    for dtype, rtol in ((torch.bfloat16, 6e-2), (torch.float16, 1e-2)):
        low = replace(c, dtype=dtype)
        if not runs_in(low, dtype):
            continue
        model = c.kind.build(c.seed, dtype).float()
        a = low.adapter()
        y = low.net.apply(a, low.x)
        assert y.dtype == low.model(low.x).dtype, f"{y.dtype} from a {dtype} base"
        x = low.x.float() if low.x.is_floating_point() else low.x
        wide_net = pf.adapt(model, {c.rule: c.method}, seed=c.seed)
        close(y.float(), wide_net.apply(a, x), f"{dtype} apply", rtol)
        full = low.net.in_fp32()
        outputs = {"apply": full.apply(a, low.x)}
        if ROUTES["mixed"].where(low) and leaves(a):
            outputs["mixed"] = full.mixed(pf.stack([a]), [0] * low.rows, low.x)
        for way, got in outputs.items():
            assert got.dtype == y.dtype, f"in_fp32().{way}: {got.dtype} from a {dtype} base"
            close(got.float(), wide_net.apply(a, x), f"{dtype} in_fp32().{way}", rtol)
        if c.merges and not c.net.plan[c.site].adds_bias:
            close(
                low.net.merge(a)[c.site],
                wide_net.merge(a)[c.site].to(dtype),
                f"{dtype} merge",
                1e-2 if dtype == torch.bfloat16 else 2e-3,
            )


def bad_leaves(c: Case) -> None:
    """A leaf of the wrong name, shape or dtype is an error that names the site, before anything runs."""
    a = c.adapter()
    name, leaf = next((n, leaf) for n, leaf in a.items() if leaf)
    key, t = next(iter(leaf.items()))
    bad: list[tuple[type[Exception], Any]] = [
        (KeyError, {**a, "no.such.site": leaf}),
        (KeyError, {n: v for n, v in a.items() if n != name}),
        (KeyError, {**a, name: {k: v for k, v in leaf.items() if k != key}}),
        (ValueError, {**a, name: {**leaf, key: torch.zeros(*t.shape, 2)}}),
        (ValueError, {**a, name: {**leaf, key: torch.zeros(t.shape, dtype=torch.int64)}}),
    ]
    for error, adapter in bad:
        try:
            c.net.apply(adapter, c.x)
        except error as e:
            assert name in str(e) or "no.such.site" in str(e), f"the error names no site: {e}"
        else:
            raise AssertionError(f"no {error.__name__} for an adapter that does not fit")


LAWS: dict[str, Callable[[Case], None]] = {
    law.__name__: law
    for law in (
        values, functions, keeps, every_field, structure, meaning_is_speed, purity, identity, effect, routes, merging,
        no_rows, modes, conformed, gradients, per_sample, round_trip, indices, algebra, half_precision, bad_leaves,
        compiled,
    )
}  # fmt: skip
ONCE = frozenset({"compiled", "every_field", "keeps", "values"})
"""Laws that are checked at one kind of site: they are slow, or do not depend on it."""
CORE = frozenset({"structure", "purity", "no_rows", "modes", "round_trip", "indices", "bad_leaves"})
"""Laws about what is around a method, at two kinds of site: with one site and, if its sites share, with several."""
TRAINED = frozenset({"purity", "effect", "routes", "modes", "gradients", "per_sample", "compiled", "bad_leaves"})
"""Laws about trainable tensors: a method that has none (noise) obeys them beside one that has some, in a chain."""
FEW = frozenset({"functions", "identity", "effect", "merging", "conformed", "algebra", "half_precision", "per_sample"})
"""Laws that are checked where a function gets something else, and not where only a call reaches it differently."""
