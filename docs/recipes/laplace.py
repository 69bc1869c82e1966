"""A Laplace approximation of an adapter: a Gaussian around the trained one, with the inverse Hessian as covariance.

log p(a | data) ≈ log p(â | data) − ½ (a − â)ᵀ H (a − â), with H of −log p(data | a) + ½ λ‖a‖², exactly: it is small.
"""

import torch
from digits import accuracy, t, t_test, trained, turned, x, x_test
from optree.integrations.torch import tree_ravel
from torch.func import hessian, vmap
from torch.nn import functional as F

import peftfn as pf

torch.manual_seed(0)
model = trained(x, t)
net = pf.adapt(model, {"0|2": pf.IA3(), "4": pf.Full()})
inputs, targets, prior = turned(x[:200]), t[:200], 1.0
start, tree_of = tree_ravel(net.init(seed=0))  # 778 numbers in a line


def energy(flat):
    """−log p(a, data)"""
    nll = F.cross_entropy(net.apply(tree_of(flat), inputs), targets, reduction="sum")
    return nll + prior / 2 * (flat - start).square().sum()


best = start.clone().requires_grad_()
optimizer = torch.optim.LBFGS([best], max_iter=300, line_search_fn="strong_wolfe")


def step():
    optimizer.zero_grad()
    value = energy(best)
    value.backward()
    return value


optimizer.step(step)
best = best.detach()
values, vectors = torch.linalg.eigh(hessian(energy)(best))
root = vectors * values.clamp(min=prior).rsqrt()  # the prior is the least curvature of a minimum
samples = best + torch.randn(32, len(best)) @ root.mT

logits = vmap(lambda flat, x: net.apply(tree_of(flat), x), (0, None))  # 32 adapters in one pass
for name, images in {"turned digits": turned(x_test), "noise": torch.rand(500, 64)}.items():
    one = net.apply(tree_of(best), images).softmax(-1)
    many = logits(samples, images).softmax(-1).mean(0)
    sure, sure_of_many = (p.amax(-1).mean().item() for p in (one, many))
    print(f"{name}: sure by {sure:.2f} with one adapter, by {sure_of_many:.2f} with 32")
    assert sure_of_many < sure
right = accuracy(logits(samples, turned(x_test)).softmax(-1).mean(0), t_test)
base = accuracy(model(turned(x_test)), t_test)
print(f"{right:.1%} right, {base:.1%} with the base")
assert right > base + 0.3
