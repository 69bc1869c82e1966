"""Every way from an adapter to an output; what each must give is in meaning.py."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

import peftfn as pf
from peftfn.testing.case import Case, close, shaken
from peftfn.testing.party import Party, tracked
from peftfn.view.module import parameters_of

INDEX, SORTED = [2, -1, 0, 2, 1], [0, 0, 1, 2, 2]
"""Which of three adapters each row uses in a mixed batch; −1: the base."""


class _OfOthers(torch.autograd.Function):
    """y, which was computed from the leaves `made`, as a function of tensors that have their values."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, made: list[Tensor], *given: Tensor) -> Tensor:
        ctx.graph = y, made
        return y.detach().clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:  # type: ignore[override]
        y, made = ctx.graph
        return None, None, *torch.autograd.grad(y, made, slope, allow_unused=True, retain_graph=True)


def _of(y: Tensor, made: Any, given: pf.Adapter) -> Tensor:
    """y, computed from the adapter `made`, as a function of `given`, which has its values."""
    if not y.requires_grad:
        return y
    names = [(n, k) for n, leaf in given.items() for k in leaf]
    out: Tensor = _OfOthers.apply(y, [made[n][k] for n, k in names], *(given[n][k] for n, k in names))  # type: ignore[no-untyped-call]
    return out


def _vmap(s: Party, g: Tensor) -> Tensor:
    out: Tensor = vmap(s.net.apply, (0, None))(s.stack, s.x)[[2, 1, 0, 2, 1], range(5)]
    return out


def _merge(s: Party, g: Tensor) -> Tensor:
    out: Tensor = functional_call(s.net.model, s.net.merge(s.first), (s.x,), tie_weights=False)
    return out


def _as_module(s: Party, g: Tensor) -> Tensor:
    m = pf.as_module(s.net, s.first)
    return _of(m(s.x), parameters_of(m), s.first)


def _file(s: Party, g: Tensor) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        pf.save(folder, s.net, s.first)
        net, read = pf.load(folder, s.net.model)
    made = tracked(read)
    return _of(net.apply(made, s.x), made, s.first)


def _bank(s: Party, g: Tensor) -> Tensor:
    bank = pf.bank({str(k): way for k, way in enumerate(s.all)})
    out: Tensor = bank.apply(["__base__" if k < 0 else str(k) for k in _of_all(s)], s.x)
    return out


def _of_all(s: Party) -> list[int]:
    """Which adapter each row uses of those of all nets."""
    return [2, -1, s.count - 1, s.count - 2, 1]


def _mixed_nets(s: Party, order: int) -> Tensor:
    nets, stacks, numbers = s.together(order)
    out: Tensor = nets.mixed(stacks, [k if k < 0 else numbers.index(k) for k in _of_all(s)], s.x)
    return out


def _gated_nets(s: Party, g: Tensor, order: int) -> Tensor:
    nets, stacks, numbers = s.together(order)
    out: Tensor = nets.gated(stacks, g[..., numbers], s.x)
    return out


@dataclass(frozen=True)
class Route:
    """run: (party, gates) ↦ an output for each row: the base's plus the sum of the adapters' changes times `gates`,
    which are [adapters], [rows, adapters] or [rows, tokens, adapters]; where: the cases that have the route."""

    run: Callable[[Party, Tensor], Tensor]
    gates: Callable[[Party], Tensor]
    where: Callable[[Case], bool] = lambda c: True
    differentiable: bool = True


def _merges(c: Case) -> bool:
    has = dict(c.model.named_parameters(remove_duplicate=False))
    return c.merges and all(not e.adds_bias or e.site.bias in has for e in c.net.plan.values())


def _rowed(c: Case) -> bool:
    return c.kind.rowed


def _tokens(c: Case) -> bool:
    return c.kind.rowed and c.kind.kind in ("linear", "linear_t", "embedding", "other", "module")


def _first(s: Party) -> Tensor:
    return s.hot([0])[0]


def _mixed(index: list[int]) -> Route:
    return Route(lambda s, g: s.net.mixed(s.stack, index, s.x), lambda s: s.hot(index), _rowed)


def _summed(c: Case) -> bool:
    """Whether a weighted sum of adapters has a meaning: that of virtual tokens has none."""
    return c.kind.rowed and c.kind.kind != "tokens"


def _gated(gates: Callable[[Party], Tensor], where: Callable[[Case], bool] = _summed) -> Route:
    return Route(lambda s, g: s.net.gated(s.stack, g, s.x), gates, where)


def _frozen(adapter: pf.Adapter) -> Any:
    """The same tensors in leaves that cannot be written."""
    return {n: MappingProxyType(leaf) for n, leaf in adapter.items()}


def _again(s: Party, adapter: pf.Adapter) -> Tensor:
    """Without gradients, after calls with another adapter, and again: what the calls before made may serve one, and
    must be its own, also where an adapter's leaves are mappings of another kind."""
    other, frozen = _frozen(shaken(adapter, 5)), _frozen(adapter)
    with torch.no_grad():
        *_, first = (s.net.apply(a, s.x) for a in (other, other, other, frozen))
        *_, out = (s.net.apply(adapter, s.x) for _ in range(3))
    close(first, out, "called with another adapter before")
    return out


def _rows_again(s: Party, index: list[int], prepared: bool = False) -> Tensor:
    """After calls with other rows, and with another stack, whose leaves are mappings of another kind."""
    stack = pf.stack([s.net.prepare(a) for a in s.groups[0]]) if prepared else s.stack
    other, frozen = _frozen(shaken(stack, 5)), _frozen(stack)
    rows = [1, 0, 2, 1, 0]
    with torch.no_grad():
        for given in (other, other, other, frozen):
            first: Tensor = s.net.mixed(given, index, s.x)
        for others in (rows, [0, 1, 1, 2, 2], rows):
            s.net.mixed(stack, others, s.x)
        out: Tensor = s.net.mixed(stack, index, s.x)
    close(first, out, "called with another stack before")
    return out


def _nets_again(s: Party) -> Tensor:
    nets, stacks, numbers = s.together(1)
    index = [k if k < 0 else numbers.index(k) for k in _of_all(s)]
    with torch.no_grad():
        *_, out = (nets.mixed(stacks, index, s.x) for _ in range(3))
    return out


def _prepared_rows(s: Party, g: Tensor) -> Tensor:
    out: Tensor = s.net.mixed(pf.stack([s.net.prepare(a) for a in s.groups[0]]), INDEX, s.x)
    return out


def _hot_of_all(s: Party) -> Tensor:
    return s.hot(_of_all(s), s.count)


def _gates_of_all(s: Party) -> Tensor:
    return s.gates(5, count=s.count)


ROUTES = {
    "apply": Route(lambda s, g: s.net.apply(s.first, s.x), _first),
    "apply under vmap": Route(_vmap, lambda s: s.hot([2, 1, 0, 2, 1])),
    "apply, prepared": Route(lambda s, g: s.net.apply(s.net.prepare(s.first), s.x), _first),
    "apply, called again": Route(lambda s, g: _again(s, s.first), _first, differentiable=False),
    "apply, prepared, called again": Route(
        lambda s, g: _again(s, s.net.prepare(s.first)), _first, differentiable=False
    ),
    "merge": Route(_merge, _first, _merges),
    "as_module": Route(_as_module, _first),
    "a file": Route(_file, _first),
    "mixed": _mixed(INDEX),
    "mixed, one adapter": _mixed([0] * 5),
    "mixed, called again": Route(
        lambda s, g: _rows_again(s, INDEX), lambda s: s.hot(INDEX), _rowed, differentiable=False
    ),
    "mixed, sorted, called again": Route(
        lambda s, g: _rows_again(s, SORTED), lambda s: s.hot(SORTED), _rowed, differentiable=False
    ),
    "mixed, prepared, called again": Route(
        lambda s, g: _rows_again(s, INDEX, prepared=True), lambda s: s.hot(INDEX), _rowed, differentiable=False
    ),
    "mixed, prepared": Route(_prepared_rows, lambda s: s.hot(INDEX), _rowed),
    "gated by adapter": _gated(lambda s: s.gates()),
    "gated by row": _gated(lambda s: s.gates(5)),
    "gated by token": _gated(lambda s: s.gates(5, s.x.shape[1]), _tokens),
    "gated, one-hot": _gated(lambda s: s.hot(INDEX), _rowed),
    "several nets, mixed": Route(lambda s, g: _mixed_nets(s, 1), _hot_of_all, _rowed),
    "several nets in the other order, mixed": Route(lambda s, g: _mixed_nets(s, -1), _hot_of_all, _rowed),
    "several nets, mixed, called again": Route(lambda s, g: _nets_again(s), _hot_of_all, _rowed, differentiable=False),
    "several nets, gated": Route(lambda s, g: _gated_nets(s, g, 1), _gates_of_all, _summed),
    "several nets in the other order, gated": Route(lambda s, g: _gated_nets(s, g, -1), _gates_of_all, _summed),
    "bank": Route(_bank, _hot_of_all, _rowed, differentiable=False),
}
