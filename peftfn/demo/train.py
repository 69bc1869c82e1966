"""A plain training loop that trains several adapters at once: their tensors are stacked, the loss is vmapped."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    tick: Callable[[], object] = lambda: None,
) -> Trained:
    """Train k adapters together, each on its own batches.

    Args:
        inputs: what the model's `method` takes, each tensor with the examples in its first dimension.
        tick: called after each step.
    """
    stacked = pf.stack(adapters)
    leaves: list[Tensor] = [t.requires_grad_() for t in optree.tree_leaves(stacked)]  # type: ignore[arg-type, var-annotated]
    head = [t for name, leaf in stacked.items() if name.startswith("head.") for t in leaf.values()]
    body = [t for t in leaves if not any(t is h for h in head)]
    groups = [{"params": body, "lr": how.lr}, {"params": head, "lr": how.head_lr}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
    schedule = LambdaLR(optimizer, lambda i: min((i + 1) / WARMUP, 1 - i / how.steps))

    loss = _loss(net, method)
    losses, seconds = [], []
    for index in _batches(len(label), how, len(adapters)):
        start = perf_counter()
        each = vmap(loss)(stacked, label[index], *(x[index] for x in inputs))  # [k]
        optimizer.zero_grad()
        each.sum().backward()
        optimizer.step()
        schedule.step()
        seconds.append(perf_counter() - start)
        losses.append(each.detach())
        tick()
    done = [optree.tree_map(lambda t: t.detach().clone(), a) for a in pf.unstack(stacked)]  # type: ignore[arg-type]
    return Trained(done, torch.stack(losses), median(seconds))  # type: ignore[arg-type]


@torch.no_grad()
def untrained(
    net: pf.Adapted,
    adapters: Sequence[Mapping[str, Any]],
    inputs: tuple[Tensor, ...],
    label: Tensor,
    how: Schedule,
    *,
    method: str,
) -> Tensor:
    """[steps, k]: the losses on the batches `train` would use, of adapters that do not train."""
    stacked, loss = pf.stack(adapters), _loss(net, method)
    batches = _batches(len(label), how, len(adapters))
    return torch.stack([vmap(loss)(stacked, label[index], *(x[index] for x in inputs)) for index in batches])


def _loss(net: pf.Adapted, method: str) -> Callable[..., Tensor]:
    def loss(adapter: Mapping[str, Any], label: Tensor, *inputs: Tensor) -> Tensor:
        return F.cross_entropy(net.apply(adapter, *inputs, method=method), label)

    return loss


def _batches(n: int, how: Schedule, seeds: int) -> Iterator[Tensor]:
    """Index tensors [seeds, batch]; seed s goes through the n examples in its own order, epoch after epoch."""
    epochs = -(-how.steps * how.batch // n)
    generators = [torch.Generator().manual_seed(s) for s in range(seeds)]
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
