"""A mark of the base's values at each site, in native files: whether an adapter is put on the weights that it was made
on. A few values are read of each weight, next to each other, so that of a mapped or large one no more than a page is.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.core.plan import Plan
from peftfn.tensors.sharded import is_sharded

COUNT = 64
"""Values of a weight, from its middle."""
_GROUPS = {torch.float64: "wide", torch.float32: "wide", torch.bfloat16: "wide", torch.float16: "half"}
"""Dtypes whose marks compare: values are rounded to bf16, to which fp32 rounds as it does in a model that is cast. Of
fp16 the smallest are lost, so it has marks of its own."""


def mark(w: Any) -> str:
    """The mark of a weight; "" of one whose values are not here as they are: quantised, sharded, offloaded, on meta,
    or a model's of which only the shapes are known."""
    if not isinstance(w, Tensor) or w.is_meta or is_sharded(w) or w.dtype not in _GROUPS or not w.numel():
        return ""
    if w.numel() > 1 and not any(w.stride()):  # one number for all: a model of which only shapes are known
        return ""
    raw = _middle(w.detach()).to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes()
    return f"{_GROUPS[w.dtype]} {hashlib.blake2b(raw, digest_size=6).hexdigest()}"


def _middle(w: Tensor) -> Tensor:
    """COUNT values from the middle of the flattened w, of which nothing else is read."""
    first = max(0, w.numel() // 2 - COUNT // 2)
    if w.is_contiguous():
        return w.view(-1)[first : first + COUNT]
    at = torch.arange(first, min(first + COUNT, w.numel()), device=w.device)
    return w[torch.unravel_index(at, w.shape)]


def marks(plan: Plan, weights: Mapping[str, Any], but: Iterable[str] = ()) -> dict[str, str]:
    """{site: its mark} of a plan's parameters. but: names of those that the base itself does not have."""
    left = set(but)
    found = {n: mark(weights[n]) for n, e in plan.items() if e.method.adapts == "parameter" and n not in left}
    return {n: m for n, m in found.items() if m}


def check_base(given: Mapping[str, str], weights: Mapping[str, Any], names: tuple[Any, Any], where: Path) -> None:
    """ValueError where a site's weight has other values than the file's mark says; what has no mark here, or one of
    another group of dtypes, is passed. names: of the file's base and of the model."""
    both = {n: (m, mark(weights.get(n))) for n, m in given.items()}
    known = {n: pair for n, pair in both.items() if pair[0].split(" ")[0] == pair[1].split(" ")[0]}
    if wrong := [n for n, (theirs, mine) in known.items() if theirs != mine]:
        theirs, mine = known[wrong[0]]
        raise ValueError(
            f"{where}: made on another base: {wrong[0]} has the mark {mine!r} here and {theirs!r} in the file, and so "
            f"have others {len(wrong)} of {len(known)} sites; the file's base is {names[0] or 'not named'}, and the "
            f"model {names[1] or 'not named'}. If that is meant, load it with base='any' (--any-base in a shell)"
        )


def checked(given: Any, sites: Mapping[str, Any], where: Path) -> dict[str, str]:
    """Return the marks that a file gives. ValueError unless they are marks of its sites."""
    if not isinstance(given, dict) or not all(isinstance(m, str) and n in sites for n, m in given.items()):
        raise ValueError(f"{where}: base is {str(given)[:80]}; it must have the marks of sites")
    return given
