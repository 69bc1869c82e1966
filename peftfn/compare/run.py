"""Run methods on tasks: for each pair, a grid of learning rates and seeds in one sweep, and a file of what came out."""

import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from shutil import rmtree
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import peftfn as pf
from peftfn.compare.curvature import sharpness
from peftfn.compare.environment import environment
from peftfn.compare.methods import METHODS, Recipe
from peftfn.compare.peak import peak
from peftfn.compare.tasks import SMALL, TASKS, Ready
from peftfn.formats.files import write
from peftfn.tools.summary import counts

Json = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What each method gets.

    Args:
        rates: learning rates; each method's best is chosen by the mean accuracy on the validation examples.
        seeds: of the adapter and the order of the data.
        steps, batch: of training.
        slots: configurations that train at once.
    """

    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    seeds: int = 3
    steps: int = 60
    batch: int = 16
    slots: int = 12


def compare(
    out: Path,
    methods: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    settings: Settings | None = None,
    *,
    minutes: float | None = None,
    say: Callable[[str], Any] = print,
) -> list[Json]:
    """Run every method on every task, as far as the time goes, and return all records of the folder.

    Args:
        out: a folder. What is there with the same settings is not run again, and a pair that was interrupted goes on.
        methods: names of `METHODS`, in the order in which they run: each on all tasks, then the next.
        tasks: names of `TASKS`. Without both lists, a method whose recipe is `small` runs on the small tasks alone.
        minutes: no pair begins that would end later, if it takes as long as the last on its task.
        say: gets a line for each pair.

    Raises:
        ValueError: an unknown name, or a folder with other settings.
        ModuleNotFoundError: a package with data is not installed.
    """
    for what, names, known in (("method", methods, METHODS), ("task", tasks, TASKS)):
        for name in names or ():
            if name not in known:
                raise ValueError(f"there is no {what} {name!r} to compare; there are {', '.join(known)}")
    how = settings or Settings()
    start, took = perf_counter(), dict[str, float]()
    for name, task in pairs(methods, tasks):
        path = out / f"{task}.{name}.json"
        if path.is_file():
            _same(path, how)
            continue
        left = None if minutes is None else 60 * minutes - (perf_counter() - start)
        if left is not None and left <= took.get(task, 0.0):
            say(f"{task}, {name}: left out, for lack of time")
            continue
        began = perf_counter()
        record = one(_made(TASKS[task]), name, METHODS[name], how, out / "running" / f"{task}.{name}")
        write(path, json.dumps(record, indent=1) + "\n")
        rmtree(out / "running" / f"{task}.{name}")
        took[task] = perf_counter() - began
        say(f"{task}, {name}: {_line(record)}, {took[task]:.0f} s")
    return read(out)


@cache
def _made(task: Callable[[], Ready]) -> Ready:
    """Its base trains once a process; nothing here changes it."""
    return task()


def pairs(methods: Sequence[str] | None = None, tasks: Sequence[str] | None = None) -> list[tuple[str, str]]:
    """(method, task) of all that `compare` runs."""
    return [
        (name, task)
        for name in methods or METHODS
        for task in tasks or TASKS
        if not METHODS[name].small or task in SMALL or (methods and tasks)
    ]


def read(folder: Path) -> list[Json]:
    """The records of a folder."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


@dataclass(frozen=True)
class Training:
    """How a net is trained on a task: functions for `sweep`, whose configurations have a rate "lr" and a "seed"."""

    ready: Ready
    how: Settings

    def batch(self, index: Tensor) -> tuple[Tensor, ...]:
        """(label, *inputs) of some examples."""
        return (self.ready.label[index], *(x[index] for x in self.ready.inputs))

    def data(self, config: Mapping[str, Any], step: int) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(10_000 * config["seed"] + step)
        train = self.ready.train
        return self.batch(train[torch.randint(len(train), (self.how.batch,), generator=g)])

    def loss(self, net: pf.Adapted, adapter: Mapping[str, Any], batch: tuple[Tensor, ...]) -> Tensor:
        return self.ready.loss(partial(net.apply, adapter, method=self.ready.method), *batch)

    def optimizer(self, config: Mapping[str, Any]) -> pf.steps.Step:
        schedule = pf.steps.cosine(self.how.steps, warmup=max(1, self.how.steps // 20))
        return pf.steps.chain(pf.steps.clip(1.0), pf.steps.adamw(config["lr"]), pf.steps.scheduled(schedule))

    def evaluate(self, net: pf.Adapted, adapter: Mapping[str, Any]) -> dict[str, Tensor]:
        ready = self.ready
        call = partial(net.apply, adapter, method=ready.method)
        own = ready.own.loss(partial(net.apply, adapter, method=ready.own.method))
        return {"validation": ready.right(call, ready.validation), "test": ready.right(call, ready.test), "own": own}

    def sweep(self, net: pf.Adapted, folder: Path | None = None) -> pf.Swept:
        """All rates and seeds."""
        configs, how = pf.grid(lr=self.how.rates, seed=range(self.how.seeds)), self.how
        given = (net, self.loss, self.data, self.optimizer)
        return pf.sweep(
            configs, *given, steps=how.steps, every=how.steps, slots=how.slots, evaluate=self.evaluate, folder=folder
        )


def one(ready: Ready, name: str, recipe: Recipe, how: Settings, folder: Path | None = None) -> Json:
    """The record of a method on a task. The trials are kept in the folder until it is there."""
    net, training = pf.adapt(ready.model, recipe.rules(ready.layers)), Training(ready, how)
    done = training.sweep(net, folder)
    loss = partial(training.loss, net)
    seconds, memory = _alone(loss, net.init(), training.data({"seed": 0}, 0))
    start = partial(loss, batch=training.batch(ready.train[: 2 * how.batch]))
    right, own = ready.base()
    return {
        "task": ready.name,
        "title": ready.title,
        "method": name,
        "net": str(recipe.method),
        "settings": {"rates": list(how.rates), "seeds": how.seeds, "steps": how.steps, "batch": how.batch},
        "examples": {"train": len(ready.train), "validation": len(ready.validation), "test": len(ready.test)},
        "positions": ready.inputs[0].shape[1],
        "base": right,
        "own": {"title": ready.own.title, "base": own},
        "sharpness": sharpness(start, net.init()),
        "trained": counts(net)[0],
        "bytes": _size(net),
        "seconds_a_step_alone": seconds,
        "peak_bytes_alone": memory,
        "trials": trials(done),
        "environment": environment(),
    }


def trials(done: pf.Swept) -> list[Json]:
    """A flat dict of each trial, with the last row of its history."""
    return [
        {**t.config, "status": t.status, "step": t.step, "seconds": t.seconds, **(t.history[-1] if t.history else {})}
        for t in done.trials
    ]


def _alone(loss: Callable[..., Tensor], adapter: pf.Adapter, batch: Any) -> tuple[float, int]:
    """(median seconds, peak bytes) of the gradient of one adapter by plain autograd."""
    given = {n: {k: t.detach().clone().requires_grad_() for k, t in leaf.items()} for n, leaf in adapter.items()}

    def gradient() -> None:
        torch.autograd.grad(loss(given, batch), pf.leaves(given))

    gradient()
    memory, seconds = peak(gradient), []
    for _ in range(7):
        began = perf_counter()
        gradient()
        seconds.append(perf_counter() - began)
    return statistics.median(seconds), memory


def _size(net: pf.Adapted) -> int:
    """Bytes of an adapter's files."""
    with tempfile.TemporaryDirectory() as folder:
        pf.save(Path(folder) / "a", net, net.init())
        return sum(f.stat().st_size for f in (Path(folder) / "a").iterdir())


def best(record: Json) -> tuple[float, list[Json]] | None:
    """(the rate with the best mean validation accuracy, its trials); None if at every rate a seed diverged."""
    of: dict[float, list[Json]] = {}
    for t in record["trials"]:
        of.setdefault(t["lr"], []).append(t)
    whole = {lr: ts for lr, ts in of.items() if all(t["status"] == "done" for t in ts)}
    if not whole:
        return None
    lr = max(whole, key=lambda lr: (statistics.mean(t["validation"] for t in whole[lr]), -lr))
    return lr, whole[lr]


def mean_test(record: Json) -> float:
    """The mean test accuracy at the best rate; −1 if there is none."""
    found = best(record)
    return -1.0 if found is None else statistics.mean(t["test"] for t in found[1])


def forgotten(record: Json) -> float:
    """How much the mean loss on the base's own task rises at the best rate; infinite if there is none."""
    found = best(record)
    return float("inf") if found is None else statistics.mean(t["own"] for t in found[1]) - record["own"]["base"]


def near(record: Json) -> int:
    """At how many rates the mean validation accuracy is within two points of the best."""
    of: dict[float, list[float]] = {}
    for t in record["trials"]:
        of.setdefault(t["lr"], []).append(t.get("validation", 0.0) if t["status"] == "done" else 0.0)
    means = [statistics.mean(values) for values in of.values()]
    return sum(m >= max(means) - 0.02 for m in means)


def _line(record: Json) -> str:
    found = best(record)
    if found is None:
        return "diverged at every rate"
    return f"{100 * statistics.mean(t['test'] for t in found[1]):.1f} % at a rate of {found[0]:g}"


def _same(path: Path, how: Settings) -> None:
    record = json.loads(path.read_text())
    have = record["settings"]
    want = {"rates": list(how.rates), "seeds": how.seeds, "steps": how.steps, "batch": how.batch}
    if not record.keys() >= {"sharpness", "positions"}:
        raise ValueError(f"{path}: an older version made it, without what is measured now: give another folder")
    if have != want:
        raise ValueError(f"{path}: it was made with {have}, and these are {want}: give another folder")
