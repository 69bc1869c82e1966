"""DP-SGD (arXiv 1607.00133): clip the gradient of each sample, add noise, and account for the privacy that is left.

g = (1/B) [Σ_i min(1, C/‖g_i‖) g_i + N(0, σ²C² I)], with every sample in a batch with probability B/N.
"""

import torch
from digits import accuracy, t, trained, turned, x, x_test
from digits import t_test as wanted
from dp_accounting import dp_event, rdp
from optree import tree_map
from torch.func import grad, vmap
from torch.nn import functional as F

import peftfn as pf

model = trained(x, t)
net = pf.adapt(model, {"0|2": pf.LoRA(rank=4), "4": pf.Full()})
steps, size, clip, noise, rate, delta = 150, 300, 1.0, 1.5, 2.0, 1e-5


def loss(a, x, t):
    return F.cross_entropy(net.apply(a, x), t)


def private_gradient(a, x, t):
    each = vmap(grad(loss), (None, 0, 0))(a, x, t)  # a tree like a, each tensor [B, …]
    norms = sum(g.flatten(1).square().sum(1) for g in pf.leaves(each)).sqrt()  # [B]
    shrink = (clip / norms).clamp(max=1)
    total = tree_map(lambda g: torch.einsum("b,b...->...", shrink, g), each)
    return tree_map(lambda g: (g + noise * clip * torch.randn_like(g)) / size, total)


torch.manual_seed(0)
a, inputs = net.init(seed=0), turned(x)
for _ in range(steps):
    drawn = torch.rand(len(x)) < size / len(x)  # Poisson sampling, which the accountant supposes
    g = private_gradient(a, inputs[drawn], t[drawn])
    a = tree_map(lambda p, g: p - rate * g, a, g)

event = dp_event.PoissonSampledDpEvent(size / len(x), dp_event.GaussianDpEvent(noise))
epsilon = rdp.RdpAccountant(range(2, 64)).compose(event, steps).get_epsilon(delta)
before, after = accuracy(model(turned(x_test)), wanted), accuracy(net.apply(a, turned(x_test)), wanted)
print(f"turned digits: {before:.1%} before, {after:.1%} after, (ε = {epsilon:.1f}, δ = {delta:g})")
assert after > before + 0.3
