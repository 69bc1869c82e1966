"""Do weights change their direction and their magnitude together?"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

import peftfn as pf
from benchmarks.reproductions.claim import NO, YES, Claim, Json, table, task
from peftfn.compare.methods import Recipe
from peftfn.compare.run import Settings, Training

WAYS: dict[str, pf.Method] = {"full": pf.Full(), "LoRA": pf.LoRA(rank=4), "DoRA": pf.DoRA(rank=4)}
PAPER = {"full": -0.62, "LoRA": 0.83, "DoRA": -0.31}
PLACES = r"\d+\.(query|value)\.dense\.weight"
CHECKPOINTS = 4


def run(quick: bool, folder: Path) -> Json:
    how, name = Settings((1e-3, 3e-3, 1e-2, 3e-2), seeds=3, steps=160, slots=12), "characters"
    if quick:
        how, name = Settings((1e-2, 3e-2), seeds=1, steps=4, slots=2), "digits"
    training, out = Training(task(name), how), dict[str, Any]()
    for way, method in WAYS.items():
        net = pf.adapt(training.ready.model, Recipe(method, PLACES).rules(training.ready.layers))
        saved, right = checkpoints(training, net)
        lr = max(how.rates, key=lambda lr: sum(r for (at, _), r in right.items() if at == lr))
        points = [
            [[*moved(net, stack, i, site), site] for site in net.plan for stack in saved]
            for i, (at, _) in enumerate(right)
            if at == lr
        ]
        out[way] = {"best": lr, "points": points, "right": sum(r for (at, _), r in right.items() if at == lr)}
        out[way]["right"] /= how.seeds
    return out


def checkpoints(training: Training, net: pf.Adapted) -> tuple[list[pf.Adapter], dict[tuple[float, int], float]]:
    """(stacks at equal steps through a training of all rates and seeds, (rate, seed) ↦ validation accuracy)"""
    how, saved = training.how, []
    configs = pf.grid(lr=how.rates, seed=range(how.seeds))
    stack = pf.stack([net.init(seed=c["seed"]) for c in configs])
    schedule = pf.steps.scheduled(pf.steps.cosine(how.steps, warmup=max(1, how.steps // 20)))

    def make(lr: Any) -> pf.steps.Step:
        return pf.steps.chain(pf.steps.clip(1.0), pf.steps.adamw(lr), schedule)

    step = pf.steps.stacked(make, lr=[c["lr"] for c in configs])
    state = step.init(stack)
    each = vmap(torch.func.grad(lambda a, b: training.loss(net, a, b)))
    for i in range(how.steps):
        batches = [training.data(c, i) for c in configs]
        g = each(stack, tuple(torch.stack(ts) for ts in zip(*batches, strict=True)))
        updates, state = step.update(g, state, stack)
        stack = pf.steps.apply(stack, updates)
        if (i + 1) % (how.steps // CHECKPOINTS) == 0:
            saved.append(stack)
    with torch.no_grad():
        right = vmap(lambda a: training.evaluate(net, a)["validation"])(stack).tolist()
    return saved, {(c["lr"], c["seed"]): r for c, r in zip(configs, right, strict=True)}


def moved(net: pf.Adapted, stack: pf.Adapter, i: int, site: str) -> tuple[float, float]:
    """(ΔD, ΔM): the mean of 1 − cos over a weight's rows, and of the change of their norms."""
    w = net.weights[site]
    new: Tensor = w + net.delta(pf.unstack(stack)[i])[site]
    direction = 1 - torch.cosine_similarity(w, new, dim=1)
    return float(direction.mean()), float((new.norm(dim=1) - w.norm(dim=1)).abs().mean())


def correlation(points: list[list[list[float]]]) -> float:
    """Of ΔD with ΔM over layers and checkpoints, the mean over the seeds."""
    each = [torch.corrcoef(torch.tensor([[p[0] for p in ps], [p[1] for p in ps]]))[0, 1] for ps in points]
    return float(torch.stack(each).mean())


def found(figures: Json) -> tuple[dict[str, str], str]:
    ours = {way: correlation(r["points"]) for way, r in figures.items()}
    rows = [
        [way, f"{PAPER[way]:+.2f}", f"{ours[way]:+.2f}", f"{r['best']:g}", f"{100 * r['right']:.1f}"]
        for way, r in figures.items()
    ]
    verdicts = {
        "LoRA changes both together (a correlation above 0.5)": YES if ours["LoRA"] > 0.5 else NO,
        "full fine-tuning does not (below 0)": YES if ours["full"] < 0 else NO,
        "DoRA does not (below 0)": YES if ours["DoRA"] < 0 else NO,
        "DoRA is nearer to full fine-tuning than LoRA is": YES
        if abs(ours["DoRA"] - ours["full"]) < abs(ours["LoRA"] - ours["full"])
        else NO,
    }
    head = ["", "the paper's correlation", "ours", "best rate", "validation accuracy, %"]
    return verdicts, table(head, rows)


CLAIM = Claim(
    "Direction and magnitude",
    "Liu et al., DoRA, 2024, [arXiv:2402.09353](https://arxiv.org/abs/2402.09353)",
    "Over layers and checkpoints, LoRA's changes of a weight's direction and of its magnitude go together (a "
    "correlation of 0.83); in full fine-tuning they do not (−0.62), nor in DoRA (−0.31).",
    "The query and value matrices of the language model of characters of the [comparison](comparison.md), four "
    "checkpoints of 160 steps with the cosine of all of them, rank 4, each at the best of four rates, three seeds, all "
    "at once. ΔD is the mean of 1 − cos over the rows of a weight, ΔM that of the change of their norms. The paper has "
    "VL-BART with its twelve layers on four tasks; here are two layers.",
    "0.5 and 0 are ours, between the paper's values, and stood before the figures.",
    run,
    found,
)
