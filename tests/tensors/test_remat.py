"""Rematerialised functions: values and derivatives of every order are those of the function, and the memory is less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from benchmarks.memory import peak
from peftfn.tensors.remat import remat

D, LAYERS = 6, 3


def block(x: Tensor, mask: Tensor, a: Tensor, b: Tensor, rate: float) -> dict[str, Any]:
    h = torch.tanh(x @ a.mT) @ b.mT * mask.to(x.dtype)
    return {"x": x + F.dropout(h, rate), "rows": mask.sum(), "cache": None, "name": "block"}


def loss(p: dict[str, Tensor], x: Tensor, mask: Tensor, rate: float, again: bool) -> Tensor:
    for i in range(LAYERS):
        run: Any = (lambda *ts: remat(lambda *ts: block(*ts, rate), *ts)) if again else lambda *ts: block(*ts, rate)
        out = run(x, mask, p[f"a{i}"], p[f"b{i}"])
        assert out["cache"] is None and out["name"] == "block" and not out["rows"].is_floating_point()
        x = out["x"]
    return (x**2).sum()


P = {
    f"{k}{i}": torch.randn(D, D, dtype=torch.double, generator=torch.Generator().manual_seed(i))
    for i in range(3)
    for k in "ab"
}
X = torch.randn(4, D, dtype=torch.double, generator=torch.Generator().manual_seed(9))
MASK = torch.tensor([1, 0, 1, 1])[:, None]
STACK = {k: torch.stack([t, 2 * t]) for k, t in P.items()}


def along(f: Callable[..., Any], p: Any) -> Any:
    """The derivative of f at p along p."""
    return jvp(f, (p,), (p,))[1]


def backward(rate: float, again: bool) -> Any:
    p = {k: t.clone().requires_grad_() for k, t in P.items()}
    loss(p, X, MASK, rate, again).backward()  # type: ignore[no-untyped-call]
    return [t.grad for t in p.values()]


def of_samples(p: Any, rate: float, again: bool) -> Any:
    return vmap(grad(loss), (None, 0, 0, None, None), randomness="different")(p, X[:, None], MASK[:, None], rate, again)


def of_adapters(rate: float, again: bool, randomness: str = "different") -> Any:
    return vmap(grad(loss), (0, None, None, None, None), randomness=randomness)(STACK, X, MASK, rate, again)


WAYS: dict[str, Callable[[float, bool], Any]] = {
    "value": lambda rate, r: loss(P, X, MASK, rate, r),
    "grad": lambda rate, r: grad(loss)(P, X, MASK, rate, r),
    "backward": backward,
    "vmap(grad) over adapters": of_adapters,
    "vmap(grad), the same numbers": lambda rate, r: of_adapters(rate, r, "same"),
    "per sample": lambda rate, r: of_samples(P, rate, r),
    "per sample and adapter": lambda rate, r: vmap(lambda p: of_samples(p, rate, r), randomness="different")(STACK),
    "jvp": lambda rate, r: along(lambda p: loss(p, X, MASK, rate, r), P),
    "Hessian-vector product": lambda rate, r: along(lambda p: grad(loss)(p, X, MASK, rate, r), P),
    "reverse over reverse": lambda rate, r: grad(
        lambda p: sum((t**2).sum() for t in grad(loss)(p, X, MASK, rate, r).values())
    )(P),
    "third order": lambda rate, r: along(lambda p: along(lambda p: grad(loss)(p, X, MASK, rate, r), p), P),
    "forward over forward": lambda rate, r: along(lambda p: along(lambda p: loss(p, X, MASK, rate, r), p), P),
    "jacfwd": lambda rate, r: jacfwd(lambda b: loss({**P, "b0": b}, X, MASK, rate, r), randomness="same")(P["b0"]),
    "jacrev": lambda rate, r: jacrev(lambda b: loss({**P, "b0": b}, X, MASK, 0.0, r))(P["b0"]),
}


@pytest.mark.parametrize("rate", [0.0, 0.5])
@pytest.mark.parametrize("way", WAYS)
def test_derivatives_are_those_of_the_function(way: str, rate: float) -> None:
    results = []
    for again in (True, False):
        torch.manual_seed(3)
        results.append(tree_leaves(WAYS[way](rate, again)))
    assert len(results[0]) == len(results[1]) > 0
    for mine, theirs in zip(*results, strict=True):
        assert theirs.isfinite().all() and theirs.abs().max() > 0
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_random_numbers_after_it_are_those_of_without() -> None:
    after = []
    for again in (True, False):
        torch.manual_seed(3)
        backward(0.5, again)
        after.append(torch.rand(3))
    assert torch.equal(*after)


def test_other_random_numbers_than_those_of_the_forward_pass_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="draws random numbers"):
        jacrev(lambda b: loss({**P, "b0": b}, X, MASK, 0.5, True))(P["b0"])


def test_autocast_is_what_it_was_in_the_forward_pass() -> None:
    w = torch.randn(8, 8)
    results = []
    for again in (True, False):
        x = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = remat(F.linear, x, w) if again else F.linear(x, w)
        assert y.dtype is torch.bfloat16
        results.append(torch.autograd.grad(y.float().pow(2).sum(), x)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_an_output_that_is_an_input_keeps_its_gradient() -> None:
    def f(x: Tensor) -> Any:
        return x, 2 * x

    got = grad(lambda x: sum(t.pow(2).sum() for t in remat(f, x)))(X)
    torch.testing.assert_close(got, 10 * X)


def deep(p: Tensor, again: bool) -> Tensor:
    def layer(x: Tensor, p: Tensor) -> Tensor:
        for _ in range(8):
            x = torch.tanh(x @ p)
        return x

    x = torch.ones(64, 16)
    for _ in range(12):
        x = remat(layer, x, p) if again else layer(x, p)
    return x.sum()


@pytest.mark.parametrize("transform", [grad, lambda f: vmap(grad(f), (0, None))])
def test_it_keeps_less_memory(transform: Any) -> None:
    p = torch.randn(3, 16, 16) / 4 if transform is not grad else torch.randn(16, 16) / 4
    most = {}
    for again in (True, False):
        most[again] = peak(transform(deep), p, again)
    assert most[False] > 4 * most[True], most
