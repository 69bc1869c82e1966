"""The demo: adapters of several methods, seeds and rates on one frozen base, two tasks, and what must hold checked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor

import peftfn as pf
from peftfn.demo import checks, report
from peftfn.demo.data import Task, news, order
from peftfn.demo.model import SPLIT, Base, Split
from peftfn.demo.train import Schedule, Trained, accuracy, served, train
from peftfn.tools.summary import counts

HEAD = "head only"
BATCH = 32
LONGER = {"news": 1, "order": 2}
"""How many times `Settings.steps` a task takes."""

SWEPT = "LoRA"
HEAD_LR = 1e-3  # while an adapter trains beside it


@dataclass(frozen=True)
class Recipe:
    """Where a method stands in the upper layers, and its learning rate."""

    method: pf.Method
    sites: str
    lr: float

    def rules(self) -> dict[str, pf.Method]:
        # In the whole parameter name: a weight matrix of the layers that are not computed once for all.
        return {rf"^layers\.[{SPLIT}-9]\..*({self.sites})\.weight": self.method, "head": pf.Full()}


RECIPES = {
    "IA3": Recipe(pf.IA3(), r"key|value|intermediate\.dense", 3e-2),
    "OFT": Recipe(pf.OFT(block_size=16), "query|key|value", 5e-3),
    "DoRA": Recipe(pf.DoRA(rank=4, alpha=8), "query|key|value|dense", 3e-3),
    "LoRA": Recipe(pf.LoRA(rank=8, alpha=16), "query|key|value|dense", 3e-3),
}


@dataclass(frozen=True)
class Settings:
    seeds: int = 3
    steps: int = 32
    probe_steps: int = 100
    rates: int = 12  # of the sweep
    train_texts: int | None = None
    test_texts: int | None = None

    @classmethod
    def quick(cls) -> "Settings":
        """The same on a few texts for a few steps: whether everything runs, not how well."""
        return cls(seeds=2, steps=2, probe_steps=5, rates=3, train_texts=16, test_texts=16)


def run(out: Path, settings: Settings, console: Console | None = None) -> int:
    """Train, report into the folder `out`, check. The exit code: 0, or 1 if a check failed."""
    start, console = perf_counter(), console or Console()
    tasks = [t.smaller(settings.train_texts, settings.test_texts) for t in (news(), order())]
    (out / "adapters").mkdir(parents=True, exist_ok=True)  # a folder that cannot be written ends it now
    base = Base(classes=max(len(t.labels) for t in tasks))
    before = checks.copy_of(base.model)
    nets = {HEAD: pf.adapt(base.model, {"head": pf.Full()})}
    nets |= {name: pf.adapt(base.model, recipe.rules()) for name, recipe in RECIPES.items()}

    rows: list[report.Row] = []
    trained: dict[str, dict[str, list[Any]]] = {}  # method → task → adapters
    with _progress(console) as progress:
        steps = settings.steps * sum(LONGER[task.name] for task in tasks)
        total = len(tasks) * settings.probe_steps + steps * len(RECIPES) + settings.steps
        bar = progress.add_task("", total=total)
        for task in tasks:
            for row, adapters in _task(task, base, nets, settings, _Bar(progress, bar, task.name)):
                rows.append(row)
                trained.setdefault(row.method, {})[task.name] = adapters
        sweep = _sweep(tasks[0], base, nets[SWEPT], trained[HEAD][tasks[0].name][0], settings, _Bar(progress, bar, ""))
        progress.update(bar, description="serving")
        given = _by_name(nets, trained)
        ids, mask = base.tokens((tasks[0].test * len(given))[: len(given)], tasks[0].max_length)
        times = served(given, (ids, mask), method="forward")
        progress.update(bar, description="done")
    console.print(report.table(rows))

    for name, net in nets.items():
        for task in tasks:
            for seed, adapter in enumerate(trained[name][task.name]):
                pf.save(_folder(out, name, task, seed), net, adapter)
    facts = {
        "seeds": settings.seeds,
        "steps": {task.name: settings.steps * LONGER[task.name] for task in tasks},
        "rates": {name: recipe.lr for name, recipe in RECIPES.items()},
        "threads": torch.get_num_threads(),
        "sweep": [{"rate": lr, "accuracy": right} for lr, right in sweep],
        "served": [{"adapters": n, "one_call": one, "calls": apart} for n, (one, apart) in times.items()],
    }
    report.plot(out / "demo.png", rows, facts)
    report.save(out / "results.json", rows, facts)
    console.print(f"written to {out}: demo.png, results.json, adapters/", soft_wrap=True)

    examples = [example for pair in zip(*(task.test[:4] for task in tasks), strict=True) for example in pair]
    batch = base.tokens(examples, max(task.max_length for task in tasks))
    everyone = {name: [a for adapters in of.values() for a in adapters] for name, of in trained.items()}
    found = [
        checks.reloaded(_folder(out, "LoRA", tasks[0], 0), nets["LoRA"], trained["LoRA"][tasks[0].name][0]),
        checks.merged(nets, {name: adapters[0] for name, adapters in everyone.items()}, *batch),
        checks.mixed(nets, everyone, *batch),
        checks.unchanged(base.model, before),
    ]
    for check in found:
        mark = "[green]ok[/green]    " if check.passed else "[red]FAILED[/red]"
        console.print(mark, check.text, soft_wrap=True)
    console.print(f"{perf_counter() - start:.0f} s in all")
    return 0 if all(check.passed for check in found) else 1


def _task(
    task: Task, base: Base, nets: Mapping[str, pf.Adapted], settings: Settings, bar: "_Bar"
) -> Iterator[tuple[report.Row, list[Any]]]:
    """(row, adapters) of each method on a task; the head alone comes first, and all others start from it."""
    bar.say("the frozen layers, once")
    fit, test = base.encode(task, task.train), base.encode(task, task.test)

    def row(name: str, done: Trained, inputs: tuple[Tensor, ...], method: str) -> report.Row:
        right = accuracy(nets[name], done.adapters, inputs, test.label, method=method)
        return report.Row(task, name, counts(nets[name])[0], right, done.seconds, done.losses)

    bar.say(HEAD)
    fresh = [nets[HEAD].init(seed=s) for s in range(settings.seeds)]
    schedule = Schedule(settings.probe_steps, batch=64, lr=0.0, head_lr=3e-3)
    heads = train(nets[HEAD], fresh, (fit.features,), fit.label, schedule, method="head", tick=bar.tick)
    schedule = Schedule(settings.steps * LONGER[task.name], min(BATCH, len(task.train)), lr=0.0, head_lr=HEAD_LR)
    yield row(HEAD, heads, (test.features,), "head"), heads.adapters
    for name, recipe in RECIPES.items():
        bar.say(name)
        fresh = [nets[name].init(seed=s) | heads.adapters[s] for s in range(settings.seeds)]
        how = replace(schedule, lr=recipe.lr)
        done = train(nets[name], fresh, _upper(fit), fit.label, how, method="upper", tick=bar.tick)
        yield row(name, done, _upper(test), "upper"), done.adapters


def _sweep(
    task: Task, base: Base, net: pf.Adapted, head: Any, settings: Settings, bar: "_Bar"
) -> list[tuple[float, float]]:
    """(learning rate, held-out accuracy) of adapters that differ in nothing else, trained in one run."""
    bar.say(f"{settings.rates} rates at once")
    fit, test = base.encode(task, task.train), base.encode(task, task.test)
    rates: list[float] = torch.logspace(-4, -1.5, settings.rates, dtype=torch.float64).tolist()
    how = Schedule(settings.steps, min(8, len(task.train)), lr=0.0, head_lr=HEAD_LR)
    fresh = [net.init(seed=0) | head for _ in rates]
    done = train(net, fresh, _upper(fit), fit.label, how, method="upper", rates=rates, tick=bar.tick)
    right = accuracy(net, done.adapters, _upper(test), test.label, method="upper")
    return list(zip(rates, [round(x, 6) for x in right.tolist()], strict=True))


def _by_name(
    nets: Mapping[str, pf.Adapted], trained: Mapping[str, Mapping[str, list[Any]]]
) -> dict[str, tuple[pf.Adapted, Any]]:
    """All trained adapters, so that those of different methods stand next to each other."""
    found = [
        (seed, task, method, a)
        for method, of in trained.items()
        if method != HEAD
        for task, adapters in of.items()
        for seed, a in enumerate(adapters)
    ]
    found.sort(key=lambda f: f[:2])
    return {f"{method} {task} {seed}": (nets[method], a) for seed, task, method, a in found}


def _upper(split: Split) -> tuple[Tensor, ...]:
    return split.hidden, split.mask


def _folder(out: Path, method: str, task: Task, seed: int) -> Path:
    return out / "adapters" / task.name / method.lower().replace(" ", "_") / f"seed{seed}"


@dataclass(frozen=True)
class _Bar:
    """The progress bar, while it is about one task."""

    progress: Progress
    id: TaskID
    task: str

    def say(self, what: str) -> None:
        self.progress.update(self.id, description=f"{self.task}: {what}")

    def tick(self) -> None:
        self.progress.advance(self.id)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)
