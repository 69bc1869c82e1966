"""Nets and adapters of starting points: which sites have a LoRA, and the same net with other methods or constants."""

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

from peftfn.core.make import make
from peftfn.core.method import Leaf, Method
from peftfn.core.plan import Adapter, Entry, Plan
from peftfn.methods.weights.lora import LoRA
from peftfn.methods.weights.offset_lora import OffsetLoRA
from peftfn.model.model import Model
from peftfn.net.net import Adapted, replanned
from peftfn.tools.change import exactly


def loras_of(where: str, net: Adapted, quantised: bool = False) -> dict[str, tuple[Entry, LoRA]]:
    """The net's sites with LoRA. ValueError where one is at no linear layer, has a rank that does not fit, or there is
    none."""
    out: dict[str, tuple[Entry, LoRA]] = {}
    for name, entry in net.plan.items():
        if type(entry.method) is not LoRA:
            continue
        shape = entry.site.matrix_shape()
        if entry.site.kind not in ("linear", "linear_t"):
            raise ValueError(
                f"{where}: {name} is a {entry.site.kind}; starting points are for LoRA at linear layers: give this "
                "site another rule"
            )
        if entry.site.quantised and not quantised:
            raise ValueError(f"{where}: {name} is quantised; use the model with its full weights, or starts.loftq")
        if entry.method.rank > min(shape):
            r, most = entry.method.rank, min(shape)
            raise ValueError(f"{where}: {name}: rank is {r}, and the weight is {list(shape)}: give rank <= {most}")
        out[name] = entry, entry.method
    if not out:
        raise ValueError(f"{where}: the net has no LoRA; starting points are for LoRA at linear layers")
    return out


def with_leaves(net: Adapted, leaves: Mapping[str, Leaf]) -> Adapter:
    """A fresh adapter with these leaves, each in fp32 or wider, whole in memory, with the bias that a fresh one has."""
    fresh = net.init()
    return {n: {**leaf, **{k: t.contiguous() for k, t in leaves.get(n, {}).items()}} for n, leaf in fresh.items()}


def with_methods(net: Adapted, methods: Mapping[str, Method | None]) -> Adapted:
    """The net with other methods at some sites, None for none. Constants are those of the net where it has them."""
    chosen = {n: methods.get(n, e.method) if n in methods else e.method for n, e in net.plan.items()}
    kept = {n: m for n, m in chosen.items() if m is not None}
    rules = {exactly(n) if n in methods else net.plan[n].rule: m for n, m in kept.items()}
    taken = {n: exactly(n) if n in methods else net.plan[n].rule for n in kept}
    plan = make(Model.of(net.model), rules, 0, taken=taken, constants=False)
    entries = {n: e if n in methods else replace(e, frozen=net.plan[n].frozen) for n, e in plan.items()}
    return replanned(net, Plan(entries, plan.rules, plan.banks))


def offset_from(net: Adapted, starts: Mapping[str, Leaf]) -> tuple[Adapted, Adapter]:
    """A net of `OffsetLoRA` with these constants, and the adapter that starts at them."""
    methods: dict[str, Method] = {}
    for n in starts:
        m: Any = net.plan[n].method
        if m.lora_bias:
            raise ValueError(f"{n}: {m} has a bias, which an OffsetLoRA has not: give lora_bias=False")
        methods[n] = OffsetLoRA(rank=m.rank, alpha=m.alpha, rslora=m.rslora, dropout=m.dropout)
    new = with_methods(net, methods)
    entries = dict(new.plan.items())
    for n, leaf in starts.items():
        frozen = {f"{k}0": t.float().contiguous() for k, t in leaf.items()}
        entries[n] = replace(entries[n], frozen=frozen)
    made = replanned(net, Plan(entries, new.plan.rules, new.plan.banks))
    return made, made.init()


def same_alpha(m: LoRA, rank: int) -> float:
    """The alpha with which another rank has the same scale."""
    return m.scale * (sqrt(rank) if m.rslora else rank)
