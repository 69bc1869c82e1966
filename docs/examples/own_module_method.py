"""A method around a module of one's own. In one batch it mixes with a prompt and with the base, row by row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from base import batch, model

import peftfn as pf
from peftfn.fields import PositiveInt
from peftfn.testing import check_method


@dataclass(frozen=True)
class Steer(pf.ModuleMethod):
    """y + V softmax(K y): each hidden state moves along trained directions V [d, vectors], which it chooses by K."""

    cases: ClassVar = ({"vectors": 2},)

    vectors: PositiveInt = 4
    dim: int = 0  # features, where the module's weights do not tell

    def init(self, rng, m):
        d = self.dim or m.width
        return {"k": rng.normal(self.vectors, d, std=d**-0.5), "v": rng.zeros(d, self.vectors)}

    def after(self, p, m, x, y, *seen):
        return y + torch.softmax(y @ p["k"].mT, -1) @ p["v"].mT


check_method(Steer(vectors=2, dim=0))  # every law

net = pf.adapt(model, {r"mlp": Steer(vectors=16)})
a = net.init(seed=0)
optimizer = torch.optim.AdamW([t.requires_grad_() for t in pf.leaves(a)], lr=2e-2)
losses = []
for step in range(60):
    ids = batch(16, step, str.upper)
    loss = net.apply(a, ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(f"{sum(t.numel() for t in pf.leaves(a)):,} numbers: loss {losses[0]:.2f} → {losses[-1]:.2f}")
assert losses[-1] < 0.9 * losses[0]

prompted = pf.adapt(model, {".*": pf.PromptTuning(n=5)})
p, ids = prompted.init(seed=0), batch(3, step=-1)
y = pf.Nets([net, prompted]).mixed([pf.stack([a]), pf.stack([p])], [1, 0, -1], ids).logits
for row, alone in enumerate((prompted.apply(p, ids[:1]), net.apply(a, ids[1:2]), model(ids[2:]))):
    torch.testing.assert_close(y[row : row + 1], alone.logits, atol=1e-4, rtol=1e-4)
