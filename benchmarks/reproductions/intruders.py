"""Singular vectors that an adapter adds to a weight, and what shrinking them costs and saves."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import peftfn as pf
from benchmarks.reproductions.claim import NO, PARTLY, YES, Claim, Json, table, task
from peftfn.compare.methods import Recipe
from peftfn.compare.run import Settings, Training

RANK = 4
REDUCED = f"LoRA, rank {RANK}"
WAYS: dict[str, pf.Method] = {
    "full": pf.Full(),
    "LoRA, rank 1": pf.LoRA(rank=1),
    REDUCED: pf.LoRA(rank=RANK),
    "LoRA, rank 16": pf.LoRA(rank=16),
}
KEEP = (1.0, 0.75, 0.5, 0.25, 0.0)
SHRUNK = 0.5
"""What the verdicts are about. It was chosen before anything was measured."""


def run(quick: bool, folder: Path) -> Json:
    how, name = Settings((1e-3, 3e-3, 1e-2, 3e-2), seeds=2, steps=150, slots=8), "characters"
    if quick:
        how, name = replace(how, rates=(1e-2, 3e-2), seeds=1, steps=3), "digits"
    ready = task(name)
    training, out = Training(ready, how), {"own": ready.base()[1], "ways": {}, "reduced": []}
    for way, method in WAYS.items():
        net = pf.adapt(ready.model, Recipe(method).rules(ready.layers))
        done = training.sweep(net, folder / way)
        rows = [
            {"lr": t.config["lr"], "seed": t.config["seed"], **t.history[-1], "intruders": many(net, done.adapter(t))}
            for t in done.trials
            if t.status == "done"
        ]
        out["ways"][way] = rows
        if way == REDUCED:
            best = done.best("validation", "max")
            out["reduced"] = [{"keep": k, **reduced(training, net, done.adapter(best), k)} for k in KEEP]
    return out


def many(net: pf.Adapted, adapter: pf.Adapter) -> int:
    """Intruders among the ten largest singular vectors of each matrix, ε = 0.5."""
    return sum(pf.intruders(net, adapter).values())


@torch.no_grad()
def reduced(training: Training, net: pf.Adapted, adapter: pf.Adapter, keep: float) -> dict[str, float]:
    if keep < 1:
        net, adapter = pf.reduce_intruders(net, adapter, keep=keep, rank=RANK + 10)  # exact: at most ten at a site
    return {k: float(v) for k, v in training.evaluate(net, adapter).items()}


def _mean_at(trials: list[Json], lr: float, key: str) -> float:
    return _mean(t[key] for t in trials if t["lr"] == lr)


def found(figures: Json) -> tuple[dict[str, str], str]:
    rows, best = [], {}
    for way, trials in figures["ways"].items():
        rates = sorted({t["lr"] for t in trials})
        mean = partial(_mean_at, trials)
        best[way] = max(rates, key=partial(mean, key="validation"))
        for lr in rates:
            mark = "**" if lr == best[way] else ""
            rise = mean(lr, "own") - figures["own"]
            rows.append([way, f"{mark}{lr:g}{mark}", f"{100 * mean(lr, 'test'):.1f}", f"{rise:+.3f}",
                         f"{mean(lr, 'intruders'):.1f}"])  # fmt: skip
    at_best = {w: _mean(t["intruders"] for t in ts if t["lr"] == best[w]) for w, ts in figures["ways"].items()}
    loras = [n for w, n in at_best.items() if w != "full"]
    whole, shrunk = figures["reduced"][0], next(r for r in figures["reduced"] if r["keep"] == SHRUNK)
    rise = whole["own"] - figures["own"]
    saved = (whole["own"] - shrunk["own"]) / rise if rise > 0 else 0.0
    lost = whole["test"] - shrunk["test"]
    verdicts = {
        "LoRA makes more intruders than full fine-tuning, each at its best rate": YES
        if min(loras) > at_best["full"]
        else PARTLY
        if max(loras) > at_best["full"]
        else NO,
        "full fine-tuning makes none at its best rate": YES if at_best["full"] == 0 else NO,
        f"halving the intruders forgets less (by {100 * saved:.0f} % of the rise)": YES if saved > 0 else NO,
        f"and costs little accuracy (less than a point; here {100 * lost:.1f})": YES if lost < 0.01 else NO,
    }
    less = [
        [f"{r['keep']:g}", f"{100 * r['test']:.1f}", f"{r['own'] - figures['own']:+.3f}"] for r in figures["reduced"]
    ]
    text = table(["", "rate (**best**)", "test accuracy, %", "forgotten", "intruders"], rows)
    kept = f"{REDUCED}, its best run alone: kept of each intruder"
    return verdicts, text + "\n" + table([kept, "test accuracy, %", "forgotten"], less)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


CLAIM = Claim(
    "Intruder dimensions",
    "Shuttleworth et al., 2024, [arXiv:2410.21228](https://arxiv.org/abs/2410.21228)",
    "LoRA gives weights large singular vectors that the base's weights do not have, and full fine-tuning does not. "
    "Forgetting sits there: shrinking them restores much of what was forgotten, at little cost for the new task.",
    "The language model of characters of the [comparison](comparison.md), from prose to code, 150 steps, four rates "
    "and two seeds at once. An intruder is one of the ten largest left singular vectors of an adapted matrix whose "
    "cosine with all of the base's is below 0.5; a total over the twelve matrices. Forgotten: how much the loss of the "
    "prose rises. Matrices of 64 columns have much less room than a language model's.",
    "0.5 and a point are ours, and stood before the figures, as did that full fine-tuning makes none at its best "
    "rate. The other parts that are kept were measured too and decide nothing, 0.75 among them, which is PEFT's "
    "default: after the figures were seen, this page once judged by it.",
    run,
    found,
)
