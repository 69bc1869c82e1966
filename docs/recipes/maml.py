"""MAML (arXiv 1703.03400) on adapters: a start from which one step of gradient descent fits a new task.

min_a Σ_tasks loss(a − η ∇loss(a, support), query): a gradient through a gradient.
"""

import torch
from optree import tree_map
from torch import nn
from torch.func import grad, grad_and_value, vmap

import peftfn as pf
from peftfn import steps

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
net = pf.adapt(model, {"weight": pf.LoRA(rank=8, init_weights="random"), "bias": pf.Full()})
INNER = 0.05


def tasks(number, seed):
    """Sine waves of any amplitude and phase: support and query points, each [tasks, 10, 1]."""
    draw = torch.Generator().manual_seed(seed)
    amplitude, phase = (torch.rand(number, 1, 1, generator=draw) * s + o for s, o in ((3, 1), (3.14, 0)))
    x = torch.rand(number, 20, 1, generator=draw) * 10 - 5
    t = amplitude * torch.sin(x + phase)
    return x[:, :10], t[:, :10], x[:, 10:], t[:, 10:]


def loss(a, x, t):
    return (net.apply(a, x) - t).square().mean()


def adapted(a, x, t):
    return tree_map(lambda p, g: p - INNER * g, a, grad(loss)(a, x, t))


def outer(a, batch):
    after = vmap(lambda x, t, xq, tq: loss(adapted(a, x, t), xq, tq))
    return after(*batch).mean()


a = net.init(seed=0)
optimizer = steps.adamw(3e-3)
state = optimizer.init(a)
for step in range(300):
    g, value = grad_and_value(outer)(a, tasks(32, step))
    updates, state = optimizer.update(g, state, a)
    a = steps.apply(a, updates)

new = tasks(200, seed=-1)
before = vmap(lambda x, t, xq, tq: loss(a, xq, tq))(*new).mean().item()
fresh, after = outer(net.init(seed=0), new).item(), outer(a, new).item()
print(f"error on new waves: {before:.2f} before the step, {after:.2f} after it ({fresh:.2f} from a fresh adapter)")
assert after < 0.6 * before and after < 0.6 * fresh
