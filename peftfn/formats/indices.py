"""The integer constants of a plan that came from a file, against what their methods say they may have."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.core.indices import Index
from peftfn.core.plan import Plan


def check_indices(plan: Plan, where: Path) -> None:
    """ValueError for an integer constant that came from a file, and through which a method would read another place."""
    for name, constant, why in wrong_indices(plan):
        raise ValueError(f"{where}: {name}: its constant {constant!r} {why}")


def wrong_indices(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """(site, its constant, what is wrong with it) of a plan's integer constants; those without values are passed."""
    seen = set[tuple[int, Any]]()
    for name, e in plan.items():
        integers = {k: t for k, t in e.frozen.items() if not t.is_floating_point() and not t.is_meta}
        if not integers:
            continue
        known = expected(plan, name)
        for k, t in integers.items():
            want = known.get(k)
            if want is None or (mark := (id(t), id(want) if isinstance(want, Tensor) else want)) in seen:
                continue
            seen.add(mark)  # a constant that several sites share is looked at once
            if isinstance(want, Tensor):
                if e.site.stacked and k not in e.common:  # each expert has it
                    want = want.expand(e.site.shape[0], *want.shape)
                same = t.shape == want.shape and torch.equal(t.cpu(), want.cpu().to(t.dtype))
                why = "" if same else f"is not the one that {e.method} has"
            else:
                why = want.wrong(t)
            if why:
                yield name, k, why


def expected(plan: Plan, name: str) -> dict[str, Index | Tensor]:
    """{integer constant: what it may have} of a site, as its method says."""
    e = plan[name]
    spec = {**e.spec, **(plan.banks[e.bank] if e.bank else {})}
    p = {**{k: torch.empty(s, device="meta") for k, s in spec.items()}, **e.frozen}
    w: Any = None
    if e.method.adapts == "parameter":
        w = e.site.canonical(torch.empty(e.site.shape, device="meta"))
        w = w[0] if e.site.stacked else w
    return dict(e.method.indices(p, w))
