"""What the recipes share: scikit-learn's 1,797 digits, and a small network trained on some of them in a second."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

images, labels = (torch.tensor(part) for part in load_digits(return_X_y=True))
images = images.float() / 16
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
x, t = images[order[:1200]], labels[order[:1200]]  # [1200, 64], [1200]: to train on
x_test, t_test = images[order[1200:]], labels[order[1200:]]


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def trained(x, t, steps=200, seed=0):
    model = network(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        F.cross_entropy(model(x), t).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def accuracy(logits, t):
    return (logits.argmax(-1) == t).float().mean().item()


def turned(x, quarters=1):
    """The images, turned by a quarter: what the base never saw."""
    return x.view(-1, 8, 8).rot90(quarters, (1, 2)).reshape(-1, 64)
