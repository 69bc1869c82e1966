"""Every way from an adapter to an output, and what each must give: what the method's own functions mean.

They are `delta` and `bias` of a method that changes a weight; `before`, `after` and `leave` of one around a module.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import peftfn as pf
from peftfn.core.method import Leaf, Weight
from peftfn.core.plan import Entry
from peftfn.tensors.states import states_in, states_out
from peftfn.testing.case import SITE, Case, leaves, shaken
from peftfn.view.module import parameters_of

INDEX = [2, -1, 0, 2, 1]
"""Which of three adapters each row uses in a mixed batch; −1: the base."""


# What an adapter means.


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
        self.method, self.outputs = method, dict[str, Tensor]()
        self.hooks = [
            model.get_submodule(name).register_forward_hook(partial(self._keep, name)) for name in method.watched
        ]

    def _keep(self, name: str, module: nn.Module, args: Any, out: Any) -> None:
        self.outputs[name] = states_out(out)[0]

    def values(self, x: Tensor) -> list[Tensor]:
        """x: the model's input [rows, tokens, …]."""
        masks = [torch.ones(x.shape[:2], dtype=torch.bool)] if self.method.sees_mask else []
        return [*masks, *(self.outputs[name] for name in self.method.watched)]

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


def around(party: "Party", gates: Tensor) -> Tensor:
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

        given["past_key_values"] = DynamicCache(config=place.config)
        for layer, (k, v) in enumerate(zip(p["keys"], p["values"], strict=True)):
            given["past_key_values"].update(k.expand(len(x), *k.shape), v.expand(len(x), *v.shape), layer)
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


# The ways there are.


@dataclass(frozen=True)
class Party:
    """Three adapters of one net, one adapter of each other net on the same model, and a batch of five rows.

    Adapters are numbered through all nets. Their tensors require gradients.
    """

    nets: tuple[pf.Adapted, ...]
    groups: tuple[list[pf.Adapter], ...]  # of each net
    x: Tensor
    seed: int = 0

    @classmethod
    def of(cls, c: Case, net: pf.Adapted | None = None) -> "Party":
        """`net` in place of the case's own: one of the same sites and sizes on another model."""
        net = net or c.net
        others = tuple(pf.adapt(net.model, {c.site: m}, seed=c.seed) for m in _companions(c)) if c.kind.rowed else ()
        groups = [c.adapter(i) for i in range(3)], *([shaken(other.init(i), i)] for i, other in enumerate(others))
        return cls((net, *others), tuple(_tracked(group) for group in groups), c.kind.x(5, c.seed, c.dtype), c.seed)

    @property
    def net(self) -> pf.Adapted:
        return self.nets[0]

    @property
    def first(self) -> pf.Adapter:
        return self.groups[0][0]

    @property
    def all(self) -> Iterator[tuple[pf.Adapted, pf.Adapter]]:
        return ((net, a) for net, group in zip(self.nets, self.groups, strict=True) for a in group)

    @property
    def trained(self) -> list[Tensor]:
        return [t for _, a in self.all for t in leaves(a)]

    @cached_property
    def stack(self) -> Any:
        """The net's own three."""
        return pf.stack(self.groups[0])

    @property
    def count(self) -> int:
        return sum(map(len, self.groups))

    def gates(self, *rows: int, count: int = 3) -> Tensor:
        """Random gates [*rows, count], some of them 0."""
        g = torch.randn(*rows, count, generator=torch.Generator().manual_seed(self.seed))
        return torch.where(g > 1, 0, g).requires_grad_()

    def hot(self, index: Sequence[int], count: int = 3) -> Tensor:
        """The gates [rows, count] that give each row the one adapter of `index`; −1: none."""
        return (torch.tensor(index)[:, None] == torch.arange(count)).float()

    def together(self, order: int) -> tuple[pf.Nets, list[Any], list[int]]:
        """(the nets as one, their stacks, the numbers of their adapters) in this order, 1, or the other, −1."""
        count = iter(range(self.count))
        numbers = [[next(count) for _ in group] for group in self.groups]
        stacks = [pf.stack(group) for group in self.groups]
        return pf.Nets(self.nets[::order]), stacks[::order], [k for group in numbers[::order] for k in group]


def _companions(c: Case) -> list[Any]:
    """Methods for the same site: one that leaves its layer's bias as it is and, where there can be one, one that makes
    another; around a module, one of its output."""
    if isinstance(c.method, pf.Tokens | pf.Prefix):
        return [pf.PromptTuning(n=2)]
    if isinstance(c.method, pf.Along):
        return [replace(c.method, alpha=0.7)]  # type: ignore[call-arg]
    if not isinstance(c.method, Weight):
        return [pf.Bottleneck(rank=2, activation="tanh", init_weights="random")]
    plain: Weight = pf.Full() if c.kind.kind == "other" else pf.LoRA(rank=2, init_weights="random")
    bias = pf.sites(c.model)[SITE].bias
    if bias is None:
        return [plain]
    return [plain, pf.IA3() if bias in dict(c.model.named_parameters()) else pf.LoRA(rank=2, lora_bias=True)]


def _tracked(tree: Any) -> Any:
    """A copy whose tensors require gradients."""
    if isinstance(tree, list):
        return [_tracked(v) for v in tree]
    return {k: _tracked(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.clone().requires_grad_()


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
    made = _tracked(read)
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


def _again(s: Party, adapter: pf.Adapter) -> Tensor:
    """The third call without gradients: what the first two made may serve it."""
    with torch.no_grad():
        *_, out = (s.net.apply(adapter, s.x) for _ in range(3))
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
    "mixed, prepared": Route(_prepared_rows, lambda s: s.hot(INDEX), _rowed),
    "gated by adapter": _gated(lambda s: s.gates()),
    "gated by row": _gated(lambda s: s.gates(5)),
    "gated by token": _gated(lambda s: s.gates(5, s.x.shape[1]), _tokens),
    "gated, one-hot": _gated(lambda s: s.hot(INDEX), _rowed),
    "several nets, mixed": Route(lambda s, g: _mixed_nets(s, 1), _hot_of_all, _rowed),
    "several nets in the other order, mixed": Route(lambda s, g: _mixed_nets(s, -1), _hot_of_all, _rowed),
    "several nets, gated": Route(lambda s, g: _gated_nets(s, g, 1), _gates_of_all, _summed),
    "several nets in the other order, gated": Route(lambda s, g: _gated_nets(s, g, -1), _gates_of_all, _summed),
    "bank": Route(_bank, _hot_of_all, _rowed, differentiable=False),
}


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
