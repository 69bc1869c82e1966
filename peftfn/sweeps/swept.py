"""What a sweep found: records, a table, a plot, and the adapters."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftfn.core.plan import Adapter
from peftfn.formats.files import write
from peftfn.net.net import Adapted
from peftfn.sweeps.store import Store
from peftfn.sweeps.trial import Mode, Trial, sign_of


@dataclass(frozen=True, repr=False)
class Swept:
    """What `sweep` returns.

    Args:
        trials: a `Trial` for each configuration, in their order.
        nets: the net of each.
        store: where their tensors are.
        fresh: name → what makes a fresh run's tensors, which say how to read a file's.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 1)), {"0.weight": pf.LoRA(rank=2)})
        data, loss = lambda c, step: torch.ones(4, 8), lambda net, a, x: net.apply(a, x).square().mean()
        done = pf.sweep(pf.grid(lr=[1e-3, 1e-2]), net, loss, data, lambda c: pf.steps.sgd(c["lr"]), steps=5)
        print(done.table())
        best = done.best("loss")
        a = done.adapter(best)
    """

    trials: tuple[Trial, ...]
    nets: Mapping[str, Adapted]
    store: Store
    fresh: Mapping[str, Callable[[], dict[str, Any]]]

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for t in self.trials:
            counts[t.status] = counts.get(t.status, 0) + 1
        return f"{len(self.trials)} configurations: " + ", ".join(f"{n} {s}" for s, n in counts.items())

    def records(self) -> list[dict[str, Any]]:
        """Return the sweep as flat dicts, for a table or a data frame.

        Returns:
            For each configuration its fields, its status, steps, seconds, and the last row of its history.
        """
        return [
            {
                **t.config,
                "status": t.status,
                "steps": t.step,
                "seconds": t.seconds,
                "reason": t.reason,
                **{k: v for k, v in (t.history[-1] if t.history else {}).items() if k != "step"},
            }
            for t in self.trials
        ]

    def table(self) -> str:
        """Return the records as a table.

        Returns:
            Markdown.
        """
        rows = self.records()
        names = [n for n in dict.fromkeys(n for r in rows for n in r) if any(r.get(n) not in ("", None) for r in rows)]
        lines = [names, ["---"] * len(names), *[[_cell(r.get(n)) for n in names] for r in rows]]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"

    def best(self, metric: str, mode: Mode = "min") -> Trial:
        """Return the trial with the best last value of a metric.

        Args:
            metric: "loss", or a name that `evaluate` returns ("value" if it returns a number).
            mode: which is better, "min" or "max".

        Returns:
            A `Trial` that did not diverge.

        Raises:
            ValueError: there is none.
        """
        sign = sign_of(mode)
        found = [(sign * v, i) for i, t in enumerate(self.trials) if (v := _last(t, metric)) is not None]
        if not found:
            raise ValueError(f"best: no configuration that did not diverge has a {metric!r}")
        return self.trials[min(found)[1]]

    def net(self, trial: Trial) -> Adapted:
        """Return the net of a trial.

        Returns:
            An `Adapted`, shared by the trials of its rules.
        """
        return self.nets[trial.name]

    def adapter(self, trial: Trial) -> Adapter:
        """Return the adapter of a trial, as its last row left it.

        Returns:
            An adapter of its net.

        Raises:
            ValueError: the trial has not begun, or has diverged.
        """
        if trial.status in ("waiting", "diverged"):
            raise ValueError(f"{dict(trial.config)} is {trial.status}: it has no adapter")
        adapter: Adapter = self.store.tensors(trial, self.fresh[trial.name]())["adapter"]
        return adapter

    def save(self, path: str | Path) -> None:
        """Write the trials, with their histories, as JSON. What is not finite is null."""
        trials = [{k: v for k, v in vars(t).items() if k != "window"} for t in self.trials]
        write(Path(path), json.dumps(_finite(trials), indent=1) + "\n")

    def plot(self, path: str | Path, metric: str = "loss", x: str = "lr") -> None:
        """Draw every history, and the last values against a field of the configurations.

        Args:
            path: the picture's file.
            metric: as for `best`.
            x: a field with numbers.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: no configuration has the field.
        """
        try:
            from matplotlib import colormaps
            from matplotlib.figure import Figure
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError("plot needs matplotlib: pip install matplotlib") from e
        shown = [t for t in self.trials if isinstance(t.config.get(x), int | float)]
        if not shown:
            raise ValueError(f"plot: no configuration has a number {x!r}; they have {list(self.trials[0].config)}")
        values = sorted({float(t.config[x]) for t in shown})
        colours = {v: colormaps["viridis"](i / max(1, len(values) - 1) * 0.95) for i, v in enumerate(values)}
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for t in shown:
            rows, colour = [r for r in t.history if metric in r], colours[float(t.config[x])]
            left.plot([r["step"] for r in rows], [r[metric] for r in rows], color=colour, linewidth=1)
            if (last := _last(t, metric)) is not None:
                right.scatter([t.config[x]], [last], color=colour, marker="o" if t.status == "done" else "x")
        left.set(xlabel="step", ylabel=metric)
        right.set(xlabel=x, ylabel=f"last {metric} (× stopped early)")
        if values[0] > 0 and values[-1] > 20 * values[0]:
            right.set_xscale("log")
        figure.savefig(path, dpi=150)


def _last(trial: Trial, metric: str) -> float | None:
    v = trial.value(metric)
    return v if v is not None and math.isfinite(v) and trial.status != "diverged" else None


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
