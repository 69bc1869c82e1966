"""What adapters put into the slots of a call, kept for their next call: which adapters these were.

Nothing here keeps an adapter alive: what is held of its tensors are views, which go when one of the tensors does.
"""

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn.core.functions import bank_of
from peftfn.core.method import LowRank
from peftfn.slots.slot import OUTLIVED
from peftfn.slots.values import Given
from peftfn.tensors.transform import backward_task, in_function, under_transform
from peftfn.tensors.tree import mapped, unstacked

Weights = Callable[[Collection[str]], list[Any]]
"""sites ↦ what the base has there now"""
Keep = Callable[[Any, Sequence[Given]], Any]
"""(what stood in a slot, the call's adapters) ↦ what can stand there in their next call; None if that must be made"""


class Seen(NamedTuple):
    """The tensors of an adapter, or of a stack, as they were in a call."""

    shape: list[Any]  # of the tree
    ids: list[int]
    geometry: list[Any]

    @classmethod
    def of(cls, adapter: Mapping[str, Any]) -> "Seen":
        shape, tensors = contents(adapter)
        return cls(shape, list(map(id, tensors)), geometry(tensors))

    def is_(self, adapter: Mapping[str, Any]) -> bool:
        """Whether it has the same tensors, which must be alive, with their values in the same places."""
        shape, tensors = contents(adapter)
        return shape == self.shape and list(map(id, tensors)) == self.ids and geometry(tensors) == self.geometry


class Stack(NamedTuple):
    """One plan's adapters in a call that something was kept of."""

    plan: Any
    start: int
    size: int
    seen: Seen


class Made(NamedTuple):
    """What a call's adapters made."""

    values: Mapping[str, Any]
    whole: bool  # whether nothing else stands in the slots of such a call
    stacks: Sequence[Stack] = ()
    training: bool = False
    base: Any = None  # identities and places of the base's weights
    watched: Sequence[Any] = ()  # weak references, whose callbacks are called while somebody holds them


NOTHING = Made({}, False)


class _Recalled(NamedTuple):
    """An adapter by its first leaf, in train or eval mode."""

    first: Any  # a weak reference
    names: list[str]
    training: bool

    def __call__(self, first: Tensor, leaf: Mapping[str, Any], training: bool) -> bool:
        return self.first() is first and self.names == list(leaf) and self.training is training


class Keeper:
    """What the last adapters made in one skeleton. (A skeleton serves one call at a time, and so does this.)"""

    def __init__(self, keep: Keep):
        self._keep = keep
        self._forget()

    @property
    def values(self) -> Mapping[str, Any]:
        """What is kept, by site."""
        return self._made.values

    def _forget(self, _: Any = None) -> None:
        """Hold nothing; also what a weak reference calls, at any moment, when a tensor of an adapter dies."""
        self._made: Made = NOTHING
        self._last: Any = None  # of the last call's adapters one tensor, weakly
        self._vain: _Recalled | None = None  # of which nothing can be kept

    def known(self, plan: Any, adapter: Mapping[str, Any]) -> Stack | None:
        """The stack of which something was kept, so that it fits its plan; None for any other."""
        return next((s for s in self._made.stacks if s.plan is plan and s.seen.is_(adapter)), None)

    def find(self, given: Sequence[Given], training: bool, weights: Weights) -> Made:
        """What these adapters made in their last call and would make again; `NOTHING` if they are others, or one of
        their tensors or of the base's weights was replaced. Such adapters fit their plans, as they did before."""
        made = self._made
        if made is NOTHING or not quiet() or training is not made.training or len(given) != len(made.stacks):
            return NOTHING
        for g, s in zip(given, made.stacks, strict=True):
            same = g.plan is s.plan and (g.start, g.size) == (s.start, s.size)
            if not same or not (g.seen is s.seen or s.seen.is_(g.adapter)):
                return NOTHING
        if _places(weights(made.values)) != made.base:
            return NOTHING
        task = backward_task()
        for v in made.values.values():
            v.task, v.inside = task, False
        return made

    def keep(
        self,
        given: Sequence[Given],
        training: bool,
        made: Mapping[str, Any],
        lanes: Collection[str],
        weights: Weights,
    ) -> None:
        """Keep what can be of `made`, if the same adapters were used in the call before: many are used but once.

        lanes: the sites whose layers are called on their values directly.
        """
        leaf: Mapping[str, Any] = next(iter(given[0].adapter.values()), {})
        first = next(iter(leaf.values()), None)
        if not isinstance(first, Tensor) or not quiet():
            return
        last, self._last = self._last, weakref.ref(first)
        if last is None or last() is not first or (self._vain and self._vain(first, leaf, training)):
            return
        values = {n: new for n, v in made.items() if n in lanes and (new := self._keep(v, given)) is not None}
        tensors = [t for g in given for t in contents(g.adapter)[1]]
        if not values or not all(type(t) in (Tensor, nn.Parameter) for t in tensors):
            self._vain = _Recalled(self._last, list(leaf), training)
            return
        stacks = [Stack(g.plan, g.start, g.size, Seen.of(g.adapter)) for g in given]
        watched = [weakref.ref(t, self._forget) for t in tensors]
        self._made = Made(values, len(values) == len(made), stacks, training, _places(weights(values)), watched)


class Views:
    """The adapter that a call took out of a stack: the next call has the same views, so that what these made is found.

    As in a `Keeper`, it is for calls without gradients, and from the second of two on.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self, _: Any = None) -> None:
        self._held: tuple[Stack, int, dict[str, Any], list[Any]] | None = None
        self._last: Any = None

    def known(self, plan: Any, stacked: Mapping[str, Any]) -> Stack | None:
        """As of a `Keeper`."""
        stack = None if self._held is None else self._held[0]
        return stack if stack is not None and stack.plan is plan and stack.seen.is_(stacked) else None

    def take(self, given: Given, i: int) -> dict[str, Any]:
        """Adapter i of a plan's stack."""
        held, stacked = self._held, given.adapter
        if not quiet():
            return unstacked(stacked, i)
        if held is not None and held[1] == i and (given.seen is held[0].seen or held[0].seen.is_(stacked)):
            return held[2]
        tensors = contents(stacked)[1]
        if not tensors or not all(type(t) in (Tensor, nn.Parameter) for t in tensors):
            return unstacked(stacked, i)
        last, self._last = self._last, (weakref.ref(tensors[0]), i)
        if last is None or last[0]() is not tensors[0] or last[1] != i:
            return unstacked(stacked, i)
        views = unstacked(mapped(stacked, Tensor.detach), i)  # a view holds what it is a view of
        stack = Stack(given.plan, given.start, given.size, Seen.of(stacked))
        self._held = stack, i, views, [weakref.ref(t, self._forget) for t in tensors]
        return views


def quiet() -> bool:
    """Whether this is a plain call without gradients: no transform, no tracer."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or under_transform()
        or in_function()
    )


def unmade(low: LowRank, entry: Any, p: Mapping[str, Tensor], w: Any, adapter: Mapping[str, Any]) -> bool:
    """Whether a low-rank change is nothing but tensors of the adapter or of the plan, in the dtype of a plain weight.

    p: what the method has at the site.
    """
    if type(w) not in (Tensor, nn.Parameter) or entry.site.quantised or type(low.scale) not in (int, float):
        return False
    if entry.adds_bias or entry.changes_bias:  # which is computed, and the layer's own as it is now
        return False
    own = {id(t) for held in (adapter[entry.site.name], entry.frozen, bank_of(entry, adapter)) for t in held.values()}
    read = [t for t in (low.down, low.up, low.gain) if t is not None]
    return all(id(t) in own for t in (*read, *p.values())) and all(t.dtype is w.dtype for t in read)


def alive(references: Mapping[str, Any], site: str) -> dict[str, Tensor]:
    """The tensors of weak references: the caller's adapter holds them for the length of the call."""
    tensors = {k: t() for k, t in references.items()}
    if any(t is None for t in tensors.values()):
        raise RuntimeError(OUTLIVED.format(name=site))
    return tensors


def contents(adapter: Mapping[str, Any]) -> tuple[list[Any], list[Any]]:
    """The shape of an adapter's tree (its sites, how many tensors each has, their names), and the tensors."""
    leaves = list(adapter.values())
    try:
        tensors = [*chain.from_iterable(map(dict.values, leaves))]
    except TypeError:  # other mappings
        if not all(isinstance(leaf, Mapping) for leaf in leaves):
            return [None], []  # no adapter, so that nothing was made of it
        tensors = [t for leaf in leaves for t in leaf.values()]
    return [*adapter, *map(len, leaves), *chain.from_iterable(leaves)], tensors


def geometry(tensors: Sequence[Tensor]) -> list[Any]:
    """Where tensors have their values: what assigning to `.data` changes, and no write in place does."""
    return [*map(Tensor.data_ptr, tensors), *map(Tensor.size, tensors), *map(Tensor.stride, tensors)]


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], list[Any]]:
    return list(map(id, tensors)), geometry(tensors)
