"""Adapters in an ensemble: trained in one run, called in one pass. Where they disagree, the input is new."""

import torch
from digits import accuracy, t, t_test, trained, turned, x, x_test
from torch.func import grad, vmap
from torch.nn import functional as F

import peftfn as pf
from peftfn import steps

torch.manual_seed(0)
model = trained(x, t)
net = pf.adapt(model, {"weight": pf.LoRA(rank=4), "bias": pf.Full()})
members, inputs = 16, turned(x)
many = pf.stack([net.init(seed) for seed in range(members)])
optimizer = steps.adamw(2e-2)
state = optimizer.init(many)


def loss(a, x, t):
    return F.cross_entropy(net.apply(a, x), t)


for _ in range(150):
    drawn = torch.randint(600, (members, 64))  # each member draws its own samples of the first 600
    g = vmap(grad(loss))(many, inputs[drawn], t[drawn])
    updates, state = optimizer.update(g, state, many)
    many = steps.apply(many, updates)

predict = vmap(net.apply, (0, None))


def disagreement(images):
    """[images]: the entropy of the mean prediction less the mean entropy, in nats."""
    p = predict(many, images).softmax(-1)

    def entropy(p):
        return -(p * p.clamp(min=1e-9).log()).sum(-1)

    return entropy(p.mean(0)) - entropy(p).mean(0)


known, unknown = disagreement(turned(x_test)), disagreement(torch.rand(len(x_test), 64))
rank = (unknown[:, None] > known[None]).float().mean().item()  # area under the ROC curve
alone = [accuracy(y, t_test) for y in predict(many, turned(x_test))]
together = accuracy(predict(many, turned(x_test)).softmax(-1).mean(0), t_test)
print(
    f"{together:.1%} right together, {sum(alone) / members:.1%} alone; noise is told from digits with AUROC {rank:.2f}"
)
assert together > sum(alone) / members and rank > 0.8
