"""What a user writes, as a type checker sees it: the lines that say so are errors, and no others."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import peftfn as pf
from peftfn import merging, optim, steps
from peftfn.kernels import use
from peftfn.testing import check_method

model = nn.Sequential(nn.Linear(8, 4))
net: pf.Adapted = pf.adapt(model, {"0.weight": pf.LoRA(rank=2, alpha=4.0)})
a: pf.Adapter = net.init(seed=0)
leaf: Tensor = a["0.weight"]["a"]
merged: Mapping[str, Tensor] = net.merge(a)
many = pf.stack([a, net.init(1)])
y = net.mixed(many, [0, 1], torch.randn(2, 8))
m: nn.Module = pf.as_module(net, a)
back: pf.Adapter = pf.adapter_of(m)
pf.save("adapter", net, a, format="peft")
loaded = pf.load("adapter", model)
again, b = loaded
step = steps.chain(steps.adamw(1e-3))
state = step.init(a)
groups = optim.lora_plus(m, lr=1e-3, ratio=16)
both, c = merging.linear([(net, a), (net, b)], [0.5, 0.5])
with use("torch"):
    net.apply(a, torch.randn(2, 8))


@dataclass(frozen=True)
class Shift(pf.Weight):
    scale: float = 1.0

    def init(self, rng: pf.Rng, w: Tensor) -> dict[str, Tensor]:
        return {"u": rng.zeros(w.shape[0])}

    def delta(self, p: dict[str, Tensor], w: Tensor) -> Tensor:
        return self.scale * p["u"][:, None] * torch.ones_like(w)


check_method(Shift())
pf.adapt(model, {"0": Shift()}).init("zero")  # an error: no seed
pf.LoRA(rnk=3)  # an error: no field
