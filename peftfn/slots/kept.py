"""What one adapter puts into the slots of a call, kept for its next call.

An adapter that serves many calls makes the same values each time: the same tensors, transposed for the same products.
A `Kept` is an adapted weight that has them transposed already. It is for calls without gradients; where a forward turns
gradients on, it is the adapted weight that it was made of.

Nothing here keeps an adapter alive: what is held of its tensors are views, which go when one of the tensors does.
"""

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peftfn.core.method import LowRank
from peftfn.kernels import choose
from peftfn.kernels.lora_linear import accumulated
from peftfn.slots.slot import OUTLIVED
from peftfn.slots.values import Given
from peftfn.slots.weight import AdaptedWeight
from peftfn.tensors.operand import Operand
from peftfn.tensors.transform import backward_task, in_function, lasting, under_transform

Weights = Callable[[Collection[str]], list[Any]]
"""sites ↦ what the base has there now"""


class Kept(AdaptedWeight):
    """An adapted weight that serves several calls: a low-rank change of a plain matrix, of one dtype throughout."""

    __slots__ = ("down", "gain", "kind", "scale", "tensors", "up", "wide")

    def __init__(self, v: AdaptedWeight, low: LowRank):
        self.entry, self.method, self.fast, self.w = v.entry, v.method, v.fast, v.w
        self.tensors = {k: weakref.ref(t) for k, t in v.p.items()}
        self.scale, self.kind = low.scale, v.w.dtype
        with lasting(), torch.no_grad():
            self.down, self.up, self.wide = low.down.mT, low.up.mT, v.canonical().mT
            self.gain = None if low.gain is None else low.gain.detach()

    @property
    def p(self) -> dict[str, Any]:  # type: ignore[override]
        """What it was made of: the caller's adapter holds these tensors for the length of the call."""
        p = {k: t() for k, t in self.tensors.items()}
        if any(t is None for t in p.values()):
            raise RuntimeError(OUTLIVED.format(name=self.name))
        return p

    @property
    def low(self) -> LowRank | None:  # type: ignore[override]
        return self.method.low_rank(self.p)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.held["bias"]
        if (
            self.task != torch._C._current_graph_task_id()
            or torch.is_grad_enabled()
            or forward_ad._current_level >= 0
            or torch._C._functorch.maybe_current_level() is not None
            or torch._C._is_any_autocast_enabled()
            or not isinstance(x, Tensor)
            or x.dtype is not self.kind
            or not (bias is None or (bias.dtype is self.kind and not isinstance(bias, Operand)))
            or choose.fits(x)
            or not (torch._C._is_fwd_grad_enabled() or not in_function())
        ):
            return super().forward(x)
        flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        s = torch.mm(flat, self.down)
        if self.gain is None:
            y = accumulated(flat, s, self.wide, self.up, bias, self.scale)
        else:
            y = self.gain * accumulated(flat, s, self.wide, self.up, None, self.scale)
            y = y if bias is None else y + bias
        return y if flat is x else y.view(*x.shape[:-1], y.shape[-1])


class Made(NamedTuple):
    """What an adapter made, and what it was made of."""

    values: dict[str, Kept]
    plan: Any
    training: bool
    shape: list[Any]  # of the adapter's tree
    ids: list[int]
    geometry: list[Any]
    watched: list[Any]  # weak references, whose callbacks are called while somebody holds them


class Recalled(NamedTuple):
    """An adapter by its first leaf, in train or eval mode."""

    first: Any  # a weak reference
    names: list[str]
    training: bool

    def __call__(self, first: Tensor, leaf: Mapping[str, Any], training: bool) -> bool:
        return self.first() is first and self.names == list(leaf) and self.training is training


class Keeper:
    """What the last adapter made in one skeleton. (A skeleton serves one call at a time, and so does this.)"""

    def __init__(self) -> None:
        self._forget()

    @property
    def values(self) -> Mapping[str, Kept]:
        """What is kept, by site."""
        return {} if self._made is None else self._made.values

    def _forget(self, _: Any = None) -> None:
        """Hold nothing; also what a weak reference calls, at any moment, when a tensor of the adapter dies."""
        self._made: Made | None = None
        self._last: Any = None  # of the last call's adapter one tensor, weakly
        self._vain: Recalled | None = None  # of which nothing can be kept

    def find(self, given: Given, training: bool, weights: Weights) -> Mapping[str, Kept]:
        """What `given` made in its last call and would make again, by site; nothing if it is another adapter, or one of
        its tensors or of the base's weights was replaced. Such an adapter fits its plan, as it did before."""
        made = self._made
        if made is None or not quiet():
            return {}
        now, tensors = contents(given.adapter)
        if given.plan is not made.plan or training is not made.training or now != made.shape:
            return {}
        tensors += weights(made.values)
        if list(map(id, tensors)) != made.ids or geometry(tensors) != made.geometry:
            return {}
        task = backward_task()
        for v in made.values.values():
            v.task, v.inside = task, False
        return made.values

    def keep(
        self, given: Given, training: bool, made: Mapping[str, Any], lanes: Collection[str], weights: Weights
    ) -> None:
        """Keep what can be of `made`, if the same adapter was used in the call before: many are used but once.

        lanes: the sites whose layers are called on their values directly.
        """
        leaf: Mapping[str, Any] = next(iter(given.adapter.values()), {})
        first = next(iter(leaf.values()), None)
        if not isinstance(first, Tensor) or not quiet():
            return
        last, self._last = self._last, weakref.ref(first)
        if last is None or last() is not first or (self._vain and self._vain(first, leaf, training)):
            return
        shape, tensors = contents(given.adapter)
        values = {n: Kept(v, low) for n, v in made.items() if n in lanes and (low := _alike(v, given)) is not None}
        if not values or not all(type(t) in (Tensor, nn.Parameter) for t in tensors):
            self._vain = Recalled(self._last, list(leaf), training)
            return
        watched = [weakref.ref(t, self._forget) for t in tensors]
        tensors += weights(values)
        ids, at = list(map(id, tensors)), geometry(tensors)
        self._made = Made(values, given.plan, training, shape, ids, at, watched)


def quiet() -> bool:
    """Whether this is a plain call without gradients: no transform, no tracer."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or under_transform()
        or in_function()
    )


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


def _alike(v: Any, given: Given) -> LowRank | None:
    """The low-rank change that v is, if all of it is the caller's own tensors, or the plan's, in the weight's dtype."""
    if type(v) is not AdaptedWeight or v.low is None or v.low.dropout or type(v.low.scale) not in (int, float):
        return None
    low, entry = v.low, v.entry
    if entry.adds_bias or entry.changes_bias:  # which is computed, and the layer's own as it is now
        return None
    bank = given.adapter[entry.bank] if entry.bank else {}
    own = {id(t) for held in (given.adapter[entry.site.name], entry.frozen, bank) for t in held.values()}
    read = [t for t in (low.down, low.up, low.gain) if t is not None]
    plain = not entry.site.quantised and len(v.w.shape) == low.down.dim() == low.up.dim() == 2
    if not plain or type(v.w) not in (Tensor, nn.Parameter) or not all(id(t) in own for t in (*read, *v.p.values())):
        return None
    return low if all(t.dtype is v.w.dtype for t in read) else None
