"""A moving average of an adapter as a teacher: targets for data without labels (mean teacher, arXiv 1703.01780)."""

import torch
from digits import accuracy, t, t_test, trained, turned, x, x_test
from optree import tree_map
from torch.func import grad
from torch.nn import functional as F

import peftfn as pf
from peftfn import steps

torch.manual_seed(0)
model = trained(x, t)
net = pf.adapt(model, {"weight": pf.LoRA(rank=8), "bias": pf.Full()})
few, unlabelled = 60, turned(x)  # 60 images have labels


def noisy(x):
    return x + 0.15 * torch.randn_like(x)


def loss(a, labelled, wanted, free, soft):
    agreement = (net.apply(a, free).softmax(-1) - soft).square().sum(-1).mean()
    return F.cross_entropy(net.apply(a, labelled), wanted) + 3 * agreement


optimizer = steps.adamw(5e-3)
a = teacher = net.init(seed=0)
state = optimizer.init(a)
for _ in range(300):
    free = unlabelled[torch.randint(len(x), (128,))]
    soft = net.apply(teacher, noisy(free)).softmax(-1)
    g = grad(loss)(a, noisy(turned(x[:few])), t[:few], noisy(free), soft)
    updates, state = optimizer.update(g, state, a)
    a = steps.apply(a, updates)
    teacher = tree_map(lambda old, new: 0.98 * old + 0.02 * new, teacher, a)  # an adapter is a tree; so is its average

before = accuracy(model(turned(x_test)), t_test)
after = accuracy(net.apply(teacher, turned(x_test)), t_test)
print(f"turned digits, 60 labels: {before:.1%} with the base, {after:.1%} with the teacher")
assert after > before + 0.3
