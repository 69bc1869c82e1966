"""What a run found: a table in the terminal, a plot, and the same figures as JSON."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from peftfn.demo.data import Task

COLOURS = ["#4d4d4d", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]  # Okabe and Ito: told apart by everyone
MARKERS = ["s", "o", "^", "D", "v", "P"]
SMOOTH = 10  # steps


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


def plot(path: Path, rows: list[Row]) -> None:
    """A line of panels for each task: accuracy against trainable parameters, and the loss while training."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatterSciNotation, MaxNLocator

    tasks = list({row.task.name: row.task for row in rows}.values())
    methods = list(dict.fromkeys(row.method for row in rows))
    style = {m: {"color": COLOURS[i % 6], "marker": MARKERS[i % 6]} for i, m in enumerate(methods)}
    figure = Figure(figsize=(9.6, 3.6 * len(tasks) + 0.6), layout="constrained")
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    handles: dict[str, Any] = {}
    for (left, right), task in zip(axes, tasks, strict=True):
        mine = [row for row in rows if row.task is task]
        base, window = mine[0], min(SMOOTH, len(mine[-1].losses))
        left.axhline(base.mean, color=COLOURS[0], linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for row in mine:
            row_style = style[row.method]
            look = {"linestyle": "none", "markersize": 8, "capsize": 4, **row_style}
            drawn = left.errorbar(row.parameters, row.mean, yerr=row.spread, **look)
            handles.setdefault(row.method, drawn)
            loss = row.losses.mean(1).unfold(0, window, 1).mean(-1)
            dashes = (0, (4, 3)) if row is base else "solid"
            right.plot(
                range(window, window + len(loss)), loss, color=row_style["color"], linewidth=1.8, linestyle=dashes
            )
        left.set_xscale("log")
        left.margins(x=0.12, y=0.15)
        left.xaxis.set_major_formatter(LogFormatterSciNotation())
        left.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        size = f"{len(task.labels)} classes, {len(task.test)} test texts"
        left.set_title(f"{task.title} ({size})", loc="left", fontsize=10)
        left.set(xlabel="trainable parameters", ylabel="accuracy (%)")
        right.set_title(f"training loss, mean of {window} steps and all seeds", loc="left", fontsize=10)
        right.set(xlabel="step", ylabel="cross-entropy")
        for axis in (left, right):
            axis.grid(color="#e5e5e5", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=len(methods), frameon=False)
    figure.savefig(path, dpi=160)
