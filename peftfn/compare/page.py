"""A page from the records of a comparison. The words stand here; every figure comes from the records."""

import statistics
import textwrap
from collections.abc import Sequence

from peftfn.compare.choose import chosen, signed
from peftfn.compare.run import Json, best, forgotten, mean_test, near

HEAD = """\
# A comparison of methods

Made by `peftfn compare` from its records; do not edit. Every method is shown at **its own best learning rate**, chosen
by the mean accuracy over the seeds on validation examples, from one grid for all; the accuracy is that on test
examples, which chose nothing. All rates and seeds of a method train in one [sweep](sweep.md). The base and its
classifier (of texts: on 40 examples) are trained before, and frozen: the first line of a table is what they reach
without an adapter.

These are small tasks and few steps: they show how to compare, and what rates methods want, more than which method is
best. Differences within the spreads say nothing. A rate at an end of the grid (↧, ↥) may not be the best there is.

**Forgotten** is how much the loss rises on something that the base can do and no adapter sees: its own task. **λ_max**
is the largest eigenvalue of the Hessian of the training loss where the adapter starts, found by products with the
Hessian (forward-mode derivatives of gradients, through `net.apply`); for gradient descent, 2/λ_max would be the largest
stable rate. [Reproductions](reproductions.md#learning-rates-matter) compares it with the best rates.
"""
PICTURE = "comparison.png"
BUSY = 1.5
"""Beyond this load average for each thread of the comparison, something else ran too."""


def page(records: Sequence[Json], picture: bool = True) -> str:
    """Markdown of records: a table for each task, after what they have in common.

    Args:
        picture: whether `PICTURE` is beside the page.
    """
    if not records:
        return HEAD + "\nThere are no records yet.\n"
    parts = [HEAD, chosen(records)]
    if picture:
        parts.append(f"![Accuracy against trained numbers, and the methods that none beats in both]({PICTURE})\n")
    for task in dict.fromkeys(r["task"] for r in records):
        parts.append(_task([r for r in records if r["task"] == task]))
    return "\n".join(parts)


def _task(records: Sequence[Json]) -> str:
    first, how, n = records[0], records[0]["settings"], records[0]["examples"]
    rates = how["rates"]
    title = first["title"]
    about = (
        f"{title[0].upper()}{title[1:]}: {n['train']} examples to train on, {n['validation']} to choose the rate, "
        f"{n['test']} to test. {how['steps']} steps of {how['batch']} examples, AdamW, cosine after a warm-up, "
        f"{how['seeds']} seeds; {len(rates)} rates from {min(rates):g} to {max(rates):g}."
    )
    lines = [
        f"## {first['task'].capitalize()}",
        "",
        _wrapped(about),
        "",
        "| method | test accuracy, % | forgotten | best rate | rates within 2 points | λ_max | trained | file, KiB "
        "| s a step | MiB |",
        "|" + " --- |" * 10,
        f"| none (the base) | {100 * first['base']:.1f} | 0 | | | | 0 | | | |",
    ]
    lines += [_row(r) for r in sorted(records, key=lambda r: -mean_test(r))]
    dates, environments = sorted({r["environment"]["date"] for r in records}), [r["environment"] for r in records]
    loads = [e["load_average"] for e in environments]
    e = environments[0]
    below = (
        f"The base's own task: {first['own']['title']}; its loss is {first['own']['base']:.2f}. "
        "± is the standard deviation over the seeds. A step is the gradient of one adapter alone, by autograd; MiB is "
        f"the peak of the tensors that it makes. {' and '.join(dates)}, peftfn {e['peftfn']}, torch {e['torch']}, "
        f"Python {e['python']}, {e['machine']} with {e['cpu_capability']}, {e['threads']} "
        f"thread{'s' * (e['threads'] > 1)}, load average {' to '.join(map(str, sorted({min(loads), max(loads)})))}. "
        f"Seconds with ~ are rough: other work was running (a load average above {BUSY:g} a thread)."
    )
    return "\n".join([*lines, "", _wrapped(below), ""])


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


def _row(record: Json) -> str:
    found, rates = best(record), record["settings"]["rates"]
    if found is None:
        cells = ["diverged at every rate", "", "", ""]
    else:
        lr, trials = found
        tests = [100 * t["test"] for t in trials]
        spread = f" ± {statistics.stdev(tests):.1f}" if len(tests) > 1 else ""
        edge = "↧" if lr == min(rates) else "↥" if lr == max(rates) else ""
        cells = [f"{statistics.mean(tests):.1f}{spread}", signed(forgotten(record)), f"{lr:g}{edge}"]
        cells.append(f"{near(record)} of {len(rates)}")
    seconds, memory = record["seconds_a_step_alone"], record["peak_bytes_alone"] / 2**20
    rough = "~" if record["environment"]["load_average"] > BUSY * record["environment"]["threads"] else ""
    curvature = record["sharpness"]
    cells.append(f"{curvature:.0f}" if curvature >= 10 else f"{curvature:.2g}")
    cells += [f"{record['trained']:,}", f"{record['bytes'] / 1024:.0f}", f"{rough}{seconds:.3f}", f"{memory:.1f}"]
    return f"| {record['method']} | " + " | ".join(cells) + " |"
