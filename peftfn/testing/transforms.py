"""Laws of gradient modes, of torch.func's transforms, and of the compiler: each of one `Case`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, grad_and_value, jacfwd, jacrev, jvp, vjp, vmap

import peftfn as pf
from peftfn.testing.case import Case, close, dot, leaves, runs_in, shaken
from peftfn.testing.models import twice
from peftfn.testing.party import Party
from peftfn.testing.routes import ROUTES

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


def _keeps_dtypes(c: Case) -> None:
    """In fp32: a Python number times a tensor of no dimensions has fp64 tangents in torch, where it has a gradient."""
    if not runs_in(c, torch.float32):
        return
    c = replace(c, dtype=torch.float32)
    a = c.adapter()
    try:
        products = jvp(grad(c.loss), (a,), (a,))[1]
    except RuntimeError as e:  # torch's own conv1d in fp32, with a tangent of its bias alone
        assert "forward gradient that has a different size" in str(e) and c.model_name == "conv1d", e
        return
    for n, leaf in products.items():
        for k, t in leaf.items():
            assert t.dtype == a[n][k].dtype, f"a product with the Hessian is {t.dtype} at {n}/{k}, of {a[n][k].dtype}"


def gradients(c: Case) -> None:
    """backward == grad == a central difference; jvp and vjp are adjoint, jacrev is jacfwd; the
    Hessian is symmetric. In fp64.

    And training can start: at a fresh adapter the gradient is finite, and not zero. Derivatives have the adapter's
    dtype, also those of gradients.
    """
    _keeps_dtypes(c)
    c = replace(c, dtype=torch.float64)
    if not runs_in(c, torch.float64):
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
