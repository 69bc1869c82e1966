"""One configuration of a sweep: what it is, what happened to it, and when it should stop."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from peftfn.core.numbers import checks_numbers

Config = Mapping[str, Any]
Status = Literal["waiting", "running", "done", "stopped", "diverged"]
Mode = Literal["min", "max"]


@dataclass
class Trial:
    """A configuration and what became of it.

    Args:
        config: the configuration.
        name: an identifier made of it, the name of its file.
        status: "waiting" and "running" (when the time was up), "done", "stopped" by a rule, or "diverged": a loss or a
            tensor was not finite.
        step: steps taken; of a diverged one, the step whose loss was not finite, or the last.
        seconds: its share of the time.
        reason: what stopped it.
        history: a row {"step", "loss", …} for every `every` steps: the mean training loss since the last row, and what
            `evaluate` returned.
        window: training losses since the last row.

    Example:
        trial = pf.Trial({"lr": 1e-3, "seed": 0})
        assert trial.status == "waiting" and trial.value("loss") is None
    """

    config: Config
    name: str = ""
    status: Status = "waiting"
    step: int = 0
    seconds: float = 0.0
    reason: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    window: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name = self.name or name_of(self.config)

    def value(self, metric: str, step: int | None = None) -> float | None:
        """Return what the history says of a metric.

        Args:
            metric: "loss", or a name that `evaluate` returns ("value" if it returns a number).
            step: of which row; None: of the last.

        Returns:
            A number, or None without such a row.
        """
        rows = [r for r in self.history if step is None or r["step"] == step]
        return rows[-1].get(metric) if rows else None

    @property
    def ended(self) -> bool:
        """Whether it needs no slot any more."""
        return self.status in ("done", "stopped", "diverged")

    def to_json(self) -> str:
        """Return all of it as text.

        Returns:
            JSON, for `from_json`.
        """
        return json.dumps(vars(self))

    @staticmethod
    def from_json(text: str) -> "Trial":
        """Return the trial that `to_json` wrote.

        Returns:
            A `Trial`.
        """
        return Trial(**json.loads(text))


def name_of(config: Config) -> str:
    """Twelve digits, the same for the same configuration. ValueError for what JSON cannot hold."""
    try:
        text = json.dumps(dict(config), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"sweep: the configuration {dict(config)!r} is not plain data ({e}): give numbers, strings, booleans and "
            "lists, and make objects of them in net, optimizer or data"
        ) from e
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def grid(**values: Iterable[Any]) -> list[dict[str, Any]]:
    """Return every combination of some values, as configurations for `sweep`.

    Args:
        values: a name and its values; the last name varies fastest.

    Returns:
        A list of dicts.

    Raises:
        TypeError: a value that is in no list.

    Example:
        configs = pf.grid(lr=[1e-3, 1e-2], seed=range(3))
        assert len(configs) == 6 and configs[0] == {"lr": 1e-3, "seed": 0}
    """
    for name, some in values.items():
        if isinstance(some, str) or not isinstance(some, Iterable):
            raise TypeError(f"grid: {name} is {some!r}; give its values in a list: grid({name}=[{some!r}])")
    return [dict(zip(values, row, strict=True)) for row in product(*values.values())]


Stop = Callable[[Trial, Sequence[Trial]], Any]
"""(a trial with a new row, all trials) ↦ whether it stops, or a text that says why"""


@checks_numbers
def patience(rows: int, metric: str = "loss", mode: Mode = "min") -> Stop:
    """Return the rule that stops a configuration which has not improved for some rows of its history.

    Args:
        rows: how many; at least 1.
        metric: what to look at: "loss", or a name that `evaluate` returns ("value" if it returns a number).
        mode: which is better, "min" or "max".

    Returns:
        A rule for `sweep`'s `stop`.

    Raises:
        ValueError: rows below 1.

    Example:
        stop = pf.patience(3, "accuracy", "max")
        assert not stop(pf.Trial({"lr": 1e-3}), [])
    """
    if rows < 1:
        raise ValueError(f"patience: rows is {rows}; it must be at least 1")
    sign = sign_of(mode)

    def stop(trial: Trial, trials: Sequence[Trial]) -> str:
        values = [sign * r[metric] for r in trial.history]
        late = len(values) > rows and min(values[:-rows]) <= min(values[-rows:])
        return f"no better {metric} in {rows} rows" if late else ""

    return stop


@checks_numbers
def behind(after: int, share: float = 0.5, metric: str = "loss", mode: Mode = "min") -> Stop:
    """Return the rule that stops a configuration which is among the worst at its step; its slot is free for another.

    Golovin et al., "Google Vizier: A Service for Black-Box Optimization", KDD 2017, have share = 0.5, the median rule.
    With it, a result depends on which other configurations there are.

    Args:
        after: the step from which on it is asked.
        share: the share of configurations that have come this far and may go on, in (0, 1).
        metric, mode: as for `patience`.

    Returns:
        A rule for `sweep`'s `stop`.

    Raises:
        ValueError: a share that is not between 0 and 1.

    Example:
        a, b = (pf.Trial({"lr": lr}, history=[{"step": 10, "loss": lr}]) for lr in (0.1, 0.2))
        assert pf.behind(10)(b, [a, b]) and not pf.behind(10)(a, [a, b])
    """
    if not 0 < share < 1:
        raise ValueError(f"behind: share is {share}; it must be between 0 and 1")
    sign = sign_of(mode)

    def stop(trial: Trial, trials: Sequence[Trial]) -> str:
        step = int(trial.history[-1]["step"]) if trial.history else 0
        mine = trial.value(metric, step)
        if step < after or mine is None:
            return ""
        found = [v for t in trials if (v := t.value(metric, step)) is not None]
        better = sum(sign * v < sign * mine for v in found if math.isfinite(v))
        return f"{better} of {len(found)} have a better {metric} at step {step}" if better >= share * len(found) else ""

    return stop


def sign_of(mode: Mode) -> int:
    """What makes the smaller value the better one."""
    if mode not in ("min", "max"):
        raise ValueError(f"mode is {mode!r}; it is 'min' or 'max'")
    return 1 if mode == "min" else -1
