"""Unlearning by negation (task arithmetic, arXiv 2212.04089): learn what to forget, then subtract it.

W − s·Δ: the adapter that was trained on a class is scaled by a negative number, and the base never changes.
"""

import torch
from digits import accuracy, t, t_test, trained, x, x_test
from torch.func import grad
from torch.nn import functional as F

import peftfn as pf
from peftfn import steps

FORGET = 3
model = trained(x, t)
net = pf.adapt(model, {"weight": pf.LoRA(rank=2), "4.bias": pf.Full()})
there = t == FORGET


def loss(a, x, t):
    return F.cross_entropy(net.apply(a, x), t)


torch.manual_seed(0)
a, optimizer = net.init(seed=0), steps.adamw(2e-3)
state = optimizer.init(a)
for _ in range(60):  # learn to say FORGET where it stands, and keep the rest as it is
    updates, state = optimizer.update(grad(loss)(a, x[there], t[there]), state, a)
    a = steps.apply(a, updates)

tests = t_test == FORGET
for s in (0.0, 1.0, 2.0, 2.5):
    logits = net.apply(pf.scale(a, -s), x_test)
    forgotten, kept = accuracy(logits[tests], t_test[tests]), accuracy(logits[~tests], t_test[~tests])
    print(f"less {s:g} times the adapter: {forgotten:.1%} of the {FORGET}s, {kept:.1%} of the others")
assert forgotten < 0.2 and kept > 0.85
