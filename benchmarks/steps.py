"""Steps of optimizers as functions, against AdamW: as a function, and torch's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, row

PLAIN, TORCH = "steps.adamw", "torch.optim.AdamW"
RANK, SIZE = 16, 1024
S = pf.steps


def run(options: Options) -> list[Json]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE)).requires_grad_(False)
    net = pf.adapt(model, {"0.weight": pf.LoRA(rank=RANK, init_weights="random")})
    a, g = net.init(0), net.init(1)

    def update(step: S.Step) -> Callable[[], Any]:
        state = step.init(a)
        return lambda: S.apply(a, step.update(g, state, a)[0])

    leaves = [t.clone().requires_grad_() for leaf in a.values() for t in leaf.values()]
    for t, grad in zip(leaves, (t for leaf in g.values() for t in leaf.values()), strict=True):
        t.grad = grad
    ways: dict[str, Callable[[], Any]] = {
        "adamw": update(S.adamw(1e-3)),
        "lora_plus, then adamw": update(S.chain(S.adamw(1e-3), S.lora_plus(16.0))),
        "lora_fa, then adamw": update(S.chain(S.lora_fa(net), S.adamw(1e-3))),
        "riemannian, then adamw": update(S.chain(S.riemannian(net), S.adamw(1e-3))),
        "lora_pro, then adamw": update(S.chain(S.lora_pro(net), S.adamw(1e-3))),
        "lora_muon": update(S.lora_muon(net, 1e-3)),
        "lora_rite": update(S.lora_rite(net, 1e-3)),
        "loft": update(S.loft(net, 1e-3)),
    }
    others = {PLAIN: ways["adamw"], TORCH: partial(torch.optim.AdamW(leaves, lr=1e-3).step)}
    rows = []
    for name, way in ways.items():
        more = {TORCH: others[TORCH]} if name == "adamw" else others
        times = options.compare({OURS: way, **more}, at_least=0.03)
        rows.append(row(f"steps.{name}: LoRA r{RANK} at one {SIZE}×{SIZE} weight", times))
    return rows
