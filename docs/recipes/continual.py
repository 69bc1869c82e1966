"""Continual learning with orthogonal adapters (O-LoRA, arXiv 2310.14152): a task is learnt beside the ones before.

loss = task loss + λ Σ_sites ‖A_before A_newᵀ‖²: inputs that move the former adapter do not move the new one.
"""

import torch
from digits import accuracy, t, t_test, trained, turned, x, x_test
from torch.func import grad
from torch.nn import functional as F

import peftfn as pf
from peftfn import steps

model = trained(x, t)
net = pf.adapt(model, {"0.weight": pf.LoRA(rank=8)})
tasks = [turned(x, 1), turned(x, 2)]
tests = [turned(x_test, 1), turned(x_test, 2)]


def together(before, a):
    """A tree with both: LoRA's changes add up."""
    return a if before is None else pf.add(before, a)


def overlap(before, a):
    return sum((before[s]["a"] @ a[s]["a"].mT).square().sum() for s in a)


def learnt(before, images, penalty, seed):
    def loss(a, x, t):
        value = F.cross_entropy(net.apply(together(before, a), x), t)
        return value if before is None else value + penalty * overlap(before, a)

    torch.manual_seed(seed)
    a, optimizer = net.init(seed), steps.adamw(5e-3)
    state = optimizer.init(a)
    for _ in range(150):
        part = torch.randint(len(x), (64,))
        updates, state = optimizer.update(grad(loss)(a, images[part], t[part]), state, a)
        a = steps.apply(a, updates)
    return a


first = learnt(None, tasks[0], 0.0, seed=1)
known = accuracy(net.apply(first, tests[0]), t_test)
forgot = {}
for penalty in (0.0, 0.5):
    second = learnt(first, tasks[1], penalty, seed=2)
    scores = [accuracy(net.apply(together(first, second), images), t_test) for images in tests]
    forgot[penalty] = known - scores[0]
    print(f"λ = {penalty}: the first task {known:.1%} → {scores[0]:.1%}, the second {scores[1]:.1%}")
    assert scores[1] > 0.6
assert forgot[0.5] < forgot[0.0]
