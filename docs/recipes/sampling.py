"""A Markov chain whose states are adapters: stochastic-gradient Hamiltonian Monte Carlo of posteriors, as it is.

posteriors moves any tree of tensors by the gradient of its log posterior per sample, with noise at temperature 1 / N.
"""

import posteriors
import torch
from digits import accuracy, t, t_test, trained, turned, x, x_test
from optree import tree_map, tree_reduce
from torch.func import vmap
from torch.nn import functional as F

import peftfn as pf

torch.manual_seed(0)
model = trained(x, t)
net = pf.adapt(model, {"0|2": pf.IA3(), "4": pf.Full()})
inputs, targets, number, prior = turned(x[:200]), t[:200], 200, 1.0
start = net.init(seed=0)


def log_posterior(a, batch):
    x, t = batch
    away = tree_reduce(torch.add, tree_map(lambda p, q: (p - q).square().sum(), a, start))
    return -F.cross_entropy(net.apply(a, x), t) - prior / 2 * away / number, torch.tensor([])


chain = posteriors.sgmcmc.sghmc.build(log_posterior, lr=0.1, alpha=1.0, temperature=1 / number, momenta=0.0)
state, samples = chain.init(start), []
for i in range(1200):
    index = torch.randint(number, (50,))
    state, _ = chain.update(state, (inputs[index], targets[index]))
    if i >= 600 and i % 25 == 0:
        samples.append(state.params)

logits = vmap(net.apply, (0, None))
many = pf.stack(samples)
for name, images in {"turned digits": turned(x_test), "noise": torch.rand(500, 64)}.items():
    each = logits(many, images).softmax(-1)  # [24, n, 10]
    sure, sure_of_many = each.amax(-1).mean().item(), each.mean(0).amax(-1).mean().item()
    print(f"{name}: sure by {sure:.2f} with one of the chain, by {sure_of_many:.2f} with {len(samples)}")
    assert sure_of_many < sure
right = accuracy(logits(many, turned(x_test)).softmax(-1).mean(0), t_test)
base = accuracy(model(turned(x_test)), t_test)
print(f"{right:.1%} right, {base:.1%} with the base")
assert right > base + 0.3
