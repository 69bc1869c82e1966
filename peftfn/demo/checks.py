"""Checks that must hold for any trained adapter: each measures a difference and says whether it is small enough."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import peftfn as pf

TOLERANCE = 1e-4
"""Of the largest logit: fp32 through six layers, added up in another order."""


@dataclass(frozen=True)
class Check:
    text: str
    passed: bool


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, also those a state_dict leaves out."""
    return {name: t.detach().clone() for name, t in _tensors(model)}


def unchanged(model: nn.Module, before: Mapping[str, Tensor]) -> Check:
    now = dict(_tensors(model))
    changed = [n for n in before.keys() | now.keys() if n not in before or n not in now or _differ(before[n], now[n])]
    if changed:
        return Check(f"base: {len(changed)} of {len(before)} tensors changed, {sorted(changed)[0]} first", False)
    return Check(f"base: all {len(before)} parameters and buffers are bit-equal to the copy taken at the start", True)


def reloaded(path: Path, net: pf.Adapted, adapter: Mapping[str, Any]) -> Check:
    """`load` returns exactly what was saved, in tensors and rules."""
    other, loaded = pf.load(path, net.model)
    old, new = _flat(adapter), _flat(loaded)
    same = old.keys() == new.keys() and not any(_differ(old[path], new[path]) for path in old)
    passed = same and other.plan.rules == net.plan.rules
    return Check(f"reload: {len(old)} tensors from disk are {'' if passed else 'NOT '}bit-equal to those saved", passed)


@torch.no_grad()
def merged(nets: Mapping[str, pf.Adapted], adapters: Mapping[str, Mapping[str, Any]], *inputs: Tensor) -> Check:
    """functional_call with merged parameters against apply, for one adapter of each method."""
    worst = max(
        _distance(functional_call(net.model, net.merge(adapters[name]), inputs), net.apply(adapters[name], *inputs))
        for name, net in nets.items()
    )
    return _close(f"merge: plain model with merged weights against net.apply, {len(nets)} methods", worst)


@torch.no_grad()
def mixed(nets: Mapping[str, pf.Adapted], adapters: Mapping[str, list[Any]], ids: Tensor, mask: Tensor) -> Check:
    """One batch whose rows go round the base and all the adapters, against a call for each row."""
    worst, kinds = 0.0, 0
    for name, net in nets.items():
        index = [row % (len(adapters[name]) + 1) - 1 for row in range(len(ids))]
        kinds = len(set(index)) - 1
        together = net.mixed(pf.stack(adapters[name]), index, ids, mask)
        for row, k in enumerate(index):
            x = ids[row : row + 1], mask[row : row + 1]
            alone = net.model(*x) if k < 0 else net.apply(adapters[name][k], *x)
            worst = max(worst, _distance(together[row : row + 1], alone))
    rows = f"{len(ids)} rows, {kinds} adapters and the base"
    return _close(f"mixed: one call for {rows} against a call for each row, {len(nets)} methods", worst)


def _close(text: str, worst: float) -> Check:
    passed = worst <= TOLERANCE
    return Check(
        f"{text}: max difference {worst:.1e} of the largest logit"
        + ("" if passed else f", not within {TOLERANCE:.0e}"),
        passed,
    )


def _distance(x: Tensor, y: Tensor) -> float:
    """The largest difference, in units of the largest value (at least 1)."""
    return float((x - y).abs().max() / y.abs().max().clamp(min=1))


def _differ(x: Tensor, y: Tensor) -> bool:
    """In bits, so that NaN equals NaN and 0.0 differs from −0.0."""
    bits = [t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (x, y)]
    return x.dtype != y.dtype or x.shape != y.shape or not torch.equal(*bits)


def _flat(adapter: Mapping[str, Any]) -> dict[tuple[str, str], Tensor]:
    return {(name, k): t for name, leaf in adapter.items() for k, t in leaf.items()}


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
