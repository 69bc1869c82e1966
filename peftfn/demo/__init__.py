"""The demo: several adapter methods and seeds on one frozen base, two real tasks, and what must hold checked."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from torch import Tensor

import peftfn as pf
from peftfn.demo import checks, report
from peftfn.demo.data import Task, news, reviews
from peftfn.demo.model import SPLIT, Base, Split
from peftfn.demo.train import Schedule, Trained, accuracy, train, untrained
from peftfn.tools.summary import counts

HEAD = "head only"
BATCH = {"news": 32, "reviews": 16}


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
    train_texts: int | None = None
    test_texts: int | None = None

    @classmethod
    def quick(cls) -> "Settings":
        """The same on a few texts for a few steps: whether everything runs, not how well."""
        return cls(seeds=2, steps=2, probe_steps=5, train_texts=16, test_texts=16)


def run(out: Path, settings: Settings, console: Console | None = None) -> int:
    """Train, report into the folder `out`, check. The exit code: 0, or 1 if a check failed."""
    start, console = perf_counter(), console or Console()
    tasks = [t.smaller(settings.train_texts, settings.test_texts) for t in (news(), reviews())]
    (out / "adapters").mkdir(parents=True, exist_ok=True)  # a folder that cannot be written ends it now
    base = Base(classes=max(len(t.labels) for t in tasks))
    before = checks.copy_of(base.model)
    nets = {HEAD: pf.adapt(base.model, {"head": pf.Full()})}
    nets |= {name: pf.adapt(base.model, recipe.rules()) for name, recipe in RECIPES.items()}

    rows: list[report.Row] = []
    trained: dict[str, dict[str, list[Any]]] = {}  # method → task → adapters
    with _progress(console) as progress:
        total = len(tasks) * (settings.probe_steps + settings.steps * len(RECIPES))
        bar = progress.add_task("", total=total)
        for task in tasks:
            for row, adapters in _task(task, base, nets, settings, _Bar(progress, bar, task.name)):
                rows.append(row)
                trained.setdefault(row.method, {})[task.name] = adapters
        progress.update(bar, description="done")
    console.print(report.table(rows))

    for name, net in nets.items():
        for task in tasks:
            for seed, adapter in enumerate(trained[name][task.name]):
                pf.save(_folder(out, name, task, seed), net, adapter)
    report.plot(out / "demo.png", rows)
    report.save(out / "results.json", rows, {"seeds": settings.seeds, "steps": settings.steps})
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

    def row(name: str, done: Trained, inputs: tuple[Tensor, ...], method: str, losses: Tensor) -> report.Row:
        right = accuracy(nets[name], done.adapters, inputs, test.label, method=method)
        return report.Row(task, name, counts(nets[name])[0], right, done.seconds, losses)

    bar.say(HEAD)
    fresh = [nets[HEAD].init(seed=s) for s in range(settings.seeds)]
    schedule = Schedule(settings.probe_steps, batch=64, lr=0.0, head_lr=3e-3)
    heads = train(nets[HEAD], fresh, (fit.features,), fit.label, schedule, method="head", tick=bar.tick)
    schedule = Schedule(settings.steps, min(BATCH[task.name], len(task.train)), lr=0.0, head_lr=1e-3)
    losses = untrained(nets[HEAD], heads.adapters, (fit.features,), fit.label, schedule, method="head")
    yield row(HEAD, heads, (test.features,), "head", losses), heads.adapters
    for name, recipe in RECIPES.items():
        bar.say(name)
        fresh = [nets[name].init(seed=s) | heads.adapters[s] for s in range(settings.seeds)]
        how = replace(schedule, lr=recipe.lr)
        done = train(nets[name], fresh, _upper(fit), fit.label, how, method="upper", tick=bar.tick)
        yield row(name, done, _upper(test), "upper", done.losses), done.adapters


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
