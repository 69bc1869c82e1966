"""Scaling, summing and chaining methods whose change depends on the input."""

import pytest
import torch
from support import random

import peftfn as pf

METHODS = (pf.MoELoRA(rank=2, experts=3, active=2), pf.Lily(rank=2, experts=3))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_changes_of_the_output_add(method: pf.Method) -> None:
    """A method without a delta has none to add: what is added is what the layer gives beyond the base."""
    net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": method})
    a, b, x = random(net, 0), random(net, 1), torch.randn(2, 5, 8)
    base = net.model(x)
    assert not torch.allclose(net.apply(a, x), base, atol=1e-3)
    want = 2 * (net.apply(a, x) - base) - 0.5 * (net.apply(b, x) - base)
    got = net.apply(pf.add(pf.scale(a, 2.0), pf.scale(b, -0.5)), x) - base
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_sum_in_a_module_and_in_a_mixed_batch_has_the_gradients_of_both() -> None:
    net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": METHODS[0]})
    a, b, x = random(net, 0), random(net, 1), torch.randn(3, 5, 8)
    torch.testing.assert_close(
        net.mixed(pf.stack([pf.add(a, b), pf.add(b, b)]), [0, 1, 0], x)[1], net.apply(pf.add(b, b), x)[1]
    )
    m = pf.as_module(net, a=a, b=b)
    m.use_(["a", "b"])
    torch.testing.assert_close(m(x), net.apply(pf.add(a, b), x))
    grads = torch.func.grad(lambda a: net.apply(pf.add(a, pf.scale(a, 1.0)), x).square().sum())(a)
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in grads["0.weight"].values())


def test_a_method_that_depends_on_the_input_is_the_last_of_a_chain() -> None:
    with pytest.raises(ValueError, match=r"MoELoRA\(rank=2, .*depends on the input.*put it last"):
        pf.chain(METHODS[0], pf.LoRA(rank=2))
    net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.chain(pf.LoRA(rank=2), METHODS[0])})
    with pytest.raises(ValueError, match=r"0\.weight: chain.*depends on the input.*cannot be merged"):
        net.merge(net.init())
