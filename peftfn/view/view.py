"""What `as_module` builds: a parametrization at each site, which holds the leaves and returns the adapted weight."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from peftfn.core.plan import Plan
from peftfn.model.place import MODULE, TOKENS
from peftfn.model.site import Site
from peftfn.slots.mixed import MixedWeight
from peftfn.slots.slot import plus
from peftfn.tensors.quantised import Bare, quantised
from peftfn.view.active import State
from peftfn.view.called import CALL, place_calls, places_of
from peftfn.view.choice import Active, Choice
from peftfn.view.classes import derived, wrap_checkpoints
from peftfn.view.held import Factors, Held, Leaf, Paths, hold, itself
from peftfn.view.loading import unshare


class _Bias(nn.Module):
    """The parametrization of a bias that the method at its layer's weight changes."""

    def __init__(self, weight: nn.Module, missing: bool):
        super().__init__()
        self.weight, self.missing = (weight,), missing  # in a tuple: no submodule of this one

    def forward(self, b: Tensor | None) -> Any:
        b = None if self.missing else b
        weight: Any = self.weight[0]
        leaf = weight[0].leaf()
        if leaf is None or not leaf._changes_bias():
            return b
        w = weight[0].made(leaf, weight[0].read(weight.original))
        if isinstance(w, MixedWeight):
            mixed = w.bias(b)
            return b if mixed is None else mixed
        new = w.entry.new_bias(w.method, w.p, b, w.dtype)
        return b if new is None else new


def _linear(layer: Any, x: Tensor) -> Tensor:
    """The forward of a quantised layer, by what stands for its weight."""
    return plus(F.linear(x, layer.weight), getattr(layer, "bias", None))


def build(
    model: Any, given: Mapping[str, tuple[Plan, Mapping[str, Any]]], buffers: dict[str, Tensor], trainable: bool
) -> Any:
    """The view of `model`, which is a copy of ours: parametrized in place. buffers: see `State`."""
    plans = [plan for plan, _ in given.values()]
    choice, names = Choice(Active((next(iter(given)),)), len(given) > 1), share_constants(model, plans)
    banks = {
        name: {bank: hold_bank(model, name, bank, a[bank], trainable) for bank in plan.banks}
        for name, (plan, a) in given.items()
    }
    places = places_of(model, plans)
    classes: dict[Any, Any] = {layer: type(layer) for layer in model.modules()}
    slots: dict[nn.Module, list[str]] = {model: []}

    def place(slot: str, parametrization: nn.Module) -> None:
        layer, attr = owner(model, slot)
        if attr in slots.setdefault(layer, []):
            parametrize.register_parametrization(layer, attr, parametrization, unsafe=True)
            return
        slots[layer].append(attr)
        if attr not in layer._parameters:  # what a quantised layer's forward has kept there (INC's do)
            vars(layer).pop(attr, None)
        original = layer._parameters.get(attr, nn.Parameter(torch.empty(0), requires_grad=False))
        layer._parameters[attr] = nn.Parameter(torch.empty(0), requires_grad=False)  # what is registered is written to
        if isinstance(getattr(classes[layer], attr, None), property):  # GPTQModel's: it shows sizes alone
            layer.__class__ = nn.Module  # until it gets its class, at the end
        parametrize.register_parametrization(layer, attr, parametrization, unsafe=True)
        layer.parametrizations[attr]._parameters["original"] = original

    calls: dict[str, dict[str, nn.Module]] = {}
    sites = {at: e.site for plan in plans for at, e in plan.items()}
    # Asked while the layers are as they were; of a quantised layer, a bias is a site like any other.
    opaque = {at: quantised(owner(model, at)[0], at) if site.quantised else None for at, site in sites.items()}
    for at in sites:
        leaves: dict[str, nn.Module] = {}
        for name, (plan, a) in given.items():
            if at in plan:
                bank = banks[name].get(plan[at].bank or "", [])
                leaves[name] = Leaf(plan[at], a[at], model, names, bank, trainable)
        if at in places:
            calls[at] = leaves
            continue
        layer, _ = owner(model, at)
        weight = opaque[at]
        if weight is not None and weight.own_forward:
            vars(layer)["forward"] = partial(_linear, layer)
        read = itself if weight is None else Bare(layer, classes[layer], at)
        place(at, Held(at, choice, leaves, read))
    biases: dict[Site, bool] = {}  # layers whose bias a method changes: whether it also gives one to a layer without
    for entry in (e for plan in plans for e in plan.values()):
        if entry.site.bias is not None and entry.changes_bias:
            biases[entry.site] = biases.get(entry.site, False) or entry.adds_bias
    for site, adds in biases.items():
        layer, attr = owner(model, site.name)
        weight = layer.parametrizations[attr]
        bias = str(site.bias).rpartition(".")[-1]
        if bias not in layer._parameters and bias not in slots[layer]:  # a buffer, or an attribute without a value
            b = vars(layer).pop(bias, None) if bias in vars(layer) else layer._buffers.pop(bias, None)
            layer._parameters[bias] = None if b is None else nn.Parameter(b, requires_grad=False)
        missing = bias not in slots[layer] and layer._parameters[bias] is None
        if missing and not adds:
            continue
        if missing:
            w = weight[0].read(weight.original)
            zeros = torch.zeros(site.matrix_shape()[0], dtype=w.dtype, device=w.device)
            layer._parameters[bias] = nn.Parameter(zeros, requires_grad=False)
        place(str(site.bias), _Bias(weight, missing))
    called = place_calls(model, places, calls, plans, choice, classes)
    for layer in {**slots, **dict.fromkeys(called)}:
        told = layer is model and any(plan.gated for plan in plans)
        layer.__class__ = derived(classes[layer], tuple(slots.get(layer, ())), layer is model, layer in called, told)
    bare = {id(plan): without_constants(plan) for plan in plans}  # adapters of one net have one plan
    model._peftfn = State(
        plans={name: bare[id(plan)] for name, (plan, _) in given.items()},
        banks=banks,
        choice=choice,
        offloaded=set(),
        buffers=buffers,
        constants=set(names.values()),
        sites={at: e.site for plan in plans for at, e in plan.items()},
        companions={(at, c) for plan in plans for at, cs in plan.accompanied.items() for c in cs},
    )
    if vars(model).get("is_quantized"):
        # What transformers keeps of a quantised model: Trainer refuses one without PEFT's adapters, and save_pretrained
        # would write all of it. What a view trains and saves is not quantised.
        model.is_quantized, model.hf_quantizer = False, None
    for module in model.modules():
        if not isinstance(module, (Leaf, Factors)):  # whose tensors are the view's own
            module.register_load_state_dict_pre_hook(unshare)
    wrap_checkpoints(model)
    return model


def tell_(view: Any) -> None:
    """Let a view tell its sites what it is called with."""
    view.__class__ = derived(*type(view)._derived, True)


def hold_bank(view: nn.Module, name: str, bank: str, tree: Mapping[str, Any], trainable: bool) -> Paths:
    return hold(view, view, tree, trainable, f"adapter_{name}_{bank}_".replace(".", ":"))


def owner(model: nn.Module, slot: str) -> tuple[Any, str]:
    path, _, attr = slot.rpartition(".")
    return model.get_submodule(path), attr


def leaves_of(view: nn.Module) -> list[Leaf]:
    return [m for m in view.modules() if isinstance(m, Leaf)]


def held_at(view: nn.Module, site: Site) -> Any:
    """What holds the leaves of a site."""
    if site.kind in (MODULE, TOKENS):
        return view.get_submodule(site.name)._modules[CALL]
    layer, attr = owner(view, site.name)
    return layer.parametrizations[attr][0]


def leaf_at(view: Any, site: str, name: str) -> Leaf:
    leaf: Leaf = held_at(view, view._peftfn.plans[name][site].site)._modules[name]
    return leaf


def changes_bias_at(view: nn.Module, site: Site, adds: bool) -> bool:
    """Whether a method at this weight can change the layer's bias, or has none to change. adds: it makes one."""
    layer, _ = owner(view, site.name)
    attr = str(site.bias).rpartition(".")[-1]
    if attr in layer.parametrizations:
        return any(isinstance(p, _Bias) for p in layer.parametrizations[attr])
    return not adds and layer._parameters.get(attr) is None


def constants_of(view: Any, leaf: Leaf) -> dict[str, Any]:
    """The constants of a leaf: its own buffers, and those that it shares."""
    return {**leaf._buffers, **{k: view._buffers[name] for k, name in leaf._shared.items()}}


def without_constants(plan: Plan) -> Plan:
    """The plan of an adapter in a view, whose constants are buffers."""
    return Plan({site: replace(e, frozen={}) for site, e in plan.items()}, plan.rules, plan.banks)


def weight_at(view: Any, site: Site) -> Any:
    """The base's parameter at a site of a view, or the place of its module."""
    if site.kind in (MODULE, TOKENS):
        return view.get_submodule(site.name)._modules[CALL].place[0]
    layer, attr = owner(view, site.name)
    return layer.parametrizations[attr].original


def is_own(path: str) -> bool:
    """Whether the module of a view at this path is one that `as_module` put there."""
    return not {"parametrizations", CALL}.isdisjoint(path.split("."))


def share_constants(model: nn.Module, plans: list[Plan], known: Mapping[int, str] | None = None) -> dict[int, str]:
    """Constants that several leaves use become buffers of the model: {id of the constant: its name there}.

    So do those of a chain's parts, whose names, with a dot, no buffer could have. known: those that are there.
    """
    uses = [(k, t) for plan in plans for entry in plan.values() for k, t in entry.frozen.items()]
    number = Counter(id(t) for _, t in uses)
    names = dict(known or {})
    for k, t in uses:
        if (number[id(t)] > 1 or "." in k) and id(t) not in names:
            base = f"adapter_{k}".replace(".", ":")
            free = (f"{base}_{i}" if i else base for i in count())
            names[id(t)] = next(n for n in free if n not in model._buffers)
            model.register_buffer(names[id(t)], t.detach())
    return names
