"""The best rate of LoRA against that of full fine-tuning, over ranks, and which layers it is for."""

from dataclasses import replace
from pathlib import Path

import peftfn as pf
from benchmarks.reproductions.claim import NO, PARTLY, YES, Claim, Json, table, task
from benchmarks.reproductions.learning_rates import brief
from peftfn.compare.methods import Recipe
from peftfn.compare.run import Settings, Training, trials
from peftfn.tools.summary import counts

ATTENTION, MLP = r"\d+\.(query|key|value|output)\.dense\.weight", r"\d+\.(intermediate|last\.output)\.dense\.weight"
RANKS = (1, 4, 16, 64)
FULL = "full"


def lora(rank: int, places: str = "matrices") -> Recipe:
    """As the article has it: α = 32, and so a scale of 32 / rank."""
    return Recipe(pf.LoRA(rank=rank, alpha=32), places)


WAYS = {
    FULL: Recipe(pf.Full()),
    **{f"LoRA, rank {r}": lora(r) for r in RANKS},
    "LoRA in attention, rank 9": lora(9, ATTENTION),
    "LoRA in MLPs, rank 7": lora(7, MLP),
}
"""The last two train about as many numbers as rank 4 everywhere."""


def run(quick: bool, folder: Path) -> Json:
    how, name = Settings(tuple(2.0**i for i in range(-13, -1)), seeds=2, slots=24), "characters"
    if quick:
        how, name = replace(how, rates=how.rates[4:6], seeds=1, steps=2), "digits"
    out, ready = {}, task(name)
    for way, recipe in WAYS.items():
        net = pf.adapt(ready.model, recipe.rules(ready.layers))
        done = Training(ready, how).sweep(net, folder / way)
        out[way] = brief({"trained": counts(net)[0], "trials": trials(done)})
    return out


def found(figures: Json) -> tuple[dict[str, str], str]:
    full = figures[FULL]["best"]
    rows = [
        [
            way, f"{r['trained']:,}", f"{100 * r['test']:.1f} ± {100 * r['spread']:.1f}", f"{r['best']:.2g}",
            f"{r['best'] / full:g}",
        ]
        for way, r in figures.items()
    ]  # fmt: skip
    ranks = [figures[f"LoRA, rank {r}"] for r in RANKS]
    ratios = [r["best"] / full for r in ranks]
    attention, mlp, everywhere = (figures[n] for n in (*list(WAYS)[-2:], "LoRA, rank 4"))
    below = [attention["test"] < other["test"] for other in (mlp, everywhere)]
    most = max(r["test"] for r in ranks)
    within = [5 <= x <= 20 for x in ratios]
    verdicts = {
        "the best rate of LoRA is about ten times that of full fine-tuning (5 to 20)": YES
        if all(within)
        else PARTLY
        if any(within)
        else NO,
        "it hardly depends on the rank (within a factor of 4)": YES if max(ratios) <= 4 * min(ratios) else NO,
        "the best LoRA reaches full fine-tuning (within a point)": YES
        if most >= figures[FULL]["test"] - 0.01
        else NO,
        "attention alone is worse than MLPs alone, and than all, at as many trained numbers": YES
        if all(below)
        else PARTLY
        if any(below)
        else NO,
    }  # fmt: skip
    return verdicts, table(["", "trained", "test accuracy, %", "best rate", "of full's"], rows)


CLAIM = Claim(
    "LoRA without regret",
    "Schulman et al., Thinking Machines, 2025, [LoRA Without Regret](https://thinkingmachines.ai/blog/lora/)",
    "On data that it has room for, LoRA at all layers learns as full fine-tuning does. Its best learning rate is about "
    "ten times full fine-tuning's (about fifteen in runs of less than a hundred steps), whatever the rank, with α = "
    "32. LoRA in attention alone is worse than in MLPs or everywhere, also at as many trained numbers.",
    "The language model of characters of the [comparison](comparison.md): from prose to Python code, 60 steps of 16 "
    "lines, AdamW with a cosine, rates from 2⁻¹³ to ¼, each rate of a row and each of two seeds in one `vmap`. The "
    "article has models of up to 8 billion parameters, constant rates and losses, where this has accuracies; full "
    "fine-tuning is of the same matrices, without embeddings and norms.",
    "5 to 20 is ours, around the article's ten and fifteen, as are the factor of 4 and the point. All stood before "
    "the figures.",
    run,
    found,
)
