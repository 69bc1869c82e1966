"""What an adapter made is kept for its next call alone: not for another adapter, base, mode or dtype."""

import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from support import Net, close, random
from torch import Tensor, nn
from torch.nn import functional as F

import peftfn as pf

RULES = {r"[fg]\.weight": pf.LoRA(rank=8, alpha=4), r"h\.weight": pf.Full()}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))


def alike(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        close(g, w)


def model(rules: Any = RULES) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    base = Net(lambda m, x: m.h(m.g(m.f(x))), f=nn.Linear(8, 8), g=nn.Linear(8, 8, bias=False), h=nn.Linear(8, 8))
    net = pf.adapt(base, rules)
    return base, net, random(net)


def quietly(net: Any, a: Any, x: Tensor = X, times: int = 1) -> Any:
    with torch.no_grad():
        *_, y = (net.apply(a, x) for _ in range(times))
    return y


def kept(net: Any) -> dict[str, Any]:
    found: dict[str, Any] = net._runner._idle[-1].keeper.values
    return found


def elsewhere(t: Tensor) -> None:
    t.data = 2 * t.data


def turned(t: Tensor) -> None:
    t.data = t.data.mT


CHANGES: dict[str, Callable[[nn.Module, Any], Any]] = {
    "nothing": lambda m, a: None,
    "a step in place": lambda m, a: a["f.weight"]["a"].mul_(3),
    "a new tensor": lambda m, a: a["f.weight"].update(a=3 * a["f.weight"]["a"]),
    "a new leaf": lambda m, a: a.update({"f.weight": {k: 2 * t for k, t in a["f.weight"].items()}}),
    "leaves that change places": lambda m, a: a.update({"f.weight": a["g.weight"], "g.weight": a["f.weight"]}),
    "tensors that change names": lambda m, a: a["f.weight"].update(a=a["f.weight"]["b"], b=a["f.weight"]["a"]),
    "other data of a leaf": lambda m, a: elsewhere(a["g.weight"]["b"]),
    "the same data, transposed": lambda m, a: turned(a["g.weight"]["b"]),
    "a leaf that is not kept": lambda m, a: a["h.weight"].update({k: 2 * t for k, t in a["h.weight"].items()}),
    "another weight of the base": lambda m, a: setattr(m.f, "weight", nn.Parameter(torch.ones(8, 8))),
    "other data of the base": lambda m, a: elsewhere(m.g.weight),
    "the base's data, transposed": lambda m, a: turned(m.g.weight),
    "a write to the base": lambda m, a: m.f.weight.data.add_(1),
    "another bias": lambda m, a: setattr(m.f, "bias", nn.Parameter(torch.ones(8))),
    "no bias": lambda m, a: setattr(m.f, "bias", None),
    "another layer": lambda m, a: setattr(m, "g", nn.Linear(8, 8)),
    "a hook": lambda m, a: m.f.register_forward_hook(lambda _, x, y: 2 * y),
    "a scaled leaf": lambda m, a: a.update(pf.scale(a, 0.5)),
    "a requirement": lambda m, a: m.requires_grad_(False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_calls_is_seen(change: str) -> None:
    base, net, a = model()
    before = quietly(net, a, times=3)
    assert kept(net).keys() == {"f.weight", "g.weight"}
    with torch.no_grad():
        CHANGES[change](base, a)
    for _ in range(3):
        y = quietly(net, a)
        close(y, quietly(pf.adapt(base, RULES), a))
    if change not in ("nothing", "a requirement"):
        assert not torch.allclose(y, before)


def test_a_leaf_that_no_longer_fits_is_an_error() -> None:
    _, net, a = model()
    quietly(net, a, times=3)
    a["f.weight"]["a"].data = a["f.weight"]["a"].data[:4]
    with pytest.raises(ValueError, match=r"f\.weight: a has shape \[4, 8\]"):
        quietly(net, a)


def test_a_missing_leaf_is_an_error() -> None:
    _, net, a = model()
    quietly(net, a, times=3)
    del a["h.weight"]
    with pytest.raises(KeyError, match=r"h\.weight"):
        quietly(net, a)


def test_a_tensor_that_moves_to_another_leaf_is_an_error() -> None:
    _, net, a = model({r"f\.weight": pf.LoRA(rank=2), r"h\.weight": pf.Full()})
    quietly(net, a, times=3)
    a["h.weight"] = {"b": a["f.weight"].pop("b"), **a["h.weight"]}  # the same tensors under the same names in line
    with pytest.raises(KeyError, match=r"f\.weight"):
        quietly(net, a)


def test_adapters_that_take_turns() -> None:
    base, net, a = model()
    b = pf.scale(a, 1.0) | {"f.weight": {k: 2 * t for k, t in a["f.weight"].items()}}
    for adapter in (a, a, a, b, a, b, b, b, a):
        close(quietly(net, adapter), quietly(pf.adapt(base, RULES), adapter))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_of_the_input_changes(dtype: torch.dtype) -> None:
    base, net, a = model()
    quietly(net, a, times=3)
    with torch.autocast("cpu", dtype=torch.bfloat16) if dtype == torch.bfloat16 else torch.no_grad():
        if dtype == torch.float64:
            base.double()
        x = X.to(dtype)
        close(quietly(net, a, x), quietly(pf.adapt(base, RULES), a, x))


def test_gradients_after_calls_without() -> None:
    base, net, a = model()
    for leaf in a.values():
        for t in leaf.values():
            t.requires_grad_()
    quietly(net, a, times=3)
    want = torch.autograd.grad(pf.adapt(base, RULES).apply(a, X).square().sum(), pf.leaves(a))
    alike(torch.autograd.grad(net.apply(a, X).square().sum(), pf.leaves(a)), want)
    assert kept(net)
    alike(pf.leaves(torch.func.grad(lambda a: net.apply(a, X).square().sum())(a)), want)


def test_a_forward_that_turns_gradients_on() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return m.f(x)

    base = Net(body, f=nn.Linear(8, 8))
    net = pf.adapt(base, {"f.weight": pf.LoRA(rank=2)})
    a = random(net)
    for t in a["f.weight"].values():
        t.requires_grad_()
    y = quietly(net, a, times=3)
    got = torch.autograd.grad(y.square().sum(), pf.leaves(a))
    fresh = pf.adapt(base, {"f.weight": pf.LoRA(rank=2)})
    alike(got, torch.autograd.grad(fresh.apply(a, X).square().sum(), pf.leaves(a)))


def test_a_forward_that_reads_the_weight_otherwise() -> None:
    base = Net(lambda m, x: m.f(x) + F.linear(x, m.f.weight) @ m.f.weight, f=nn.Linear(8, 8))
    net = pf.adapt(base, {"f.weight": pf.LoRA(rank=2)})
    a = random(net)
    close(quietly(net, a, times=4), torch.func.functional_call(base, net.merge(a), (X,)).detach())


def test_an_adapter_dies_when_its_owner_lets_go() -> None:
    _, net, a = model()
    quietly(net, a, times=3)
    alive, held = weakref.ref(a["f.weight"]["a"]), kept(net)
    assert held
    del a, held
    gc.collect()
    assert alive() is None
    assert not kept(net)


def test_under_inference_mode_too() -> None:
    base, net, a = model()
    with torch.inference_mode():
        got = [net.apply(a, X) for _ in range(4)]
    assert kept(net)
    for y in got:
        close(y.clone(), quietly(pf.adapt(base, RULES), a))
    assert all(t.isfinite().all() for t in pf.leaves(torch.func.grad(lambda a: net.apply(a, X).sum())(a)))


def test_dropout_of_a_net_in_train_mode_is_not_kept() -> None:
    base, net, a = model({r"f\.weight": pf.LoRA(rank=8, dropout=0.5)})
    quietly(net, a, times=3)
    assert not kept(net)
    base.eval()
    y = quietly(net, a, times=3)
    assert kept(net)
    base.train()
    assert not torch.allclose(quietly(net, a), y)


def test_what_cannot_be_kept_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _, net, a = model({r"f\.weight": pf.DoRA(rank=2)})
    quietly(net, a, times=2)
    tried: list[Any] = []
    monkeypatch.setattr("peftfn.slots.kept.unmade", lambda *what: tried.append(what))
    quietly(net, a, times=2)
    assert not tried
    ready = net.prepare(a)
    close(quietly(net, ready, times=3), quietly(net, a))
    assert tried


def test_threads_have_their_own() -> None:
    base, net, _ = model()
    adapters = [random(net, seed=k) for k in range(8)]
    want = [quietly(pf.adapt(base, RULES), a) for a in adapters]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda k: quietly(net, adapters[k % 8], times=3), range(64)))
    for k, y in enumerate(got):
        close(y, want[k % 8])


def python_calls(f: Callable[[], Any]) -> int:
    """How many functions written in Python a call runs."""
    counted = 0

    def note(frame: Any, event: str, _: Any) -> None:
        nonlocal counted
        counted += event == "call"

    sys.setprofile(note)
    try:
        f()
    finally:
        sys.setprofile(None)
    return counted


@pytest.mark.parametrize(("times", "most"), [(1, 20), (3, 5)], ids=["made", "kept"])
def test_python_calls_at_a_site(times: int, most: int) -> None:
    def of(n: int) -> int:
        base = nn.Sequential(*[nn.Linear(8, 8) for _ in range(n)])
        net = pf.adapt(base, {r"\d+\.weight": pf.LoRA(rank=2)})
        a = net.init()
        with torch.no_grad():
            base(X)
            net.apply(a, X)
            if times > 1:
                net.apply(a, X)
                net.apply(a, X)
            else:
                a = net.init(seed=1)
            plain = python_calls(lambda: base(X))
            return python_calls(lambda: net.apply(a, X)) - plain

    assert (of(40) - of(20)) / 20 <= most
