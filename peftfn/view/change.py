"""attach_ and detach_: adapters come into a module that exists, and leave it.

A module has a slot at each site of the nets that it was made of. An adapter that changes these sites alone becomes a
leaf in each of their slots, and nothing else of the module changes: parameters, names, classes and compiled code stay.
"""

from collections.abc import Mapping
from dataclasses import replace
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.plan import Adapter, Entry, Plan
from peftfn.net.net import Adapted
from peftfn.tensors.sharded import is_sharded
from peftfn.tensors.tree import leaves, mapped
from peftfn.view.active import View
from peftfn.view.held import Held, Leaf, Paths
from peftfn.view.make import check_name
from peftfn.view.module import _view, adapter_of
from peftfn.view.view import (
    changes_bias_at,
    constants_of,
    held_at,
    hold_bank,
    leaf_at,
    leaves_of,
    share_constants,
    tell_,
    weight_at,
    without_constants,
)


def attach_(
    module: nn.Module,
    name: str,
    adapter: Mapping[str, Any] | tuple[Adapted, Mapping[str, Any]],
    *,
    trainable: bool = True,
) -> None:
    """Add an adapter to a module. It is not active until `use` or `use_` says so.

    What the module holds stays: its parameters, their names in a state dict, and the optimizers that have them. A
    compiled module compiles once for the new name. An optimizer gets the new leaves by `add_param_group`.

    Args:
        module: what `as_module` returned, before DDP or FSDP wraps it.
        name: the adapter's name.
        adapter: an adapter of the net that the module was made of, or a pair (another net of the same model, its
            adapter). That net may change the parameters and modules that the module's nets change, and no others. Its
            tensors are copied to the devices of the weights.
        trainable: whether its leaves require gradients.

    Raises:
        KeyError, TypeError: the adapter does not fit its net.
        ValueError: the name is invalid or taken; an adapter without its net, where the module has several nets; the net
            changes what the module has no slot for; tensors on the meta device; a wrapped or sharded module. The
            module has not changed.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, one=net.init(seed=1))
        pf.attach_(m, "two", net.init(seed=2))
        with m.use("two"):
            y = m(torch.randn(3, 8))
    """
    view = _unwrapped(module, "attach_")
    state = view._peftfn
    check_name("attach_", name)
    if name in state.plans:
        raise ValueError(f"attach_: the module has an adapter {name!r}; write its values with copy_, or detach_ it")
    plan, a, sibling = _meant(view, name, adapter)
    plan.check(a)
    for entry in plan.values():
        _check_slot(view, name, entry)
    homes = _homes(view, plan)
    for at, device in homes.items():
        if device.type != "meta" and any(t.is_meta for t in leaves(a[at])):
            raise ValueError(f"attach_: {at}: adapter {name!r} has no data (it is on meta)")
    a = {at: mapped(a[at], methodcaller("to", device)) for at, device in homes.items()}
    if sibling is None:
        plan, kept = _moved(plan, homes), without_constants(plan)
    else:
        kept = state.plans[sibling]
    names = share_constants(view, [plan], {id(view._buffers[k]): k for k in state.constants})
    banks: dict[str, Paths] = {bank: hold_bank(view, name, bank, a[bank], trainable) for bank in plan.banks}
    for at, entry in plan.items():
        held: Held = held_at(view, entry.site)
        leaf = Leaf(entry, a[at], view, names, banks.get(entry.bank or "", []), trainable)
        held.add_module(name, leaf.train(held.training))
    if plan.gated:
        tell_(view)
    state.plans[name], state.banks[name], state.constants = kept, banks, state.constants | set(names.values())
    state.choice.several = len(state.plans) > 1


def detach_(module: nn.Module, name: str) -> Adapter:
    """Remove an adapter from a module. The parameters, names and values of the others stay.

    Args:
        module: what `as_module` returned, without a wrapper of DDP or FSDP around it.
        name: which adapter. It must not be active, nor the only one.

    Returns:
        The adapter, detached: {site: {name: tensor}}. An optimizer that has its leaves keeps them.

    Raises:
        KeyError: the module has no adapter of this name.
        ValueError: the adapter is active in some thread, is the default or the only one; or a wrapped or sharded
            module. The module has not changed.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, one=net.init(seed=1), two=net.init(seed=2))
        b = pf.detach_(m, "two")
        assert [row.name for row in pf.status(m).adapters] == ["one"]
    """
    view = _unwrapped(module, "detach_")
    state = _view(view, name)[0]._peftfn
    if len(state.plans) == 1:
        raise ValueError(
            f"detach_: {name!r} is the module's only adapter, and a module has at least one. m.use_(None) makes the "
            "base active; the model without slots is the net's, net.model"
        )
    if state.choice.has(name):
        raise ValueError(f"detach_: adapter {name!r} is active, or is the default; call m.use_ of another one first")
    before = adapter_of(view, name, buffers=True)
    for entry in state.plans[name].values():
        del held_at(view, entry.site)[name]
    for paths in state.banks[name].values():
        for _, key in paths:
            (view._parameters if key in view._parameters else view._buffers).pop(key)
    used = {key for leaf in leaves_of(view) for key in leaf._shared.values()}
    for key in state.constants - used:
        del view._buffers[key]
    state.constants &= used
    del state.plans[name], state.banks[name]
    state.offloaded.discard(name)
    state.choice.several = len(state.plans) > 1
    return before


def _unwrapped(module: Any, what: str) -> Any:
    """The view, itself or compiled: other wrappers list its parameters when they are made."""
    view: Any = getattr(module, "_orig_mod", module)
    if not isinstance(view, View):
        _view(module, None, any_name=True)  # raises if there is none inside either
        raise ValueError(
            f"{what}: the module is inside of a {type(module).__name__}, which would not know of the change; change "
            "what as_module returned, and wrap it then"
        )
    if any(is_sharded(p) for p in module.parameters()):
        raise ValueError(f"{what}: the module is sharded; change it before fully_shard")
    return view


def _meant(view: Any, name: str, given: Any) -> tuple[Plan, Any, str | None]:
    """(plan, adapter, one of the view's adapters that has this very plan), the plan with the constants in the view."""
    plans: dict[str, Plan] = view._peftfn.plans
    if not isinstance(given, tuple):
        if len({id(plan) for plan in plans.values()}) > 1:
            raise ValueError(
                f"attach_: the module has adapters of several nets; pass {name!r} with its own, (net, adapter)"
            )
        sibling = next(iter(plans))
        return _with_constants(view, sibling), given, sibling
    if len(given) != 2 or not isinstance(given[0], Adapted):
        raise TypeError(f"attach_: {name!r} is a tuple and no pair (net, adapter)")
    net, a = given
    for sibling in {id(plan): sibling for sibling, plan in plans.items()}.values():
        plan = _with_constants(view, sibling)
        if _alike(plan, net.plan):
            return plan, a, sibling
    return net.plan, a, None


def _with_constants(view: Any, name: str) -> Plan:
    plan: Plan = view._peftfn.plans[name]
    entries = {at: replace(e, frozen=constants_of(view, leaf_at(view, at, name))) for at, e in plan.items()}
    return Plan(entries, plan.rules, plan.banks)


def _alike(ours: Plan, given: Plan) -> bool:
    """Whether two plans do the same at the same sites, with the same constants."""

    def equal(a: Tensor, b: Tensor) -> bool:
        if a is b or a.shape != b.shape or a.is_meta or b.is_meta:
            return a.shape == b.shape
        return torch.equal(a.to(b), b)

    if ours.keys() != given.keys() or ours.banks != given.banks:
        return False
    for at, e in ours.items():
        f = given[at]
        alike = (e.site, e.method, e.bank, e.frozen.keys()) == (f.site, f.method, f.bank, f.frozen.keys())
        if not alike or not all(equal(t, f.frozen[k]) for k, t in e.frozen.items()):
            return False
    return True


def _check_slot(view: Any, name: str, entry: Entry) -> None:
    """ValueError unless the view has all the slots that an entry needs."""
    site, missing = entry.site, ""
    if view._peftfn.sites.get(site.name) != site:
        missing = site.label
    elif entry.changes_bias and site.bias and not changes_bias_at(view, site, entry.adds_bias):
        missing = site.bias
    else:
        held = view._peftfn.companions
        missing = next((c.at or "the model" for c in entry.companions if (site.name, c) not in held), "")
    if missing:
        raise ValueError(
            f"attach_: {name!r} changes {missing}, where the module has no slot for it: no net that it was made of "
            f"does so. Make another module, which takes no memory for the base: as_module(net, x=…, {name}=(other net, "
            "adapter)), where adapter_of(m, …) returns those it holds"
        )


def _homes(view: Any, plan: Plan) -> dict[str, torch.device]:
    """site or bank → the device of the weights there."""
    homes = {at: weight_at(view, e.site).device for at, e in plan.items()}
    return homes | {bank: next(homes[at] for at in plan if plan[at].bank == bank) for bank in plan.banks}


def _moved(plan: Plan, homes: Mapping[str, torch.device]) -> Plan:
    """The plan with its constants on the devices of the weights; those that sites share stay shared."""
    made: dict[tuple[int, torch.device], Tensor] = {}

    def moved(t: Tensor, device: torch.device) -> Tensor:
        return made.setdefault((id(t), device), t.detach().to(device))

    entries = {at: replace(e, frozen={k: moved(t, homes[at]) for k, t in e.frozen.items()}) for at, e in plan.items()}
    return Plan(entries, plan.rules, plan.banks)
