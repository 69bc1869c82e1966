"""A picture of a comparison: accuracy against trained numbers."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from peftfn.compare.choose import front, spread
from peftfn.compare.run import Json, best, mean_test
from peftfn.demo.report import COLOURS


def pareto(records: Sequence[Json], path: Path) -> bool:
    """Draw each task's methods, and the line of those that none beats in both.

    Returns:
        Whether there is a picture now: not where no task has several methods, and not without matplotlib.
    """
    names = [r["task"] for r in records if best(r)]
    tasks = [task for task in dict.fromkeys(names) if names.count(task) > 1]
    if not tasks or find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(tasks), 4.2), layout="constrained")
    for axis, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        mine = [r for r in records if r["task"] == task and best(r)]
        best_of = front(mine)
        axis.plot(*_points(best_of), drawstyle="steps-post", color=COLOURS[0], linewidth=1)
        for kept in (True, False):
            shown = [r for r in mine if (r in best_of) == kept]
            axis.errorbar(
                *_points(shown), yerr=[100 * spread(r) for r in shown], fmt="o", color=COLOURS[1 if kept else 2],
                elinewidth=1, markersize=4,
            )  # fmt: skip
        for r, x, y in zip(mine, *_points(mine), strict=True):
            axis.annotate(r["method"], (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axis.axhline(100 * mine[0]["base"], color=COLOURS[0], linewidth=1, linestyle=":")
        axis.set_xscale("log")
        axis.set_title(f"{task}; dotted: the base", loc="left", fontsize=10)
        axis.set(xlabel="trained numbers", ylabel="test accuracy, %")
    figure.savefig(path, dpi=120)
    return True


def _points(records: Sequence[Json]) -> tuple[list[int], list[float]]:
    return [r["trained"] for r in records], [100 * mean_test(r) for r in records]
