"""A hypernetwork: it makes the adapter of a task from a description, for tasks that it never saw too.

Here a task turns all images by an angle, its description is (cos, sin) of it, and the network makes LoRA's tensors.
"""

import math

import torch
from digits import accuracy, t, t_test, trained, x, x_test
from optree.integrations.torch import tree_ravel
from torch import nn
from torch.func import vmap
from torch.nn import functional as F

import peftfn as pf

torch.manual_seed(0)
model = trained(x, t)
net = pf.adapt(model, {"0.weight": pf.LoRA(rank=8, init_weights="random"), "bias": pf.Full()})
start, tree_of = tree_ravel(net.init(seed=0))


def turned(x, angle):
    c, s = math.cos(angle), math.sin(angle)
    grid = F.affine_grid(torch.tensor([[[c, -s, 0.0], [s, c, 0.0]]]), [1, 1, 8, 8], align_corners=False)
    return F.grid_sample(x.view(-1, 1, 8, 8), grid.expand(len(x), -1, -1, -1), align_corners=False).flatten(1)


def described(angles):
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


hyper = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, len(start)))
nn.init.zeros_(hyper[2].weight), nn.init.zeros_(hyper[2].bias)
optimizer = torch.optim.Adam(hyper.parameters(), lr=3e-3)
angles = [2 * math.pi * i / 16 for i in range(16)]
seen, unseen = [a for i, a in enumerate(angles) if i % 4 != 2], angles[2::4]
images = torch.stack([turned(x, a) for a in seen])  # [tasks, N, 64]
logits = vmap(lambda flat, x: net.apply(tree_of(start + flat), x))  # each task's images with its own adapter
for _ in range(300):
    part = torch.randint(len(x), (48,))
    out = logits(hyper(described(seen)), images[:, part])
    loss = F.cross_entropy(out.flatten(0, 1), t[part].repeat(len(seen)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

tests = torch.stack([turned(x_test, a) for a in unseen])
base = accuracy(torch.cat([model(x) for x in tests]), t_test.repeat(len(unseen)))
made = accuracy(logits(hyper(described(unseen)), tests).flatten(0, 1), t_test.repeat(len(unseen)))
print(f"angles that it never saw: {base:.1%} with the base, {made:.1%} with the adapters it makes")
assert made > base + 0.15
