"""What holds for every method at every kind of site: one function a law, each of one `Case`."""

import json
import pickle
import tempfile
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import grad, grad_and_value, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F

import peftfn as pf
from peftfn.core.method import Weight
from peftfn.formats.indices import expected, wrong_indices
from peftfn.formats.native import from_json, to_json
from peftfn.tensors.precision import wide
from peftfn.testing.case import Case, close, dot, leaves, shaken
from peftfn.testing.contract import every_field, functions, keeps
from peftfn.testing.meaning import meaning_of
from peftfn.testing.models import twice
from peftfn.testing.party import Party
from peftfn.testing.routes import ROUTES


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
        for refused in (c.net.merge, c.net.delta):
            _refused(refused, a, naming=c.site)
        return
    if not c.merges:
        return
    if c.net.plan[c.site].adds_bias and "layer.bias" not in dict(c.model.named_parameters()):
        _refused(c.net.merge, a, naming=c.site)
        return
    merged = c.net.merge(a)
    base = dict(c.model.named_parameters(remove_duplicate=False))
    assert merged.keys() == base.keys()
    assert all(merged[n].shape == p.shape and merged[n].dtype == p.dtype for n, p in base.items())
    if not c.method.overrides("bias"):
        w = c.model.get_parameter(c.site).detach()
        close(c.net.delta(a)[c.site], wide(merged[c.site]) - wide(w), "delta")


def _refused(f: Callable[..., Any], *args: Any, naming: str) -> None:
    """AssertionError unless f(*args) is a ValueError that names the site."""
    try:
        f(*args)
    except ValueError as e:
        assert f"{naming}: " in str(e), f"the error names no site: {e}"
        return
    raise AssertionError(f"no ValueError from {getattr(f, '__name__', f)}, which has no meaning here")


def purity(c: Case) -> None:
    """After any call, also one that raises, the base is what it was: its tensors bit for bit, and each module's
    children, hooks, mode and attributes. And calls repeat, whatever the forward writes.
    """
    a = c.adapter()
    kept = {n: {k: t.clone() for k, t in leaf.items()} for n, leaf in a.items()}
    before = held(c.model)
    first = c.net.apply(a, c.x)
    c.loss({n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in c.adapter().items()}).backward()  # type: ignore[no-untyped-call]
    try:
        c.net.apply(a, object())
    except (TypeError, AttributeError, ValueError):
        pass
    else:
        raise AssertionError("an object() went through the model")
    assert torch.equal(c.net.apply(a, c.x), first), "the same call gave another result"
    unchanged(held(c.model), before)
    close(a, kept, "the adapter's own tensors, after a call", 0)
    _writing_forward(c)


class _Writing(nn.Module):
    """A model whose forward does what forwards do when they are first called: it installs a hook, which adds 1, says
    so, counts, and keeps what it has made."""

    def __init__(self, inner: nn.Module, writes: bool):
        super().__init__()
        self.inner, self.writes, self.ready, self.seen = inner, writes, False, [0]

    def forward(self, x: Tensor) -> Tensor:
        if self.writes and not self.ready:
            self.inner.register_forward_hook(lambda module, inputs, y: y + 1)
            self.register_buffer("made", torch.zeros(()))
            self.ready = True
        self.seen.append(1)
        out: Tensor = self.inner(x) + len(self.seen)
        return out


def _writing_forward(c: Case) -> None:
    model = _Writing(c.model, True).eval()
    plain = pf.adapt(_Writing(c.model, False).eval(), {c.site: c.method}, seed=c.seed)
    a = shaken(plain.init(c.seed, dtype=torch.promote_types(c.dtype, torch.float32)), c.seed)
    net, before = pf.adapt(model, {c.site: c.method}, seed=c.seed), held(model)
    for _ in range(3):
        close(net.apply(a, c.x), plain.apply(a, c.x) + 1, "a model whose forward installs a hook")
    unchanged(held(model), before)


def held(model: nn.Module) -> dict[str, Any]:
    """All that a call must leave alone, by place: of each module the tensors, children, hooks, mode and attributes,
    each by identity and by value.
    """
    out: dict[str, Any] = {}

    def look(v: Any, where: str, above: tuple[int, ...]) -> None:
        if isinstance(v, Tensor):
            out[where] = (id(v), v._version, v.detach().clone(), v.grad is None)
            return
        out[where] = (id(v),) if not isinstance(v, bool | int | float | str) else (v,)
        if id(v) in above or isinstance(v, nn.Module | type):
            return
        inside = v if isinstance(v, dict) else vars(v) if hasattr(v, "__dict__") and not callable(v) else {}
        inside = dict(enumerate(v)) if isinstance(v, list | tuple | set) else inside
        for k, part in inside.items():
            look(part, f"{where}/{k}", (*above, id(v)))

    for name, module in model.named_modules(remove_duplicate=False):
        look(dict(vars(module)), name, ())
        out[name] = (id(module),)
    return out


def unchanged(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Both as `held` tells them; AssertionError with what came, went or changed."""
    odd = sorted(now.keys() ^ before.keys())
    assert not odd, f"the call left this in the base, or took it away: {', '.join(odd[:5])}"
    for where, was in before.items():
        is_ = now[where]
        same = all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
            for a, b in zip(is_, was, strict=True)
        )
        assert same, f"{where} changed"


def no_rows(c: Case) -> None:
    """A batch of no rows goes through, as it does through the base."""
    try:
        want = c.model(c.x[:0])
    except RuntimeError:  # which some of transformers' cannot
        return
    close(c.net.apply(c.adapter(), c.x[:0]), want, "apply without rows", 0)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def modes(c: Case) -> None:
    """Under no_grad and inference_mode every route gives what it gives with gradients on; and a layer that was used in
    such a mode, or under autocast, keeps its gradient when it is used again in the same call."""
    ways = {name: route for name, route in ROUTES.items() if route.where(c) and name != "a file"}  # which is apply

    def slopes(party: Party) -> dict[str, tuple[Tensor | None, ...]]:
        outputs = {name: way.run(party, way.gates(party)) for name, way in ways.items() if way.differentiable}
        return {
            name: torch.autograd.grad(y.square().mean(), party.trained, allow_unused=True)
            for name, y in outputs.items()
        }

    party = Party.of(c)
    for name, way in ways.items():
        gates = way.gates(party)
        output = way.run(party, gates).detach()
        for mode in ("no_grad", "inference_mode"):
            with MODES[mode]():
                close(way.run(party, gates), output, f"{name} under {mode}")
    wanted = slopes(Party.of(c, pf.adapt(twice(c.model, nullcontext), {c.rule: c.method}, seed=c.seed)))
    for mode, first in MODES.items():
        net = pf.adapt(twice(c.model, first), {c.rule: c.method}, seed=c.seed)
        for name, slope in slopes(Party.of(c, net)).items():
            for got, want in zip(slope, wanted[name], strict=True):
                if want is None:  # of an adapter that the route does not use
                    continue
                assert got is not None, f"{name}: the gradient is lost where the layer is used under {mode} first"
                close(got, want, f"gradient of {name}, the layer used under {mode} first", 1e-3)


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


def gradients(c: Case) -> None:
    """backward == grad == a central difference; jvp and vjp are adjoint, jacrev is jacfwd; the
    Hessian is symmetric. In fp64.

    And training can start: at a fresh adapter the gradient is finite, and not zero.
    """
    c = replace(c, dtype=torch.float64)
    if not _runs_in(c, torch.float64):
        return
    step, rough, tight = (1e-5, 1e-4, 1e-6) if c.kind.wide else (2e-3, 2e-2, 1e-3)
    a = c.adapter()
    u, v = shaken({n: {k: 0 * t for k, t in leaf.items()} for n, leaf in a.items()}, 1), c.adapter(5)
    g = grad(c.loss)(a)
    tracked = {n: {k: t.clone().requires_grad_() for k, t in leaf.items()} for n, leaf in a.items()}
    c.loss(tracked).backward()  # type: ignore[no-untyped-call]
    lost = [f"{n}/{k}" for n, leaf in tracked.items() for k, t in leaf.items() if t.grad is None]
    assert not lost, f"no gradient for {', '.join(lost)}: the output does not depend on it, or it was detached"
    close({n: {k: t.grad for k, t in leaf.items()} for n, leaf in tracked.items()}, g, "backward", tight)
    if c.method.exact_gradient:
        ahead, behind = ({n: {k: a[n][k] + s * u[n][k] for k in a[n]} for n in a} for s in (step, -step))
        close(
            dot(g, u), ((c.loss(ahead) - c.loss(behind)) / (2 * step)).detach(), "gradient against a difference", rough
        )

    def output(a: Any) -> Tensor:
        y: Tensor = c.net.apply(a, c.x)
        return y

    def few_of(y: Tensor) -> Tensor:  # every row has a part
        return y.flatten(1)[:, :: max(1, y[0].numel() // 3)].flatten()

    def few(a: Any) -> Tensor:
        return few_of(output(a))

    y, tangent = jvp(output, (a,), (u,))[:2]
    pull = vjp(output, a)[1]
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    close(dot(pull(cotangent)[0], u), (cotangent * tangent).sum(), "jvp against vjp", tight)
    reverse, forward = jacrev(few)(a), jacfwd(few)(a)
    close(reverse, forward, "jacrev against jacfwd", tight)
    along = [(reverse[n][k] * u[n][k]).flatten(1).sum(1) for n in u for k in u[n]]
    close(torch.stack(along).sum(0), few_of(tangent), "jacrev against jvp", tight)
    hu = jvp(grad(c.loss), (a,), (u,))[1]
    if c.method.exact_gradient:
        close(dot(hu, v), dot(jvp(grad(c.loss), (a,), (v,))[1], u), "Hessian", tight)
    if c.method.exact_gradient:  # Hessian-vector products by double backward are those by forward over reverse
        names = [(n, k) for n in a for k in a[n]]
        inputs = [tracked[n][k] for n, k in names]
        first = torch.autograd.grad(c.loss(tracked), inputs, create_graph=True)
        second = torch.autograd.grad(
            sum(((t * u[n][k]).sum() for t, (n, k) in zip(first, names, strict=True)), torch.zeros(())), inputs
        )
        for t, (n, k) in zip(second, names, strict=True):
            close(t, hu[n][k], f"double backward, {k}", tight)
    fresh, where = grad(c.loss)(c.net.init(c.seed)), f"{type(c.method).__name__}.init"
    wild = [f"{n}/{k}" for n, leaf in fresh.items() for k, t in leaf.items() if not t.isfinite().all()]
    assert not wild, f"the gradient of {', '.join(wild)} is not finite at a fresh adapter of {where}"
    assert any(t.any() for t in leaves(fresh)), f"the gradient is zero at a fresh adapter of {where}: it never trains"


def per_sample(c: Case) -> None:
    """vmap(grad) over adapters == one grad each; vmap(grad) over rows, and grad of a mixed batch == one grad a row."""
    adapters = [c.adapter(i) for i in range(2)]
    want = pf.stack([grad(c.loss)(a) for a in adapters])
    close(vmap(grad(c.loss))(pf.stack(adapters)), want, "vmap(grad) over adapters", 1e-3)
    rows = pf.stack([grad(c.loss)(adapters[0], x) for x in c.x.split(1)])
    close(vmap(grad(c.loss), (None, 0))(adapters[0], c.x.unsqueeze(1)), rows, "per-sample gradients", 1e-3)
    if c.kind.rowed:
        of = c.model(c.x[:1])
        weights = torch.linspace(-1, 1, of.numel(), dtype=of.dtype).view_as(of)

        def loss(stacked: Any) -> Tensor:
            y = c.net.mixed(stacked, list(range(c.rows)), c.x)
            return (y * weights).sum() + y.square().mean() * c.rows

        got = grad(loss)(pf.stack([adapters[0]] * c.rows))
        close(got, rows, "gradient of a mixed batch", 1e-3)


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


def round_trip(c: Case) -> None:
    """save and load give the same bits and the same outputs."""
    a = c.adapter()
    with tempfile.TemporaryDirectory() as folder:
        pf.save(folder, c.net, a)
        net, b = pf.load(folder, c.model)
        assert [f.name for f in sorted(Path(folder).iterdir())] == ["adapter.safetensors", "peftfn.json"]
    close(b, a, "loaded adapter", 0)
    assert torch.equal(net.apply(b, c.x), c.net.apply(a, c.x)), "the loaded adapter gives another output"
    assert net.plan.rules == c.net.plan.rules


def indices(c: Case) -> None:
    """A method says what its integer constants may have, and a file with anything else is refused."""
    found = {n: [k for k, t in e.frozen.items() if not t.is_floating_point()] for n, e in c.net.plan.items()}
    if not any(found.values()):
        return
    for name, names in found.items():
        assert expected(c.net.plan, name).keys() == set(names), "indices(p, w) has an entry for each integer constant"
    assert not list(wrong_indices(c.net.plan)), "its own constants are not what its indices(p, w) allows"
    with tempfile.TemporaryDirectory() as folder:
        pf.save(folder, c.net, c.adapter())
        file = Path(folder) / "adapter.safetensors"
        with safe_open(file, framework="pt") as good:
            tensors, metadata = {k: good.get_tensor(k) for k in good.keys()}, good.metadata()  # noqa: SIM118 - no mapping
        for key, t in tensors.items():
            for wrong in _wrong(t) if key.startswith("frozen/") and not t.is_floating_point() else ():
                save_file({**tensors, key: wrong}, file, metadata)
                _refused(pf.load, folder, c.model, naming=str(file))


def _wrong(t: Tensor) -> list[Tensor]:
    """An index below what any table has, one beyond, and another dtype."""
    low, high = t.clone(), t.clone()
    low.view(-1)[0], high.view(-1)[-1] = -9, 10**9
    return [low, high, t.int(), t.bool()]


def values(c: Case) -> None:
    """A method compares, hashes, prints, pickles and serialises by its fields."""
    m = c.method
    if any("ClassVar" not in str(t) for t in vars(type(m)).get("__annotations__", {}).values()):
        assert "__dataclass_fields__" in vars(type(m)), "it declares fields, and lacks @dataclass(frozen=True)"
    assert replace(m) == m and hash(replace(m)) == hash(m)  # type: ignore[type-var]
    assert repr(m).startswith(f"{type(m).__name__}(")
    assert pickle.loads(pickle.dumps(m)) == m
    assert from_json(json.loads(json.dumps(to_json(m))), Path()) == m
    family = type(m).family
    assert {f.name for f in fields(m)}.isdisjoint(vars(family)), f"a field hides one of {family.__name__}'s functions"  # type: ignore[arg-type]


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
        _refused(c.net.apply, pf.scale(c.adapter(), 0.5), c.x, naming=c.site)
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
        if not _runs_in(low, dtype):
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


def compiled(c: Case) -> None:
    """torch.compile(fullgraph=True) of apply and of the transforms, all in one graph, gives what eager gives."""
    adapters, along = [c.adapter(0), c.adapter(1)], c.adapter(5)

    def everything(a: Any, stack: Any, u: Any, x: Tensor) -> Any:
        def valued(a: Any) -> Any:
            return grad_and_value(lambda a: c.loss(a, x))(a)  # type: ignore[misc]

        slopes, values = vmap(valued)(stack)
        (slope, value), (hvp, change) = jvp(valued, (a,), (u,))  # type: ignore[misc]
        return {
            **{"apply": c.net.apply(a, x), "vmap": values, "vmap(grad)": slopes},
            **{"grad": slope, "value": value, "jvp": change, "hvp": hvp},
        }

    given = adapters[0], pf.stack(adapters), along, c.x
    want = everything(*given)
    torch._dynamo.reset()
    got = torch.compile(everything, fullgraph=True, backend="aot_eager")(*given)
    close(got, want, "compiled", 1e-3)


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


def _runs_in(c: Case, dtype: torch.dtype) -> bool:
    """Whether this torch runs the base layer itself in this dtype."""
    try:
        c.model(c.x)
    except RuntimeError as e:
        assert "not implemented for" in str(e), e
        return False
    return True


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
