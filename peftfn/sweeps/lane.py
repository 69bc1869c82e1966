"""The configurations of one plan, trained as one stack: a row each, and nothing of a row enters another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from peftfn.many.stack import stack
from peftfn.net.net import Adapted
from peftfn.sweeps.keys import Keyed, key_of
from peftfn.sweeps.trial import Config, Trial
from peftfn.tensors.tree import leaves, mapped, unstacked
from peftfn.tools.step import Step
from peftfn.tools.steps import apply

Tree = dict[str, Any]
Loss = Callable[[Adapted, Mapping[str, Any], Any], Tensor]
"""(net, adapter, batch) ↦ a number to minimise"""
Data = Callable[[Config, int], Any]
"""(configuration, step) ↦ batch: a tree of tensors, the same whenever it is asked for"""
Evaluate = Callable[[Adapted, Mapping[str, Any]], Any]
"""(net, adapter) ↦ a number, or {name: number}"""


@dataclass
class Run:
    """A trial in a slot."""

    trial: Trial
    adapter: Tree
    state: Tree

    @property
    def tree(self) -> Tree:
        """Its tensors."""
        return {"adapter": self.adapter, "state": self.state}


@dataclass(frozen=True)
class Lane:
    """What the runs of one plan have in common.

    Args:
        width: rows of the stack: runs, then copies of the first. The operations are then the same whatever runs.
        fixed: the part of their configurations that is the same for all, and no number.
    """

    net: Adapted
    loss: Loss
    data: Data
    optimizer: Callable[[Config], Step]
    evaluate: Evaluate | None
    width: int
    fixed: Mapping[str, Any]

    def steps(self, runs: Sequence[Run], n: int, tick: Callable[[int], Any]) -> tuple[list[Run], Tensor]:
        """The runs after n steps, and their losses [n, runs]. The given ones are as they were."""
        rows = [*runs, *[runs[0]] * (self.width - len(runs))]
        adapters, states = stack([r.adapter for r in rows]), stack([r.state for r in rows])
        configs = [r.trial.config for r in rows]
        device = next((t.device for t in leaves(adapters)), torch.device("cpu"))
        seeds = torch.tensor([int(c.get("seed", 0)) for c in configs], device=device)
        numbers = {
            k: torch.tensor([float(c[k]) for c in configs], dtype=torch.float64, device=device)
            for k in _numbers(configs[0])
        }
        losses = []
        for i in range(n):
            at = [r.trial.step + i for r in rows]
            batch = _stacked([self.data(c, s) for c, s in zip(configs, at, strict=True)], configs)
            with _undrawn():
                gradients, loss = self._gradients(adapters, key_of(seeds, torch.tensor(at, device=device)), batch)
            with torch.no_grad():
                adapters, states = vmap(self._step)(adapters, gradients, states, numbers)
            losses.append(loss)
            tick(len(runs))
        new = [Run(r.trial, unstacked(adapters, i), unstacked(states, i)) for i, r in enumerate(runs)]
        return new, torch.stack(losses)[:, : len(runs)].cpu()

    def _gradients(self, adapters: Tree, keys: Tensor, batch: Any) -> tuple[Tree, Tensor]:
        """The gradient of each row's loss, and the losses [width].

        One backward pass of the sum, in which rows do not meet: `vmap(grad)` takes 1.2 to 1.6 times as long.
        """

        def one(adapter: Tree, key: Tensor, batch: Any) -> Tensor:
            with Keyed(key):
                return self.loss(self.net, adapter, batch)

        with torch.enable_grad():
            given = mapped(adapters, lambda t: t.detach().requires_grad_())
            losses = vmap(one)(given, keys, batch)
            if losses.dim() != 1:
                raise ValueError(f"sweep: the loss has shape {list(losses.shape[1:])}: return one number")
            found = iter(torch.autograd.grad(losses.sum(), leaves(given), materialize_grads=True))
        return mapped(given, lambda t: next(found)), losses.detach()

    def _step(self, adapter: Tree, gradient: Tree, state: Tree, numbers: Mapping[str, Tensor]) -> tuple[Tree, Tree]:
        """One row's step."""
        updates, state = self.optimizer({**self.fixed, **numbers}).update(gradient, state, adapter)
        return apply(adapter, updates), state

    def evaluated(self, runs: Sequence[Run]) -> list[dict[str, float]]:
        """What `evaluate` says of each run, all in one pass, without dropout."""
        if self.evaluate is None:
            return [{} for _ in runs]
        rows = [*runs, *[runs[0]] * (self.width - len(runs))]
        evaluate = self.evaluate

        def one(adapter: Tree) -> dict[str, Tensor]:
            found = evaluate(self.net, adapter)
            named = found if isinstance(found, Mapping) else {"value": found}
            return {k: torch.as_tensor(v) for k, v in named.items()}

        with torch.no_grad(), Keyed(None), _undrawn():
            found = vmap(one)(stack([r.adapter for r in rows]))
        for k, v in found.items():
            if v.dim() != 1 or k in ("step", "loss"):
                raise ValueError(
                    f"sweep: evaluate's {k!r} has shape {list(v.shape[1:])}: return a number, or {{name: number}} with "
                    "names other than 'step' and 'loss'"
                )
        return [{k: float(v[i]) for k, v in found.items()} for i in range(len(runs))]


@contextmanager
def _undrawn() -> Iterator[None]:
    """What vmap says of a draw, in our words."""
    try:
        yield
    except RuntimeError as e:
        if "called random operation" not in str(e):
            raise
        raise ValueError(
            "sweep: the loss draws random numbers, which no configuration would draw alone. Dropout is each "
            "configuration's own, but not in rematerialised layers (net.checkpointed), and other noise is not: make it "
            "in data, from the configuration and the step, or set it to 0"
        ) from e


def whole(run: Run) -> bool:
    """Whether no tensor of the run has a NaN, and none of its adapter an infinity."""
    finite = all(bool(t.isfinite().all()) for t in leaves(run.adapter))
    return finite and not any(bool(t.isnan().any()) for t in leaves(run.state) if isinstance(t, Tensor))


def _numbers(config: Config) -> list[str]:
    return [k for k, v in config.items() if isinstance(v, int | float) and not isinstance(v, bool)]


def kind(config: Config) -> tuple[tuple[str, ...], dict[str, Any]]:
    """(names of the numbers, the rest): runs of one lane have these in common."""
    names = _numbers(config)
    return tuple(sorted(names)), {k: v for k, v in config.items() if k not in names}


def _stacked(batches: Sequence[Any], configs: Sequence[Config]) -> Any:
    flat = [tree_flatten(b) for b in batches]
    for (ts, spec), config in zip(flat, configs, strict=True):
        odd = next((t for t in ts if not isinstance(t, Tensor)), None)
        if odd is not None:
            raise TypeError(f"sweep: data has a {type(odd).__name__} in the batch of {dict(config)}; give tensors")
        shapes, first = ([list(t.shape) for t in x] for x in (ts, flat[0][0]))
        if spec != flat[0][1] or shapes != first:
            raise ValueError(
                f"sweep: the batches of {dict(configs[0])} and {dict(config)} have shapes {first} and {shapes}; those "
                "that are trained at once must be alike: pad them"
            )
    return tree_unflatten([torch.stack(ts) for ts in zip(*(ts for ts, _ in flat), strict=True)], flat[0][1])
