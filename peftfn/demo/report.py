"""What a run found: a table in the terminal, a plot, and the same figures as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from peftfn.demo.data import Task

COLOURS = ["#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]  # Okabe and Ito: told apart by everyone


@dataclass(frozen=True)
class Row:
    """One method on one task."""

    task: Task
    method: str
    parameters: int
    accuracy: Tensor  # [seeds]
    seconds: float  # a step of all seeds together
    losses: Tensor  # [steps, seeds], on the same batches for every method

    @property
    def mean(self) -> float:
        return 100 * float(self.accuracy.mean())

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; zero if there is one seed."""
        return 100 * float(self.accuracy.std()) if len(self.accuracy) > 1 else 0.0


def table(rows: list[Row]) -> Table:
    seeds = len(rows[0].accuracy)
    out = Table(title=f"held-out accuracy, mean ± std over {seeds} seeds", title_justify="left")
    out.add_column("task")
    out.add_column("method")
    for name in ("trainable", "accuracy %", "s/step"):
        out.add_column(name, justify="right")
    last = None
    for row in rows:
        if row.task is not last:
            out.add_section()
        name = "" if row.task is last else row.task.name
        accuracy = f"{row.mean:.1f} ± {row.spread:.1f}"
        out.add_row(name, row.method, f"{row.parameters:,}", accuracy, f"{row.seconds:.3f}")
        last = row.task
    return out


def save(path: Path, rows: list[Row], facts: Mapping[str, Any]) -> None:
    results = [
        {
            "task": r.task.name,
            "method": r.method,
            "parameters": r.parameters,
            "accuracy": [round(x, 6) for x in r.accuracy.tolist()],
            "seconds_per_step": r.seconds,
            "loss": [round(x, 6) for x in r.losses.mean(1).tolist()],
        }
        for r in rows
    ]
    path.write_text(json.dumps({**facts, "torch": torch.__version__, "results": results}, indent=2) + "\n")


def plot(path: Path, rows: list[Row], facts: Mapping[str, Any]) -> None:
    """The error of each method on each task; a sweep that trained in one run; the time of a mixed batch."""
    from matplotlib.figure import Figure

    tasks = list({row.task.name: row.task for row in rows}.values())
    figure = Figure(figsize=(9.6, 7.6), layout="constrained")
    (*errors, sweep, served) = figure.subplots(2, 2).flat
    for axis, task in zip(errors, tasks, strict=True):
        _errors(axis, [row for row in rows if row.task is task])
    swept = facts["sweep"]
    wrong = [100 * (1 - s["accuracy"]) for s in swept]
    sweep.plot([s["rate"] for s in swept], wrong, "v-", color=COLOURS[4])
    sweep.set_xscale("log")
    sweep.set_title(f"{len(swept)} LoRAs, {len(swept)} learning rates, one run", loc="left", fontsize=10)
    sweep.set(xlabel="learning rate", ylabel=f"error on {tasks[0].name} (%)", ylim=(0, 1.1 * max(wrong)))
    many = facts["served"]
    for key, name, look in (("calls", "a call for each row", "s--"), ("one_call", "one call for all rows", "o-")):
        milliseconds = [1000 * s[key] for s in many]
        served.plot([s["adapters"] for s in many], milliseconds, look, label=name, color=COLOURS[key == "one_call"])
    served.set_title("a batch whose rows all have another adapter", loc="left", fontsize=10)
    served.set(xlabel="rows = adapters, of four methods", ylabel="time (ms)", xlim=(0, None), ylim=(0, None))
    served.legend(frameon=False)
    for axis in (*errors, sweep, served):
        axis.grid(color="#e5e5e5", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(caption(facts), fontsize=8, x=0.01, ha="left")
    figure.savefig(path, dpi=160)


def _errors(axis: Any, rows: list[Row]) -> None:
    """A bar for each method, from zero, with the trainable parameters next to its name."""
    task, methods = rows[0].task, [f"{r.method}\n{_short(r.parameters)}" for r in rows]
    height = [100 - r.mean for r in rows]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(rows))]
    axis.bar(methods, height, yerr=[r.spread for r in rows], color=colours, width=0.6, capsize=4)
    axis.set_title(f"{task.title} ({len(task.labels)} classes, {len(task.test)} test texts)", loc="left", fontsize=10)
    axis.set(ylabel="error (%)", ylim=(0, 1.2 * max(height)))


def _short(n: int) -> str:
    return f"{n / 1000:.0f} k" if n >= 1000 else str(n)


def caption(facts: Mapping[str, Any]) -> str:
    """What the picture shows, for those who see it alone."""
    rates = ", ".join(f"{name} {lr:g}" for name, lr in facts["rates"].items())
    steps = ", ".join(f"{name} {n}" for name, n in facts["steps"].items())
    text = (
        f"Top: mean of {facts['seeds']} seeds, which train together in one vmapped run; whiskers are ± one standard "
        f"deviation; under each method, its trainable parameters. Steps: {steps}. Learning rates: {rates}. Bottom "
        "left: LoRA, with the same seed and batches at each rate. Bottom right: the whole encoder, the fastest of 9 "
        f"calls on {facts['threads']} thread{'s' * (facts['threads'] > 1)}; the rows have trained adapters of four "
        "methods."
    )
    return fill(text, 140)
