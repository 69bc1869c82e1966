"""Steps for one adapter among many: its own gradient norm, schedule and rate, each by its own count."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from peftfn.tensors.tree import leaves, stack_size
from peftfn.tools.adam import Rate
from peftfn.tools.step import Step, Tree, checked, each, number, part

Schedule = Callable[[Tensor], Tensor]
"""count of the steps before this one ↦ factor of the update"""


def clip(max_norm: Rate) -> Step:
    """Return clipping by the norm of the whole gradient, as torch.nn.utils.clip_grad_norm_; put it before an optimizer.

    On a stack (`stacked`, or `vmap`) each adapter has its own norm. A gradient with a NaN stays one.

    Args:
        max_norm: the largest norm; above 0.

    Returns:
        A `Step` without state.

    Raises:
        ValueError: a norm that is not above 0.

    Example:
        step = pf.steps.chain(pf.steps.clip(1.0), pf.steps.sgd(0.1))
        updates, _ = step.update({"w": {"a": torch.tensor([3.0, 4.0])}}, step.init({}), {"w": {"a": torch.zeros(2)}})
        assert torch.allclose(updates["w"]["a"], torch.tensor([-0.06, -0.08]), atol=1e-5)
    """
    number("clip", "max_norm", max_norm)
    if not isinstance(max_norm, Tensor) and not max_norm > 0:
        raise ValueError(f"clip: max_norm is {max_norm!r}; it must be above 0")

    def update(g: Mapping[str, Any], state: Tree, a: Mapping[str, Any]) -> tuple[Tree, Tree]:
        norms = [torch.linalg.vector_norm(t) for t in leaves(g)]
        if not norms:
            return dict(g), state
        factor = (max_norm / (torch.linalg.vector_norm(torch.stack(norms)) + 1e-6)).clamp(max=1.0)
        return each(g, lambda t: t * factor.to(t.dtype)), state

    return Step(lambda a: {}, update)


def scheduled(schedule: Schedule) -> Step:
    """Return the rule for updates that multiplies them by a schedule; put it after an optimizer.

    As in torch, decoupled weight decay is multiplied too.

    Args:
        schedule: the number of steps taken before this one, a tensor of no dimensions, ↦ factor: `cosine` and `linear`
            make one, and so does any function of tensors.

    Returns:
        A `Step` whose state is the count.

    Raises:
        TypeError: the schedule is no function.

    Example:
        step = pf.steps.chain(pf.steps.adamw(1e-3), pf.steps.scheduled(pf.steps.cosine(100, warmup=10)))
        state = step.init({"w": {"a": torch.zeros(2)}})
    """
    if not callable(schedule):
        raise TypeError(f"scheduled: the schedule is {schedule!r}; give a function of the count, like cosine(100)")

    def update(g: Mapping[str, Any], state: Tree, a: Mapping[str, Any]) -> tuple[Tree, Tree]:
        count = part(state, "count")
        factor = schedule(count)
        return each(g, lambda t: t * factor.to(t.dtype)), {"count": count + 1}

    return Step(lambda a: {"count": torch.zeros((), dtype=torch.float64)}, update)


def cosine(total: Rate, *, warmup: Rate = 0, end: Rate = 0.0) -> Schedule:
    """Return the schedule that rises to 1 in a line, then falls to `end` as a cosine.

    Args:
        total: steps in all. From then on it is `end`.
        warmup: steps of the rise: step i of them has (i + 1) / warmup.
        end: where it ends.

    Returns:
        A function of the count, for `scheduled`.

    Raises:
        ValueError: a number below 0, or a warmup above total.

    Example:
        f = pf.steps.cosine(10, warmup=2)
        assert torch.allclose(f(torch.tensor([0.0, 2.0, 6.0, 10.0])), torch.tensor([0.5, 1.0, 0.5, 0.0]), atol=1e-6)
    """
    _check_lengths("cosine", total, warmup, end)
    return _warmed(lambda done: end + (1 - end) * (1 + torch.cos(math.pi * done)) / 2, total, warmup)


def linear(total: Rate, *, warmup: Rate = 0, end: Rate = 0.0) -> Schedule:
    """Return the schedule that rises to 1 in a line, then falls to `end` in a line.

    Args:
        total, warmup, end: as for `cosine`.

    Returns:
        A function of the count, for `scheduled`.

    Raises:
        ValueError: a number below 0, or a warmup above total.

    Example:
        f = pf.steps.linear(10, warmup=2)
        assert torch.allclose(f(torch.tensor([0.0, 2.0, 6.0, 10.0])), torch.tensor([0.5, 1.0, 0.5, 0.0]))
    """
    _check_lengths("linear", total, warmup, end)
    return _warmed(lambda done: end + (1 - end) * (1 - done), total, warmup)


def _check_lengths(where: str, total: Rate, warmup: Rate, end: Rate) -> None:
    """ValueError for numbers that are below 0, and for a rise that is longer than all of it; tensors are not asked."""
    checked(where, total=total, warmup=warmup, end=end)
    if not isinstance(total, Tensor) and not isinstance(warmup, Tensor) and warmup > total:
        raise ValueError(f"{where}: warmup is {warmup}, and total is {total}: give warmup <= total")


def _warmed(fall: Callable[[Tensor], Tensor], total: Rate, warmup: Rate) -> Schedule:
    def schedule(count: Tensor) -> Tensor:
        rest, risen = torch.as_tensor(total - warmup), torch.as_tensor(warmup)  # both may be 0
        done = ((count - warmup) / rest.clamp(min=1)).clamp(0, 1)
        return torch.where(count < risen, (count + 1) / risen.clamp(min=1), fall(done))

    return schedule


def stacked(make: Callable[..., Step], **values: Tensor | Iterable[float]) -> Step:
    """Return the step of a stack of adapters: adapter i has make(**{name: values[name][i]}), and a state of its own.

    Nothing of one adapter enters another's step: not its norm, its count, nor a NaN. `optax.inject_hyperparams` is its
    like: the values are in the state, so that they may change from step to step.

    Args:
        make: returns a `Step`, and takes numbers as tensors of no dimensions: `sgd`, `adamw`, or a function of yours.
        values: by the name of make's argument, a number for each adapter. None: all adapters have `make()`.

    Returns:
        A `Step` of stacks, in whose state each tensor is [k, …].

    Raises:
        ValueError: there are more or fewer values than adapters.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        many = pf.stack([net.init(seed=0), net.init(seed=1)])
        step = pf.steps.stacked(pf.steps.adamw, lr=[1e-3, 1e-2], weight_decay=[0.0, 0.1])
        state = step.init(many)
    """
    given = {name: torch.as_tensor([float(x) for x in v], dtype=torch.float64) for name, v in values.items()}

    def init(a: Mapping[str, Any]) -> Tree:
        k = stack_size(a)
        for name, v in given.items():
            if len(v) != k:
                raise ValueError(f"stacked: {name} has {len(v)} values for {k} adapters; give one for each")
        device = leaves(a)[0].device  # of counts too: they have a row for each adapter
        here = {name: v.to(device) for name, v in given.items()}
        state = vmap(lambda a, v: make(**v).init(a))(dict(a), here)
        return {"values": here, "step": each(state, lambda t: t.to(device))}

    def update(g: Mapping[str, Any], state: Tree, a: Mapping[str, Any]) -> tuple[Tree, Tree]:
        def one(g: Tree, s: Tree, a: Tree, v: dict[str, Tensor]) -> tuple[Tree, Tree]:
            return make(**v).update(g, s, a)

        updates, new = vmap(one)(dict(g), state["step"], dict(a), state["values"])
        return updates, {"values": state["values"], "step": new}

    return Step(init, update)
