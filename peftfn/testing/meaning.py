"""What an adapter means: what the method's own functions say, on the plain model.

They are `delta` and `bias` of a method that changes a weight; `before`, `after` and `leave` of one around a module.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import peftfn as pf
from peftfn.core.method import Leaf, Weight
from peftfn.core.plan import Entry
from peftfn.tensors.cache import cache_name
from peftfn.tensors.states import states_in, states_out
from peftfn.testing.party import Party


def meaning_of(party: Party, base: Tensor) -> Callable[[Tensor], Tensor]:
    """gates ↦ what the party's adapters mean for its batch, weighed by them. base: what the model gives without."""
    first = next(iter(party.net.plan.values())).method
    if isinstance(first, pf.ModuleMethod):
        return lambda gates: around(party, gates)
    mean = meaning if isinstance(first, Weight) else with_inputs
    changes = torch.stack([mean(net, a, party.x) for net, a in party.all], -1) - base[..., None]
    if not first.overrides("acts_on"):
        return lambda gates: _wanted(base, changes, gates)
    every = torch.stack([meaning(net, a, party.x, everywhere=True) for net, a in party.all], -1) - base[..., None]
    return lambda gates: _wanted(base, every if gates.dim() == 3 else changes, gates)


def _wanted(base: Tensor, changes: Tensor, gates: Tensor) -> Tensor:
    """base + Σ_k gates_k changes_k; changes [rows, …, adapters]."""
    between = changes.dim() - gates.dim()
    if gates.dim() > 1:
        gates = gates.view(*gates.shape[:-1], *[1] * between, gates.shape[-1])
    out: Tensor = base + (changes[..., : gates.shape[-1]] * gates).sum(-1)
    return out


def meaning(net: pf.Adapted, adapter: pf.Adapter, x: Tensor, everywhere: bool = False) -> Tensor:
    """The plain model with weights w + delta and the biases that `bias` makes of its own, in eval mode.

    everywhere: a method that acts on some tokens alone acts on all, since somebody else weighs it token by token.
    """
    weights = dict(net.model.named_parameters(remove_duplicate=False))
    model, new = net.model, dict[str, Any]()
    entry: Any
    for name, entry in net.plan.items():
        method, w, b = entry.method.eval(), weights[name].detach(), weights.get(entry.site.bias or "")
        p = _prepared(method, entry, adapter, entry.site.canonical(w))
        if method.mergeable:
            new[name] = entry.site.original(entry.site.canonical(w) + _delta(method, entry, p, entry.site.canonical(w)))
        else:
            model, own = copy.deepcopy(model), method.bias(p[0], None if b is None else b.detach())
            model.set_submodule(entry.site.module, _ByInput(method, p[0], entry.site.canonical(w), own))
            continue
        if entry.site.bias and (entry.adds_bias or (entry.changes_bias and b is not None)):
            new[entry.site.bias] = method.bias(p[0], None if b is None else b.detach())
    out: Tensor = functional_call(model, new, (x,), tie_weights=False)
    if net.plan.gated and not everywhere:  # the models have one gated layer, or several side by side
        g = net.plan[net.plan.gated[0]].method.acts_on(x)[..., None]
        out = g * out + (1 - g) * net.model(x)
    return out


def _prepared(method: Weight, entry: Entry, adapter: pf.Adapter, m: Tensor) -> list[Leaf]:
    """The prepared tensors at a site, of each expert where there are several."""
    raw = entry.raw(adapter[entry.site.name], adapter[entry.bank] if entry.bank else {}, m)
    if not entry.site.stacked:
        return [method.prepare(raw, m)]
    experts = ({k: t if k in entry.common else t[i] for k, t in raw.items()} for i in range(len(m)))
    return [method.prepare(p, w) for p, w in zip(experts, m, strict=True)]


def _delta(method: Weight, entry: Entry, p: list[Leaf], m: Tensor) -> Tensor:
    if not entry.site.stacked:
        return method.delta(p[0], m)
    return torch.stack([method.delta(*expert) for expert in zip(p, m, strict=True)])


class _ByInput(nn.Module):
    """The layer of a method whose change depends on the input: `linear` is what it means."""

    def __init__(self, method: Weight, p: Leaf, w: Tensor, b: Tensor | None):
        super().__init__()
        self.run: Callable[[Tensor], Tensor] = lambda x: method.linear(p, w, x) + (0 if b is None else b)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class Seen:
    """What a method around a module of the model sees of others: the mask, all True, and outputs, by hooks."""

    def __init__(self, model: nn.Module, method: Any):
        self.method, self.outputs, self.inputs = method, dict[str, Tensor](), dict[str, Tensor]()
        self.hooks = [
            model.get_submodule(name).register_forward_hook(partial(self._keep, name)) for name in method.watched
        ]
        self.hooks += [
            model.get_submodule(name).register_forward_pre_hook(partial(self._keep_input, name))
            for name in method.entered
        ]

    def _keep(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        self.outputs[name] = states_out(out)[0]

    def _keep_input(self, name: str, module: nn.Module, args: Any) -> None:
        self.inputs[name] = args[0]

    def values(self, x: Tensor) -> list[Tensor]:
        """x: the model's input [rows, tokens, …]."""
        masks = [torch.ones(x.shape[:2], dtype=torch.bool)] if self.method.sees_mask else []
        outputs = (self.outputs[name] for name in self.method.watched)
        return [*masks, *outputs, *(self.inputs[name] for name in self.method.entered)]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Around(nn.Module):
    """A module with adapters around it, as their functions say: one after the other, each on all rows.

    adapters: (method, prepared tensors, what it sees of others). gates: [rows, …, adapters], or [adapters] for all.
    """

    def __init__(self, module: nn.Module, place: pf.Place, adapters: list[Any], gates: Tensor):
        super().__init__()
        self.module, self.place, self.adapters, self.gates = module, place, adapters, gates

    def weighed(self, base: Tensor, f: Callable[[Any, Leaf, list[Tensor]], Tensor]) -> Tensor:
        """base + Σ_k g_k (f(adapter k) − base)."""
        between = base.dim() - self.gates.dim() if self.gates.dim() > 1 else 0
        out = base
        for k, (method, p, seen) in enumerate(self.adapters[: self.gates.shape[-1]]):
            g = self.gates[..., k]
            g = g.view(*g.shape, *[1] * (between + 1)) if g.dim() else g
            out = out + g * (f(method, p, seen.values(base)) - base)
        return out

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        m, (x, put) = self.place, states_in(args, kwargs)
        if x.is_floating_point():
            args, kwargs = put(self.weighed(x, lambda method, p, seen: method.before(p, m, x, *seen)))
        out, (x, _) = self.module(*args, **kwargs), states_in(args, kwargs)
        y, put_y = states_out(out)
        y = self.weighed(y, lambda method, p, seen: method.after(p, m, x, y, *seen))
        out = put_y(y)
        return put_y(self.weighed(y, lambda method, p, _: states_out(method.leave(p, m, args, kwargs, out))[0]))


def around(party: Party, gates: Tensor) -> Tensor:
    """The model with all adapters of the party around its modules, as `gates` weigh them."""
    model = copy.deepcopy(party.net.model)
    for name in party.net.plan:
        place, adapters = pf.Place.of(model, name), []
        for net, a in party.all:
            if name in net.plan:
                entry = net.plan[name]
                method: Any = entry.method.eval()
                raw = entry.raw(a[name], a[entry.bank] if entry.bank else {}, place)
                adapters.append((method, method.prepare(raw, place), Seen(model, method)))
        model.set_submodule(name, _Around(model.get_submodule(name), place, adapters, gates))
    out: Tensor = model(party.x)
    return out


def with_inputs(net: pf.Adapted, adapter: pf.Adapter, x: Tensor) -> Tensor:
    """The plain backbone with virtual tokens in front of the embedded ones, or with keys and values in its cache."""
    ((name, entry),) = net.plan.items()
    place, method = pf.Place.of(net.model, name, tokens=True), entry.method.eval()
    p = method.prepare(entry.raw(adapter[name], adapter[entry.bank] if entry.bank else {}, place), place)
    given: dict[str, Any] = {"input_ids": x}
    if isinstance(method, pf.Along):
        return _along(method, p, place, x)
    if "tokens" in p:
        tokens = p["tokens"].expand(len(x), *p["tokens"].shape)
        given = {"inputs_embeds": torch.cat([tokens, place.embedding()(x)], 1)}
    else:
        from transformers import DynamicCache

        cache = given[cache_name(place.arguments)] = DynamicCache(config=place.config)
        for layer, (k, v) in enumerate(zip(p["keys"], p["values"], strict=True)):
            cache.update(k.expand(len(x), *k.shape), v.expand(len(x), *v.shape), layer)
        if not getattr(method, "shifts", True):
            given["position_ids"] = torch.arange(x.shape[1])[None]
    out: Tensor = place.module(**given).last_hidden_state[:, -x.shape[1] :]
    return out


def _along(method: pf.Along, p: Any, place: pf.Place, x: Tensor) -> Tensor:
    """The plain backbone with hooks of torch at its blocks."""
    given = {"input_ids": x, "inputs_embeds": place.embedding()(x)}
    states = [method.start(p, place, given, lambda config: None)]
    handles = []
    for i, name in enumerate(method.blocks(place)):
        block = place.get(name)

        def before(_: Any, args: Any, i: int = i) -> Any:
            return (method.into(p, i, args[0], states[-1]), *args[1:])

        def after(_: Any, args: Any, y: Any, i: int = i) -> None:
            states.append(method.onward(p, i, y, states[-1]))

        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    out: Tensor = place.module(input_ids=x).last_hidden_state
    for handle in handles:
        handle.remove()
    return out
