"""A weight method of one's own: two functions and its fields. The laws of peftfn.testing check it."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from base import batch, model

import peftfn as pf
from peftfn.fields import PositiveInt
from peftfn.testing import check_method


@dataclass(frozen=True)
class Bands(pf.Weight):
    """W + D with D constant in `rows` × `columns` equal bands: one trained number for each, [rows, columns]."""

    cases: ClassVar = ({}, {"rows": 3})

    rows: PositiveInt = 2
    columns: PositiveInt = 2

    def init(self, rng, w):
        return {"d": rng.zeros(self.rows, self.columns)}

    def delta(self, p, w):
        def band(count, size):  # [size]: the band of each row or column
            return torch.arange(size, device=w.device) * count // size

        return p["d"][band(self.rows, w.shape[0])][:, band(self.columns, w.shape[1])]


check_method(Bands(rows=3))  # every law, at every kind of layer

net = pf.adapt(model, {r"(up|down|gate|q|k|v|o)_proj": Bands(rows=16, columns=16)})
a = net.init(seed=0)
optimizer = torch.optim.AdamW([t.requires_grad_() for t in pf.leaves(a)], lr=1e-2)
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
pf.save("bands", net, a)
net, a = pf.load("bands", model)  # the class must be imported; nothing else
