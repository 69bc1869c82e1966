"""Routed modules: those through which a mixed batch follows its rows, and whose the positions of their inputs are."""

import functools
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.plan import Plan
from peftfn.model.names import matches, near
from peftfn.slots import track
from peftfn.slots.following import tracking
from peftfn.slots.gates import Gates
from peftfn.tensors.arguments import batched, tensors


def routed_by_default(model: nn.Module, plan: Plan) -> list[str]:
    """The parent of every module that holds an adapted stack, and of every module called `experts` beside or in which
    something is adapted: its router, say, gets tokens without their rows too."""
    inside = {"": model}  # modules in which something is adapted
    found = []
    for e in plan.values():
        name, module = "", model
        for part in e.site.module.split(".") if e.site.module else ():
            name = f"{name}.{part}" if name else part
            module = inside[name] if name in inside else inside.setdefault(name, getattr(module, part))
        if e.site.stacked:
            found.append(name.rpartition(".")[0])
    found += [name for name, module in inside.items() if "experts" in module._modules]
    return list(dict.fromkeys(found))


def routed_of(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The modules that the patterns find. ValueError for one that finds none."""
    names, found = [n for n, _ in model.named_modules()], []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if pattern == "":  # and its parts, which `generate` calls by themselves: encoders, towers
            found += [n for n, m in model.named_modules() if n.count(".") < 2 and (m._modules or not n) and _runs(m)]
            continue
        some = [n for n in names if n == pattern or (pattern and n and matches(pattern, n))]
        if not some:
            raise ValueError(f"adapt: routed: {pattern!r} finds none of the {len(names)} modules{near(pattern, names)}")
        found += some
    return list(dict.fromkeys(found))


def named(model: nn.Module, owners: Mapping[str, Any]) -> list[str]:
    """The modules that a caller gave owners for, of those that the model has."""
    return [name for name, _ in model.named_modules() if name in owners]


def encoders(module: nn.Module) -> list[str]:
    """The methods of a module that encode images and the like, which `generate` calls before any forward."""
    return [k for k in dir(type(module)) if k.startswith("get_") and k.endswith("_features")]


def _runs(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def checked(owners: Mapping[str, Any], gates: Gates, names: Sequence[str]) -> dict[str, Tensor]:
    """The owners that a caller gave, as tensors. ValueError where they name no routed module, or no row."""
    if gates.tokens is not None:
        raise ValueError("owners: they name rows, and the gates are of tokens: give gates or an index of rows")
    out = {}
    for name, rows in owners.items():
        if name not in names:
            raise ValueError(
                f"owners: {name!r} is no routed module of this net{near(name, list(names)) if names else ''}: name it "
                "in adapt(…, routed=[…])"
            )
        t = torch.as_tensor(rows)
        if t.is_floating_point() or t.dtype == torch.bool or t.dim() not in (1, 2):
            raise ValueError(f"owners: {name!r} has a {t.dtype} tensor {list(t.shape)}: give the row of each position")
        if gates.size is not None and t.numel() and not -1 <= int(t.min()) <= int(t.max()) < gates.size:
            odd = int(t.max()) if int(t.max()) >= gates.size else int(t.min())
            raise ValueError(f"owners: {name!r} names row {odd}, and the batch has {gates.size} rows (−1: of none)")
        out[name] = t.long()
    return out


def routed(
    name: str, places: Iterable[tuple[MutableMapping[str, Any], str]], forward: Callable[..., Any]
) -> Callable[..., Any]:
    """A module's forward, through which rows are followed in a mixed batch. places: the slots of the sites in it."""
    places = list(places)

    @functools.wraps(forward)
    def follow(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        call = next((c for d, k in places if (c := _call_of(d[k])) is not None), None)
        if call is None or call.gates.size is None:
            return forward(*args, **kwargs)
        t = track.current()
        within = t is not None and t.call is call
        if within and name not in call.owners:
            return forward(*args, **kwargs)
        t = t if within else tracking(call)
        assert t is not None
        given = call.entering(name, (args, kwargs))
        before = [(x, t.get(x)) for x, _ in given]
        for x, rows in given:
            t.begin(x, rows)
        try:
            if within:
                return forward(*args, **kwargs)
            with t:
                out = forward(*args, **kwargs)
            if name not in call.owners:
                _check_rows(name, t, call.gates, out)
            return out
        finally:
            for x, tag in before:
                t.put(x, tag)

    return follow


def _check_rows(name: str, t: track.Tracking, gates: Gates, out: Any) -> None:
    """ValueError if a module gives in a row what it made of another one, which no order of its own explains."""
    n = gates.size
    for x in tensors(out):
        tag = t.get(x)
        if not isinstance(tag, Tensor) or tag.shape[0] != x.shape[0] or tag.shape[0] < 2 or gates.tokens is not None:
            continue
        if not n or gates.at(x.shape[0]) is None or batched(tag):
            continue
        rows = torch.arange(x.shape[0], device=tag.device) // (x.shape[0] // n)
        odd = (tag >= 0) & (tag != rows.view(-1, *[1] * (tag.dim() - 1)))
        if bool(odd.any()):
            at = int(odd.nonzero()[0, 0])
            raise ValueError(
                f"{name or 'the model'}: what it gives {list(x.shape)} has positions of another row in row {at}, so a "
                "mixed batch cannot tell whose adapter they use. Call net.apply for one adapter at a time."
            )


def _call_of(held: Any) -> Any:
    """The `Followed` of the call that filled a slot."""
    gates = getattr(type(held), "gates_of", None)
    return None if gates is None else getattr(gates(held), "call", None)
