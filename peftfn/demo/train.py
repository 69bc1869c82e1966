"""A plain training loop that trains several adapters at once: their tensors are stacked, the loss is vmapped."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import vmap
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import peftfn as pf

WARMUP = 5  # steps


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: both learning rates rise for WARMUP steps, then fall to zero."""

    steps: int
    batch: int
    lr: float  # of the adapter
    head_lr: float  # of the classifier's head


@dataclass(frozen=True)
class Trained:
    """k adapters after training."""

    adapters: list[dict[str, Any]]
    losses: Tensor  # [steps, k]
    seconds: float  # median time of a step of all k


def train(
    net: pf.Adapted,
    adapters: Sequence[Mapping[str, Any]],
    inputs: tuple[Tensor, ...],
    label: Tensor,
    how: Schedule,
    *,
    method: str,
    rates: Sequence[float] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Trained:
    """Train k adapters together: one vmapped pass a step, of each on its own batches.

    Args:
        inputs: what the model's `method` takes, each tensor with the examples in its first dimension.
        rates: a learning rate for each adapter, which then all see the same batches; None is `how.lr` for all.
        tick: called after each step.
    """
    own: list[Any] = [optree.tree_map(_trained, dict(a)) for a in adapters]  # type: ignore[arg-type]
    groups = []
    for a, lr in zip(own, rates or [how.lr] * len(own), strict=True):
        head = {name: leaf for name, leaf in a.items() if name.startswith("head.")}
        groups.append({"params": pf.leaves(head), "lr": how.head_lr})
        if len(head) < len(a):
            groups.append({"params": pf.leaves({n: leaf for n, leaf in a.items() if n not in head}), "lr": lr})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda i: min((i + 1) / WARMUP, 1 - i / how.steps))

    loss = _loss(net, method)
    losses, seconds = [], []
    for index in _batches(len(label), how, [0] * len(own) if rates else range(len(own))):
        start = perf_counter()
        each = vmap(loss)(pf.stack(own), label[index], *(x[index] for x in inputs))  # [k]
        optimizer.zero_grad()
        each.sum().backward()  # adapters do not meet in the loss, so each gets its own gradient
        optimizer.step()
        schedule.step()
        seconds.append(perf_counter() - start)
        losses.append(each.detach())
        tick()
    done = [optree.tree_map(lambda t: t.detach(), a) for a in own]  # type: ignore[arg-type]
    return Trained(done, torch.stack(losses), median(seconds))  # type: ignore[arg-type]


def _trained(t: Tensor) -> Tensor:
    return t.detach().clone().requires_grad_()


def _loss(net: pf.Adapted, method: str) -> Callable[..., Tensor]:
    def loss(adapter: Mapping[str, Any], label: Tensor, *inputs: Tensor) -> Tensor:
        return F.cross_entropy(net.apply(adapter, *inputs, method=method), label)

    return loss


def _batches(n: int, how: Schedule, seeds: Iterable[int]) -> Iterator[Tensor]:
    """Index tensors [seeds, batch]; seed s goes through the n examples in its own order, epoch after epoch."""
    epochs = -(-how.steps * how.batch // n)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    order = torch.stack([torch.cat([torch.randperm(n, generator=g) for _ in range(epochs)]) for g in generators])
    return (order[:, i : i + how.batch] for i in range(0, how.steps * how.batch, how.batch))


@torch.no_grad()
def accuracy(
    net: pf.Adapted, adapters: Sequence[Mapping[str, Any]], inputs: tuple[Tensor, ...], label: Tensor, *, method: str
) -> Tensor:
    """[k]: the share of examples that each adapter gets right; all of them see a batch in one pass."""

    def predict(adapter: Mapping[str, Any], *inputs: Tensor) -> Tensor:
        logits: Tensor = net.apply(adapter, *inputs, method=method)
        return logits.argmax(-1)

    stacked, in_dims = pf.stack(adapters), (0, *(None for _ in inputs))
    parts = zip(*(x.split(64) for x in inputs), strict=True)
    predicted = torch.cat([vmap(predict, in_dims)(stacked, *part) for part in parts], dim=1)  # [k, n]
    return (predicted == label).float().mean(1)


@torch.no_grad()
def served(
    given: Mapping[str, tuple[pf.Adapted, Any]], inputs: tuple[Tensor, ...], *, method: str, repeats: int = 9
) -> dict[int, tuple[float, float]]:
    """Seconds of a batch whose rows all have another adapter of `given`, by their number: {n: (in one call, in a call
    for each row)}, on n = 1, 2, 4, … rows, and on as many as there are. The fastest of `repeats`, taken in turns."""
    bank, names = pf.bank(given), list(given)
    out = {}
    for n in sorted({min(2**i, len(names)) for i in range(len(names))}):
        rows = [(given[name], [x[i : i + 1] for x in inputs]) for i, name in enumerate(names[:n])]
        ways: tuple[Callable[[], Any], ...] = (
            lambda n=n: bank.apply(names[:n], *(x[:n] for x in inputs), method=method),  # type: ignore[misc]
            lambda rows=rows: [net.apply(a, *x, method=method) for (net, a), x in rows],  # type: ignore[misc]
        )
        taken: tuple[list[float], ...] = ([], [])
        for _ in range(repeats + 1):  # the first warms up
            for way, seconds in zip(ways, taken, strict=True):
                start = perf_counter()
                way()
                seconds.append(perf_counter() - start)
        out[n] = min(taken[0][1:]), min(taken[1][1:])
    return out
