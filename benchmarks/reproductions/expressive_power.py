"""From which rank on can a deep linear network become any other?"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

import peftfn as pf
from benchmarks.reproductions.claim import NO, PARTLY, YES, Claim, Json, table

SIZE, DEPTHS = 8, (1, 2, 4)
EXACT = 1e-6
"""A relative error at which we say that the target is met."""


def run(quick: bool, folder: Path) -> Json:
    size, depths, seeds, iterations = (4, (2,), 1, 100) if quick else (SIZE, DEPTHS, 3, 1000)
    out: Json = {"size": size, "error": {}}
    for depth in depths:
        need = math.ceil(size / depth)
        for rank in sorted({1, need // 2, need - 1, need} - {0}):
            each = [error(size, depth, rank, seed, iterations) for seed in range(seeds)]
            out["error"][f"{depth}, {rank}"] = [e for e, _ in each]
            out.setdefault("bound", {})[f"{depth}, {rank}"] = [b for _, b in each]
    return out


def error(size: int, depth: int, rank: int, seed: int, iterations: int) -> tuple[float, float]:
    """(relative error of W_L … W_1 adapted to a random target, the least that a change of rank rank·depth leaves)"""
    g = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(size, size, generator=g, dtype=torch.float64) / size**0.5

    model = nn.Sequential(*(nn.Linear(size, size, bias=False, dtype=torch.float64) for _ in range(depth)))
    for layer in model:
        layer.weight.data = draw()
    target, eye = draw(), torch.eye(size, dtype=torch.float64)
    net = pf.adapt(model.requires_grad_(False), {"weight": pf.LoRA(rank=rank)})
    a = net.init(seed=seed, dtype=torch.float64)
    given = [t.requires_grad_() for t in pf.leaves(a)]
    optimizer = torch.optim.LBFGS(
        given, max_iter=iterations, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def distance() -> Tensor:
        return (net.apply(a, eye) - target.mT).square().sum() / target.square().sum()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = distance()
        loss.backward()
        return loss

    optimizer.step(closure)
    singular = torch.linalg.svdvals(target.mT - model(eye))
    bound = singular[rank * depth :].square().sum() / target.square().sum()
    return float(distance().detach().sqrt()), float(bound.sqrt())


def found(figures: Json) -> tuple[dict[str, str], str]:
    size, rows, at, below = figures["size"], [], [], []
    for name, errors in figures["error"].items():
        depth, rank = map(int, name.split(", "))
        need = math.ceil(size / depth)
        bound = f"{max(figures['bound'][name]):.1e}"
        rows.append([depth, rank, need, f"{max(errors):.1e}", f"{min(errors):.1e}", bound])
        (at if rank >= need else below).append(errors)
    draws = [e for errors in at for e in errors]
    met = sum(e < EXACT for e in draws)
    verdicts = {
        f"at the threshold, training meets the target ({met} of {len(draws)} draws; error below {EXACT:g})": YES
        if met == len(draws)
        else PARTLY
        if met
        else NO,
        "below it, none": YES if all(min(e) > EXACT for e in below) else NO,
    }
    head = ["layers", "rank", "threshold", "largest error", "least", "the rank's own bound"]
    return verdicts, table(head, rows)


CLAIM = Claim(
    "How large a rank has to be",
    "Zeng and Lee, The Expressive Power of Low-Rank Adaptation, 2023, "
    "[arXiv:2310.17513](https://arxiv.org/abs/2310.17513)",
    "A network of L linear layers becomes any other linear map by LoRAs of rank ⌈R / L⌉, where R is the rank of the "
    "difference; below that it cannot.",
    "Random networks of 1, 2 and 4 layers of size 8, random targets (R = 8), three draws of each; LoRAs of each rank "
    "trained by L-BFGS in double precision through `net.apply`. The paper constructs the adapters; that a local search "
    "finds them is more than it claims. The bound is what the best change of rank L·rank leaves.",
    "The error that counts as none is ours. The record was there when “partly” became a verdict: before, one draw "
    "that fails made it “not reproduced”.",
    run,
    found,
)
