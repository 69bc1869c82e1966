"""merge_report: what merging would lose at each site, before anyone merges."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfn.core import functions
from peftfn.net.net import Adapted, check_net
from peftfn.tensors.precision import wide
from peftfn.tensors.quantised import QuantisedWeight
from peftfn.tools.table import Report


@dataclass(frozen=True)
class MergedSite:
    """What merging does at one site.

    Args:
        name: the site.
        dtype: what the merged weight is rounded to.
        size: ‖Δ‖ / ‖W‖, Δ being the change and W the weight.
        lost: ‖round(W + Δ) − (W + Δ)‖ / ‖Δ‖: the share of the change that rounding takes; 0 without a change. None for
            a quantised weight, whose rounding is its own.
        stays: the share of the entries that Δ changes and that have the same value after rounding as before.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        (site,) = pf.merge_report(net, net.init())
        assert site.size == site.lost == 0
    """

    name: str
    dtype: str
    size: float
    lost: float | None
    stays: float | None


class MergeReport(Report[MergedSite]):
    """What `merge_report` returns: a sequence of sites that prints as a table.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        print(pf.merge_report(net, net.init(), torch.bfloat16))
    """

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("site", "dtype", "‖Δ‖/‖W‖", "lost", "stays")]
        return rows + [(s.name, s.dtype, short(s.size), share(s.lost), share(s.stays)) for s in self]


def merge_report(net: Adapted, adapter: Mapping[str, Any], dtype: torch.dtype | None = None) -> MergeReport:
    """Return what merging the adapter would lose at each site: how large the change is, and how much rounding takes.

    Merging rounds W + Δ to the weight's dtype. In bfloat16, which has 8 bits, a change of less than a 500th of an entry
    leaves the entry as it was: a small adapter may vanish in part.

    Args:
        net: the adapter's net.
        adapter: an adapter of it.
        dtype: of the merged weights; None for that of each weight.

    Returns:
        A sequence of sites with `size`, `lost` and `stays`, which prints as a table.

    Raises:
        ValueError: a method depends on the input; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2, init_weights="random")})
        worst = max(pf.merge_report(net, net.init(), torch.bfloat16), key=lambda site: site.lost)
    """
    check_net("merge_report", net)
    net.plan.check(adapter)
    weights, sites = net.weights, []
    for name, entry in net.plan.meant.items():
        method, p, w = functions.tensors(entry, weights, adapter)
        m = entry.site.canonical(w)
        delta, old = entry.delta(method, p, m).detach(), wide(m.detach())
        to, quantised = dtype or w.dtype, isinstance(w, QuantisedWeight)
        lost, stays = (None, None) if quantised else _rounding(old, delta, to)
        size = float(delta.norm() / old.norm().clamp(min=torch.finfo(old.dtype).tiny))
        sites.append(MergedSite(name, str(to).removeprefix("torch."), size, lost, stays))
    return MergeReport(sites)


def _rounding(w: Tensor, delta: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """(share of the change that rounding takes, share of the changed entries that stay)."""
    changed = int((delta != 0).sum())
    if not changed:
        return 0.0, 0.0
    exact = w.double() + delta.double()
    rounded = (w + delta).to(dtype)
    lost = (rounded.double() - exact).norm() / delta.double().norm()
    return float(lost), int(((delta != 0) & (rounded == w.to(dtype))).sum()) / changed


def short(x: float) -> str:
    """A number of three digits."""
    return f"{x:.3g}"


def share(x: float | None) -> str:
    """A share as per cent."""
    return "quantised" if x is None else f"{100 * x:.2g} %"
