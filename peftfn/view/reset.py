"""reset_: fresh values in a module that `as_module` made, for one whose storage was made only after it was."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.method import Leaf as Tensors
from peftfn.core.plan import Entry, Plan, draw
from peftfn.core.rng import Rng
from peftfn.tensors.sharded import laid_out, whole
from peftfn.tensors.tree import leaves
from peftfn.view.module import _view, _weight, parameters_of
from peftfn.view.view import leaf_at, owner


def reset_(module: nn.Module, seed: int = 0, name: str | None = None, *, plan_seed: int = 0) -> None:
    """Give an adapter in a module the values of `net.init(seed)`, its constants those of `adapt(…, seed=plan_seed)`.

    After `m.to_empty(device=…)` neither holds anything. Load the base first: some methods start from its weights, which
    are gathered one at a time where they are sharded. Every rank must call this then.

    Args:
        module: what `as_module` gave, or a wrapper around it.
        name: which adapter; None is the one in force.

    Raises ValueError if the base has no values (it is on meta), or the adapter is a sum or a scaling of others.
    """
    view, name = _view(module, name)
    plan: Plan = view._peftfn.plans[name]
    held, weights = parameters_of(view, name), _Weights(view, plan)
    for at, entry in plan.items():
        if _weight(view, at).is_meta:
            raise ValueError(f"{at}: no data (it is on meta); call m.to_empty(device=…) and load the base first")
        if held[at].keys() != entry.spec.keys():
            raise ValueError(f"{at}: the adapter here is a sum, a scaling or prepared, which no seed gives; use copy_")
    sites = {at: entry.site for at, entry in plan.items()}
    for rule, method in plan.rules.items():
        mine = weights.of(at for at, entry in plan.items() if entry.rule == rule)
        if method.overrides("shared"):
            for at, constants in method.shared(Rng(plan_seed, rule, sites=sites), mine).items():
                _fill(_constants(view, at, name), constants)
    for at, entry in plan.items():
        make = partial(draw, site=entry.site, w=weights.parameter(at), bias=weights.bias(entry))
        constants = _constants(view, at, name)
        if entry.method.overrides("frozen"):
            _fill(constants, make(entry.method.frozen, seed=plan_seed))
        dtype = next((t.dtype for t in held[at].values()), torch.float32)
        _fill(held[at], make(entry.method.init, seed=seed, dtype=dtype, constants=constants))
    for bank in plan.banks:
        mine = weights.of(at for at, entry in plan.items() if entry.bank == bank)
        first = next(iter(mine))
        rng = Rng(seed, bank, sites=sites, dtype=next(leaves(held[bank])).dtype, device=mine[first].device)
        _fill(held[bank], plan[first].method.bank(rng, mine))


class _Weights:
    """The base's weights in a view, each made whole when it is asked for, and held by nobody."""

    def __init__(self, view: Any, plan: Plan):
        self.view, self.plan = view, plan

    def parameter(self, at: str) -> Any:
        layer, attr = owner(self.view, at)
        slot = layer.parametrizations[attr]
        return slot[0].read(whole(slot.original.detach()))

    def bias(self, entry: Entry) -> Tensor | None:
        if entry.site.bias is None:
            return None
        layer, attr = owner(self.view, entry.site.bias)
        slots = getattr(layer, "parametrizations", {})
        if attr in slots and getattr(slots[attr][0], "missing", False):
            return None
        b = slots[attr].original if attr in slots else layer._parameters.get(attr)
        return None if b is None else whole(b.detach())

    def of(self, names: Iterator[str]) -> Mapping[str, Tensor]:
        """Canonical weights by name."""
        return _Canonical(self, list(names))


class _Canonical(Mapping[str, Tensor]):
    def __init__(self, weights: _Weights, names: list[str]):
        self.weights, self.names = weights, names

    def __getitem__(self, at: str) -> Tensor:
        if at not in self.names:
            raise KeyError(at)
        return self.weights.plan[at].site.canonical(self.weights.parameter(at))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _constants(view: Any, at: str, name: str) -> dict[str, Any]:
    """The buffers that hold the constants of one site."""
    leaf = leaf_at(view, at, name)
    return {**leaf._buffers, **{k: view._buffers[buffer] for k, buffer in leaf._shared.items()}}


def _fill(held: Mapping[str, Any], values: Tensors) -> None:
    with torch.no_grad():
        for k, value in values.items():
            held[k].copy_(laid_out(value, held[k]))
