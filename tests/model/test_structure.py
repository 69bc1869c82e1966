"""A copy of a model's structure never leads back to the model: what would is refused when it is adapted."""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Net, close, random
from torch import nn
from torch.nn import functional as F

import peftfn as pf
from peftfn import LoRA, VeRA


def weak(m: Any) -> None:
    m.run = weakref.ref(m.f)


def default(m: Any) -> None:
    m.run = lambda x, f=m.f: f(x)


def keyword_default(m: Any) -> None:
    def run(x: Any, *, f: Any = m.f) -> Any:
        return f(x)

    m.run = run


def nested(m: Any) -> None:
    def inner(x: Any) -> Any:
        return m.f(x)

    m.run = functools.wraps(inner)(lambda x: inner(x))


def listed(m: Any) -> None:
    layers = {"all": [m.f]}
    m.run = lambda x: layers["all"][0](x)


def bound(m: Any) -> None:
    forward = m.f.forward
    m.run = lambda x: forward(x)


def in_partial(m: Any) -> None:
    m.run = functools.partial(lambda scale, x: scale * m.f(x), 1.0)


def among_others(m: Any) -> None:
    m.run = {"a": [None, lambda x: m.f(x)]}


WAYS = [weak, default, keyword_default, nested, listed, bound, in_partial, among_others]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_a_way_back_to_the_model_is_refused(way: Callable[[Any], None]) -> None:
    model = Net(lambda m, x: m.f(x))
    way(model)
    with pytest.raises(TypeError, match=r"Net\.run is (a function that holds|a weak reference to) a (Linear|Net)"):
        pf.adapt(model, {"f": LoRA(2)})


def test_functions_over_anything_else_are_kept() -> None:
    def unbound(x: Any) -> Any:
        return later(x)  # a name that has no value yet

    model, scale, other = Net(lambda m, x: m.run(m.half(x))), 2.0, nn.Linear(8, 8)
    model.run = functools.partial(model.f.forward)  # follows the copy
    model.half = lambda x, by=[scale]: x / by[0]
    model.elsewhere, model.nobody, model.unbound = lambda x: other(x), weakref.ref(other), unbound
    net = pf.adapt(model, {"f": LoRA(2)})
    a, x = random(net), torch.ones(2, 8)
    close(net.apply(a, x), F.linear(x / 2, net.merge(a)["f.weight"], model.f.bias))
    later = None
    assert later is None


@pytest.mark.parametrize("part", ["layer", "model"])
def test_a_model_compiled_in_place_is_adapted_as_it_is_without(part: str) -> None:
    model, x = Net(lambda m, x: m.g(m.f(x))), torch.ones(2, 8)
    (model.f if part == "layer" else model).compile(backend="eager")
    model(x)
    net = pf.adapt(model, {"f": LoRA(2)})
    a = random(net)
    want = model.g(F.linear(x, net.merge(a)["f.weight"], model.f.bias))
    close(net.apply(a, x), want)
    close(pf.as_module(net, a)(x), want)
    model.g.compile(backend="eager")
    close(net.apply(a, x), want)


@pytest.mark.parametrize("name", ["run", "forward", "fast"])
def test_a_method_that_is_compiled_in_an_attribute_runs_as_it_is(name: str) -> None:
    """`self.f = torch.compile(self.f)`, as GPTQModel's layers have it: a copy that kept it would run the original."""

    class Layer(nn.Linear):
        def run(self, x: Any) -> Any:
            return F.linear(x, self.weight, self.bias)

        def forward(self, x: Any) -> Any:
            return (self.fast if "fast" in vars(self) else self.run)(x)

    model, x = Net(lambda m, x: m.g(m.f(x))), torch.ones(2, 8)
    model.f = Layer(8, 8)
    setattr(model.f, name, torch.compile(model.f.run if name == "fast" else getattr(model.f, name), backend="eager"))
    before, compiled = model(x), vars(model.f)[name]
    net = pf.adapt(model, {"f": LoRA(2), "g": LoRA(2)})
    a = random(net)
    merged = net.merge(a)
    want = F.linear(F.linear(x, merged["f.weight"], model.f.bias), merged["g.weight"], model.g.bias)
    close(net.apply(a, x), want)
    close(pf.as_module(net, a)(x), want)
    close(pf.merged_model(net, a)(x), want)
    assert vars(model.f)[name] is compiled and torch.equal(model(x), before)


def test_a_wrapper_by_torch_compile_is_refused_with_its_cure() -> None:
    model = Net(lambda m, x: m.f(x))
    for wrapped in (torch.compile(model, backend="eager"), nn.Sequential(torch.compile(model, backend="eager"))):
        with pytest.raises(
            TypeError, match=r"torch\.compile made a wrapper around a Net .*_orig_mod.*torch\.compile\(net"
        ):
            pf.adapt(wrapped, {"f": LoRA(2)})


def test_a_net_made_in_inference_mode_trains_later() -> None:
    """Its constants (VeRA's projections) are saved for backward, which tensors of that mode cannot be."""
    with torch.inference_mode():
        net = pf.adapt(Net(lambda m, x: m.f(x)), {"f": VeRA(2)})
    a, x = random(net), torch.ones(2, 8)
    leaf = {n: {k: t.requires_grad_() for k, t in p.items()} for n, p in a.items()}
    net.apply(leaf, x).sum().backward()
    assert all(t.grad is not None and t.grad.isfinite().all() for p in leaf.values() for t in p.values())
