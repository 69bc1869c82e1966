"""A sweep that a test kills: python sweep_worker.py FOLDER [seconds to sleep in each step]."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import peftfn as pf

CONFIGS = pf.grid(lr=[1e-3, 1e-2, 3e-2], seed=range(2))
STEPS, EVERY, SLOTS = 40, 5, 4


def run(folder: Path | None, wait: float = 0.0, configs: Any = CONFIGS, **more: Any) -> pf.Swept:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
    net = pf.adapt(model, {"weight": pf.LoRA(rank=2, dropout=0.1)})
    x = torch.randn(64, 8)
    y = x[:, :1] * x[:, 1:2]

    def data(c: Any, step: int) -> tuple[Tensor, Tensor]:
        time.sleep(wait)
        index = torch.randint(64, (16,), generator=torch.Generator().manual_seed(1000 * c["seed"] + step))
        return x[index], y[index]

    def loss(net: pf.Adapted, a: pf.Adapter, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (net.apply(a, batch[0]) - batch[1]).square().mean()

    def optimizer(c: Any) -> pf.steps.Step:
        return pf.steps.chain(
            pf.steps.clip(1.0), pf.steps.adamw(c["lr"]), pf.steps.scheduled(pf.steps.cosine(STEPS, warmup=4))
        )

    given: dict[str, Any] = {"steps": STEPS, "every": EVERY, "slots": SLOTS}
    return pf.sweep(
        configs, net, loss, data, optimizer, folder=folder, evaluate=lambda n, a: loss(n, a, (x, y)), **given | more
    )


if __name__ == "__main__":
    run(Path(sys.argv[1]), float(sys.argv[2]))
