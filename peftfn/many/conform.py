"""conform: rewrite an adapter of one net as an adapter of a wider one, exactly."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.combine import is_expression
from peftfn.core.method import Leaf, Method
from peftfn.core.plan import Adapter, Entry
from peftfn.model.names import near
from peftfn.net.net import Adapted


def conform(adapter: Mapping[str, Any], net_from: Adapted, net_to: Adapted) -> Adapter:
    """Return the adapter of `net_to` that makes the same change of every weight as `adapter` does on `net_from`.

    A smaller rank is padded with zeros, another alpha or rslora is folded into the leaf, and a site that only `net_to`
    adapts gets a fresh leaf, which is the identity. So adapters of many shapes fit one plan: they stack, mix, and share
    one compiled function. The values change by one rounding where the scales differ, and not at all elsewhere.

    Args:
        adapter: an adapter of `net_from`.
        net_from: its net.
        net_to: a net on a model of the same sizes, with at least the same sites and at least the same ranks.

    Returns:
        An adapter of `net_to`. Tensors that need no change are the same objects.

    Raises:
        ValueError: the result would not be exact; it names the site and the cure: a site that `net_to` lacks, a larger
            rank, a method without a `padding`, other constants, a fresh leaf that is not the identity.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        small, large = (pf.adapt(model, {"0.weight": pf.LoRA(rank=r)}) for r in (2, 4))
        a = pf.conform(small.init(), small, large)
        assert a["0.weight"]["a"].shape == (4, 8)
    """
    for net in (net_from, net_to):
        if not isinstance(net, Adapted):
            raise TypeError(f"conform: give two nets, which peftfn.adapt returns, not {type(net).__name__}")
    net_from.plan.check(adapter)
    known = list(net_to.plan)
    for name in net_from.plan:
        if name not in net_to.plan:
            raise ValueError(
                f"{name}: net_to does not adapt this site{near(name, known)}. Add it to the rules of net_to."
            )
    fresh = net_to.init() if len(known) > len(net_from.plan) or net_to.plan.banks else {}
    out: Adapter = {}
    for name, entry in net_to.plan.items():
        if name in net_from.plan:
            out[name] = _leaf(adapter[name], net_from.plan[name], entry)
        elif entry.method.identity:
            out[name] = fresh[name]
        else:
            raise ValueError(
                f"{name}: the adapter has no leaf here, and a fresh one of {entry.method} changes the model: give that "
                "rule a method whose start is the identity"
            )
    for bank, spec in net_to.plan.banks.items():
        theirs = adapter.get(bank)
        if theirs is not None and {k: t.shape for k, t in theirs.items()} != spec:
            raise ValueError(f"{bank}: its shared tensors have other shapes in net_to: give both rules the same sizes")
        out[bank] = fresh[bank] if theirs is None else theirs
    return out


def _leaf(leaf: Mapping[str, Any], a: Entry, b: Entry) -> Leaf:
    name = b.site.name
    if a.site.shape != b.site.shape or a.site.kind != b.site.kind:
        raise ValueError(
            f"{name}: the parameter is a {a.site.kind} {list(a.site.shape)} in net_from's model and a {b.site.kind} "
            f"{list(b.site.shape)} in net_to's: conform adapters between models of the same sizes"
        )
    if a.frozen.keys() != b.frozen.keys() or any(not _same(a.frozen[k], b.frozen[k]) for k in a.frozen):
        raise ValueError(
            f"{name}: the constants of {a.method} and {b.method} differ: call adapt with the same seed and "
            "rank for both"
        )
    if a.method == b.method:
        return leaf  # type: ignore[return-value]
    if is_expression(leaf):
        each: Any = {k: t if k == "scale" else _leaf(t, a, b) for k, t in leaf.items()}
        return each  # type: ignore[no-any-return]
    ratio = _ratio(name, a.method, b.method)
    if leaf.keys() != b.spec.keys():
        raise ValueError(f"{name}: a prepared leaf cannot be padded: conform it before that")
    out = {}
    scaled = b.method.padding.scaled if b.method.padding else ()
    for k, t in leaf.items():
        want = b.spec[k]
        if t.dim() != len(want) or any(n > m for n, m in zip(t.shape, want, strict=True)):
            raise ValueError(
                f"{name}: {k} has shape {list(t.shape)}, and {b.method} has {list(want)}: give net_to a larger rank"
            )
        t = t * ratio if k in scaled and ratio != 1 else t
        ends = [(0, m - n) for n, m in zip(t.shape, want, strict=True)]
        out[k] = F.pad(t, [n for end in reversed(ends) for n in end]) if t.shape != want else t
    return out


def _ratio(name: str, a: Method, b: Method) -> float:
    """a's scale in units of b's. ValueError unless the two mean the same otherwise."""
    if type(a) is not type(b) or b.padding is None:
        why = "the methods differ" if type(a) is not type(b) else f"{type(a).__name__} defines no padding"
        raise ValueError(f"{name}: {a} cannot become {b}: {why}. Give net_to this rule unchanged")
    odd = [
        f"{f.name}={getattr(a, f.name)!r} and {getattr(b, f.name)!r}"
        for f in fields(a)
        if f.name not in b.padding.fields and getattr(a, f.name) != getattr(b, f.name)
    ]
    if odd:
        raise ValueError(f"{name}: the two {type(a).__name__} differ in {', '.join(odd)}: give both the same value")
    return float(getattr(a, "scale", 1.0) / getattr(b, "scale", 1.0))


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device)))
