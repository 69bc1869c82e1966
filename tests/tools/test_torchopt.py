"""torchopt's optimizers take an adapter as it is: what docs/training.md says of them."""

from typing import Any

import pytest
import torch
import torchopt
from support import trees_close
from torch import nn
from torch.func import grad, vmap

import peftfn as pf
from peftfn.testing import close

STEPS = 5
BIAS = 1e-6
"""How far Adam's steps in fp64 may be off: torchopt's bias corrections are in fp32."""
LORA = pf.LoRA(rank=2)
RULES = {"0.weight": LORA, "2.weight": pf.DoRA(rank=2), "2.bias": pf.Full()}


def made(rules: Any = RULES) -> tuple[pf.Adapted, Any]:
    """A net in fp64, and a loss of its adapters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    net = pf.adapt(model, rules)
    x, t = torch.randn(10, 8).double(), torch.randn(10, 3).double()
    return net, lambda a: (net.apply(a, x) - t).square().mean()


def trained(optimizer: Any, loss: Any, a: Any, steps: int = STEPS) -> Any:
    state = optimizer.init(a)
    for _ in range(steps):
        updates, state = optimizer.update(grad(loss)(a), state, params=a, inplace=False)
        a = torchopt.apply_updates(a, updates, inplace=False)
    return a


def test_adam_is_torchs() -> None:
    net, loss = made()
    a = net.init(dtype=torch.float64)
    got = trained(torchopt.adam(lr=1e-2), loss, a)
    own = {n: {k: t.clone().requires_grad_() for k, t in leaf.items()} for n, leaf in a.items()}
    torchs = torch.optim.Adam(pf.leaves(own), lr=1e-2)
    for _ in range(STEPS):
        torchs.zero_grad()
        loss(own).backward()
        torchs.step()
    trees_close(got, {n: {k: t.detach() for k, t in leaf.items()} for n, leaf in own.items()}, tol=BIAS)
    assert loss(got) < loss(a)
    trees_close(a, net.init(dtype=torch.float64), tol=0.0)  # no step writes the adapter that it was given


def test_adamw_is_our_own_step() -> None:
    net, loss = made()
    a = net.init(dtype=torch.float64)
    step = pf.steps.adamw(1e-2, weight_decay=0.01)
    ours, state = a, step.init(a)
    for _ in range(30):
        updates, state = step.update(grad(loss)(ours), state, ours)
        ours = pf.steps.apply(ours, updates)
    trees_close(trained(torchopt.adamw(lr=1e-2, weight_decay=0.01), loss, a, 30), ours, tol=BIAS)


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("make", [torchopt.adam, torchopt.adamw], ids=["adam", "adamw"])
def test_a_stack_is_trained_as_each_alone(make: Any) -> None:
    net, loss = made()
    each = [net.init(seed, dtype=torch.float64) for seed in range(3)]
    together = vmap(lambda a: trained(make(lr=1e-2), loss, a))(pf.stack(each))
    for one, a in zip(pf.unstack(together), each, strict=True):
        trees_close(one, trained(make(lr=1e-2), loss, a), tol=BIAS)


def test_gradients_flow_through_steps() -> None:
    """The derivative of the loss after two steps by where they start from, against a difference.

    Of LoRAs, since DoRA holds its norm constant in gradients.
    """
    net, loss = made({"weight": LORA})
    a = net.init(dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    a = {n: {k: t + 0.1 * torch.randn(t.shape, generator=g).double() for k, t in p.items()} for n, p in a.items()}
    site, key = "0.weight", "a"

    def after(t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = loss(trained(torchopt.sgd(lr=0.1, momentum=0.9), loss, a | {site: a[site] | {key: t}}, 2))
        return out

    t = a[site][key]
    along = torch.randn(t.shape, generator=g).double()
    h = 1e-5
    difference = (after(t + h * along) - after(t - h * along)) / (2 * h)
    close((grad(after)(t) * along).sum(), difference, "through two steps", rtol=1e-6)
