"""reset_: write fresh values into a module that `as_module` made, for one that was made on the meta device."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from peftfn.core import functions
from peftfn.core.method import Leaf as Tensors
from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Plan
from peftfn.core.rng import Rng
from peftfn.tensors.sharded import laid_out, whole
from peftfn.tensors.tree import leaves
from peftfn.view.module import _view, parameters_of
from peftfn.view.view import constants_of, leaf_at, owner, weight_at


@checks_numbers
def reset_(module: nn.Module, seed: int = 0, name: str | None = None, *, plan_seed: int = 0) -> None:
    """Overwrite an adapter in a module with the values of `net.init(seed)`, and its constants with those of `adapt`.

    Use it after `m.to_empty(device=…)`, which leaves both uninitialised. Load the base first: some methods start from
    its weights, which are gathered one at a time if they are sharded. Every rank must call this then.

    Args:
        module: what `as_module` returned, or a wrapper around it.
        seed: the seed of `net.init`.
        name: which adapter; None is the active one.
        plan_seed: the seed of `adapt`.

    Raises:
        ValueError: the base has no values (it is on meta), or the adapter is a sum or a scaling of others.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init(seed=0))
        pf.reset_(m, seed=1)
    """
    view, name = _view(module, name)
    plan: Plan = view._peftfn.plans[name]
    held, weights = parameters_of(view, name), _Weights(view, plan)
    for at, entry in plan.items():
        if weight_at(view, entry.site).is_meta:
            raise ValueError(f"{at}: no data (it is on meta); call m.to_empty(device=…) and load the base first")
        if held[at].keys() != entry.spec.keys():
            raise ValueError(f"{at}: the adapter is a sum, a scaling or prepared, which no seed determines; use copy_")
    sites = {at: entry.site for at, entry in plan.items()}
    for rule, method in plan.rules.items():
        if method.overrides("shared"):
            mine = functions.Canonical({at: s for at, s in sites.items() if plan[at].rule == rule}, weights)
            for at, made in method.shared(Rng(plan_seed, rule, sites=sites), mine).items():
                _fill(constants_of(view, leaf_at(view, at, name)), made)
    for at, entry in plan.items():
        constants = constants_of(view, leaf_at(view, at, name))
        _fill(constants, functions.constants(entry, weights, plan_seed))
        dtype = next((t.dtype for t in held[at].values()), torch.float32)
        _fill(held[at], functions.leaf(entry, weights, seed, dtype, constants))
    for bank in plan.banks:
        _fill(held[bank], functions.shared_leaf(plan, bank, weights, seed, leaves(held[bank])[0].dtype))


class _Weights(Mapping[str, Any]):
    """The base's weights and biases in a view by slot, each made whole when it is asked for, and held by nobody."""

    def __init__(self, view: Any, plan: Plan):
        self.view, self.plan = view, plan

    def __getitem__(self, slot: str) -> Any:
        if slot in self.plan and self.plan[slot].site in self.plan.places:
            return weight_at(self.view, self.plan[slot].site)
        if slot in self.plan:
            layer, attr = owner(self.view, slot)
            held = layer.parametrizations[attr]
            return held[0].read(whole(held.original.detach()))
        if not any(slot == e.site.bias for e in self.plan.values()):
            raise KeyError(slot)
        layer, attr = owner(self.view, slot)
        slots = getattr(layer, "parametrizations", {})
        if attr in slots and getattr(slots[attr][0], "missing", False):
            return None
        b = slots[attr].original if attr in slots else layer._parameters.get(attr)
        return None if b is None else whole(b.detach())

    def __iter__(self) -> Iterator[str]:
        return iter(self.plan.slots)

    def __len__(self) -> int:
        return len(self.plan.slots)


def _fill(held: Mapping[str, Any], values: Tensors) -> None:
    with torch.no_grad():
        for k, value in values.items():
            held[k].copy_(laid_out(value, held[k]))
