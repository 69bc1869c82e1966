"""sweep: N configurations through K slots."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Adapter
from peftfn.net.net import Adapted
from peftfn.sweeps.lane import Data, Evaluate, Lane, Loss, Run, kind, whole
from peftfn.sweeps.store import Store, Tree
from peftfn.sweeps.swept import Swept
from peftfn.sweeps.trial import Config, Stop, Trial, name_of
from peftfn.tensors.tree import leaves, mapped
from peftfn.tools.step import Step


@checks_numbers
def sweep(
    configs: Sequence[Config],
    net: Adapted | Callable[[Config], Adapted],
    loss: Loss,
    data: Data,
    optimizer: Callable[[Config], Step],
    *,
    steps: int | Callable[[Config], int],
    slots: int = 8,
    init: Callable[[Adapted, Config], Adapter] | None = None,
    evaluate: Evaluate | None = None,
    every: int = 50,
    stop: Stop | None = None,
    folder: str | Path | None = None,
    seconds: float | None = None,
    shrink: bool = False,
    progress: bool | None = None,
) -> Swept:
    """Train many configurations of adapters on one base, some at a time in one pass; each as it would be alone.

    Configurations whose nets have the same rules train as one stack of at most `slots` rows, under `vmap`. One that is
    done, diverges, or is stopped by a rule, frees its slot for the next. The numbers of a configuration (a rate, weight
    decay) differ within a stack; those with other rules (method, rank, alpha), or other strings, are stacks of their
    own, one after the other.

    Args:
        configs: dicts of plain data (`grid` makes them). "seed" seeds the adapter and its dropout; 0 if there is none.
        net: a net, or configuration ↦ net. All on one model.
        loss: (net, adapter, batch) ↦ a number to minimise. It runs under `vmap` and `grad`.
        data: (configuration, step) ↦ batch, a tree of tensors. A pure function: a resumed run asks again.
        optimizer: configuration ↦ `pf.steps.Step`. The numbers of the configuration are tensors here.
        steps: how many, or configuration ↦ how many. After raising it, a folder's trials go on.
        slots: how many configurations train at once.
        init: (net, configuration) ↦ the adapter to start from; `net.init(seed)` if not given.
        evaluate: (net, adapter) ↦ a number, called "value" then, or {name: number}. It runs under `vmap` and `no_grad`,
            and without dropout.
        every: steps between two rows of a history, when `evaluate` and `stop` are asked and the folder is written.
        stop: (trial, all trials) ↦ whether to stop it, or why: `patience`, `behind`, or a function of yours.
        folder: where trials are kept, a file each. A sweep with the same folder goes on where that one was: an
            interrupt loses the steps since the last row. More configurations may be there then.
        seconds: end after this time, at a row; trials may then be "running" or "waiting".
        shrink: whether empty slots are left out once there are no more configurations. It saves their time, and the
            results then depend, in the last bits, on when that happened.
        progress: whether to show a progress bar, where tqdm is installed. None: on a terminal.

    Returns:
        A `Swept`: trials, records, a table, a plot, adapters.

    Raises:
        ValueError: no configurations, one that is there twice or is not plain data; nets on different models; batches
            of different shapes; a folder of another net or optimizer.
        TypeError: a batch that has something else than tensors.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 1)), {"0.weight": pf.LoRA(rank=2)})
        data, loss = lambda c, step: torch.ones(4, 8), lambda net, a, x: net.apply(a, x).square().mean()
        done = pf.sweep(pf.grid(lr=[1e-3, 1e-2]), net, loss, data, lambda c: pf.steps.adamw(c["lr"]), steps=5)
        assert [t.status for t in done.trials] == ["done", "done"]
    """
    given = _checked(configs, slots, every)
    length = steps if callable(steps) else lambda c: steps
    for c in given.values():
        if (n := length(c)) < 1:
            raise ValueError(f"sweep: steps is {n} for {c!r}; it must be at least 1")
    nets = _nets(given, net)
    start = init or (lambda n, c: n.init(seed=int(c.get("seed", 0))))
    fresh = {name: partial(_fresh, nets[name], c, start, optimizer) for name, c in given.items()}
    store = Store(None if folder is None else Path(folder))
    trials = {name: store.trial(name, repr(nets[name])) or Trial(c) for name, c in given.items()}
    for t in trials.values():
        if t.status == "done" and t.step < length(t.config):
            t.status = "running"
    if seconds is not None and not seconds >= 0:
        raise ValueError(f"sweep: seconds is {seconds}; give at least 0, or None")
    end = None if seconds is None else perf_counter() + seconds
    rule = _Rule(length, every, stop, tuple(trials.values()))
    with _bar(sum(length(t.config) - t.step for t in trials.values() if not t.ended), progress) as tick:
        for group in _groups(given, nets):
            fixed = kind(given[group[0]])[1]
            lane = Lane(nets[group[0]], loss, data, optimizer, evaluate, min(slots, len(group)), fixed)
            queue = [trials[name] for name in group if not trials[name].ended]
            queue.sort(key=lambda t: t.status != "running")  # those that have begun come first
            job = _Job(lane, store, fresh, rule, end, shrink, tick)
            if not job.run(queue):
                break
    return Swept(tuple(trials.values()), nets, store, fresh)


@dataclass(frozen=True)
class _Rule:
    """When a trial has a row, and when it ends."""

    length: Callable[[Config], int]
    every: int
    stop: Stop | None
    trials: tuple[Trial, ...]

    def to_row(self, trial: Trial) -> int:
        """Steps until the next row."""
        return min(self.every - trial.step % self.every, self.length(trial.config) - trial.step)

    def is_row(self, trial: Trial) -> bool:
        return trial.step % self.every == 0 or trial.step == self.length(trial.config)

    def judge(self, trial: Trial) -> None:
        """Of a trial with a new row."""
        if trial.step >= self.length(trial.config):
            trial.status = "done"
        elif self.stop is not None and (why := self.stop(trial, self.trials)):
            trial.status, trial.reason = "stopped", why if isinstance(why, str) else "stop"


@dataclass(frozen=True)
class _Job:
    """One lane, until its queue is empty or the time is up."""

    lane: Lane
    store: Store
    fresh: Mapping[str, Callable[[], Tree]]
    rule: _Rule
    end: float | None
    shrink: bool
    tick: Callable[[int], Any]

    def run(self, queue: list[Trial]) -> bool:
        """Whether it came to the end."""
        runs: list[Run] = []
        while True:
            while queue and len(runs) < self.lane.width:
                runs.append(self._begin(queue.pop(0)))
            if not runs:
                return True
            if self.end is not None and perf_counter() >= self.end:
                return False
            few = self.shrink and not queue
            runs = self._rows(replace(self.lane, width=len(runs)) if few else self.lane, runs)

    def _begin(self, trial: Trial) -> Run:
        tree = self.fresh[trial.name]()
        if trial.status == "running":
            tree = self.store.tensors(trial, tree)
        trial.status = "running"
        return Run(trial, tree["adapter"], tree["state"])

    def _rows(self, lane: Lane, runs: list[Run]) -> list[Run]:
        """Train until one of the runs has a row; return those that go on."""
        began = perf_counter()
        n = min(self.rule.to_row(r.trial) for r in runs)
        runs, losses = lane.steps(runs, n, self.tick)
        for run, column in zip(runs, losses.unbind(1), strict=True):
            _advance(run, column)
        due = [self.rule.is_row(r.trial) and r.trial.status == "running" for r in runs]
        found = lane.evaluated(runs) if any(due) else []
        share = (perf_counter() - began) / len(runs)
        for i, run in enumerate(runs):
            trial = run.trial
            trial.seconds += share
            if due[i]:
                mean = sum(trial.window) / len(trial.window)
                trial.history.append({"step": trial.step, "loss": mean, **found[i]})
                trial.window = []
        for run in (r for r, d in zip(runs, due, strict=True) if d):  # all rows are there: a rule may compare them
            self.rule.judge(run.trial)
        for run in runs:
            self.store.save(run.trial, run.tree, repr(lane.net))
        return [r for r in runs if not r.trial.ended]


def _advance(run: Run, losses: Tensor) -> None:
    """Count the steps of a run, and say if it has diverged."""
    trial, bad = run.trial, (~losses.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        trial.status, trial.reason = "diverged", f"the loss of step {trial.step + first} is {float(losses[first])}"
        losses = losses[:first]
    trial.step += len(losses)
    trial.window += losses.tolist()
    if not len(bad) and not whole(run):
        trial.status, trial.reason = "diverged", f"after step {trial.step}, a tensor is not finite"


def _fresh(
    net: Adapted, config: Config, init: Callable[[Adapted, Config], Adapter], optimizer: Callable[[Config], Step]
) -> Tree:
    """The tensors that a run starts with."""
    adapter = init(net, config)
    device = next((t.device for t in leaves(adapter)), torch.device("cpu"))
    state = mapped(optimizer(config).init(adapter), lambda t: t.to(device))  # counts too: in a stack, they have rows
    return {"adapter": adapter, "state": state}


def _checked(configs: Sequence[Config], slots: int, every: int) -> dict[str, dict[str, Any]]:
    """name → configuration."""
    if isinstance(configs, Mapping) or not configs:
        raise ValueError("sweep: give at least one configuration, in a list of dicts; grid makes one")
    for what, n in (("slots", slots), ("every", every)):
        if n < 1:
            raise ValueError(f"sweep: {what} is {n}; it must be at least 1")
    out: dict[str, dict[str, Any]] = {}
    for c in configs:
        if (name := name_of(c)) in out:
            raise ValueError(f"sweep: {dict(c)!r} is there twice; give seeds to tell them apart")
        out[name] = dict(c)
    return out


def _nets(given: Mapping[str, Config], net: Adapted | Callable[[Config], Adapted]) -> dict[str, Adapted]:
    """The net of each configuration; one for those that are alike."""
    kept: list[Adapted] = []
    out: dict[str, Adapted] = {}
    for name, config in given.items():
        made = net if isinstance(net, Adapted) else net(config)
        if not isinstance(made, Adapted):
            raise TypeError(f"sweep: net of {config!r} is a {type(made).__name__}; return what pf.adapt returns")
        if kept and made.model is not kept[0].model:
            raise ValueError("sweep: the nets adapt different models; call adapt on one model object")
        out[name] = next((k for k in kept if _alike(k, made)), made)
        if out[name] is made:
            kept.append(made)
    return out


def _alike(one: Adapted, two: Adapted) -> bool:
    """Whether two nets on one model are the same: rules, sites and constants."""
    if one is two:
        return True
    p, q = one.plan, two.plan
    return (list(p.rules.items()), list(p), one.again) == (list(q.rules.items()), list(q), two.again) and all(
        p[n].frozen.keys() == q[n].frozen.keys() and all(torch.equal(t, q[n].frozen[k]) for k, t in p[n].frozen.items())
        for n in p
    )


def _groups(given: Mapping[str, Config], nets: Mapping[str, Adapted]) -> list[list[str]]:
    """The names of configurations that train as one stack."""
    out: dict[Any, list[str]] = {}
    for name, config in given.items():
        numbers, rest = kind(config)
        out.setdefault((id(nets[name]), numbers, json.dumps(rest, sort_keys=True)), []).append(name)
    return list(out.values())


@contextmanager
def _bar(total: int, progress: bool | None) -> Iterator[Callable[[int], Any]]:
    """What moves the progress bar on."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        yield lambda n: None
        return
    with tqdm(total=total, unit="step", disable=None if progress is None else not progress) as bar:
        yield bar.update
