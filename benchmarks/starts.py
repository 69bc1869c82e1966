"""Starting points, and ranks to choose, against the passes over the data that they are made of."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.helpers import find_kappa_target_modules
from torch import Tensor, nn

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, row

FORWARD, GRADIENT, DECOMPOSED, THEIRS = "forward passes", "gradients", "one decomposition", "PEFT"
RANK, SIZE, BATCHES, TOKENS = 16, 1024, 4, 512


def square(out: Tensor, batch: Any) -> Tensor:
    return out.square().mean()


def run(options: Options) -> list[Json]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE)).requires_grad_(False)
    net = pf.adapt(model, {"2.weight": pf.LoRA(rank=RANK)})
    decay = torch.logspace(0, -2, SIZE)
    batches = [torch.randn(TOKENS, SIZE) * decay for _ in range(BATCHES)]
    weight = model[2].weight

    def forward() -> None:
        with torch.no_grad():
            for x in batches:
                model(x)

    def gradients() -> None:
        w = weight.detach().clone().requires_grad_()
        for x in batches:
            y = nn.functional.linear(torch.tanh(model[0](x)), w, model[2].bias)
            torch.autograd.grad(square(y, x), w)

    def quantise(w: Tensor) -> Tensor:
        return (w * 64).round() / 64

    decomposed = partial(torch.linalg.svd, weight, full_matrices=False)
    cases: dict[str, tuple[Callable[[], Any], dict[str, Callable[[], Any]]]] = {
        "starts.orthogonal": (partial(pf.starts.orthogonal, net), {DECOMPOSED: decomposed}),
        "starts.eva": (partial(pf.starts.eva, net, batches), {FORWARD: forward, DECOMPOSED: decomposed}),
        "starts.corda": (partial(pf.starts.corda, net, batches), {FORWARD: forward, DECOMPOSED: decomposed}),
        "starts.lora_ga": (
            partial(pf.starts.lora_ga, net, batches, loss=square),
            {GRADIENT: gradients, DECOMPOSED: decomposed},
        ),
        "starts.lora_one": (
            partial(pf.starts.lora_one, net, batches, loss=square),
            {GRADIENT: gradients, DECOMPOSED: decomposed},
        ),
        "starts.loftq": (partial(pf.starts.loftq, net, quantise), {DECOMPOSED: decomposed}),
        "suggest.gradient_ranks": (
            partial(pf.suggest.gradient_ranks, net, batches, loss=square),
            {GRADIENT: gradients, DECOMPOSED: decomposed},
        ),
        "suggest.gradient_ranks, sketch=32": (
            partial(pf.suggest.gradient_ranks, net, batches, loss=square, sketch=32),
            {GRADIENT: gradients, DECOMPOSED: decomposed},
        ),
        "suggest.weight_ranks": (partial(pf.suggest.weight_ranks, net), {DECOMPOSED: decomposed}),
        "suggest.targets, of two weights": (
            partial(pf.suggest.targets, model, pf.LoRA(rank=RANK)),
            {THEIRS: partial(find_kappa_target_modules, model, show_progress=False), DECOMPOSED: decomposed},
        ),
    }
    rows = []
    for name, (ours, others) in cases.items():
        quick = name in ("starts.orthogonal", "suggest.gradient_ranks, sketch=32")
        times = options.compare(
            {OURS: ours, **others}, repeats=options.repeats if quick else min(options.repeats, 7), warmup=1
        )
        rows.append(row(f"{name}: LoRA r{RANK} at one {SIZE}×{SIZE} weight, {BATCHES} batches of {TOKENS}", times))
    return rows
