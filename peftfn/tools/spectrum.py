"""spectrum: five figures of the shape of what an adapter changes, for those who look for adapters that stand out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfn.core.method import MATRIX
from peftfn.net.net import Adapted, check_net
from peftfn.tools.change import Change, changes, singular_values
from peftfn.tools.report import short
from peftfn.tools.table import Report

BLOCK = 2**20
"""How many entries of a change made of factors are in memory at once."""
ALIKE = 1e-12
"""Entries whose standard deviation is below this share of their mean are equal: they have no kurtosis."""


@dataclass(frozen=True)
class SpectrumSite:
    """The shape of the change of one matrix. σ₁ ≥ σ₂ ≥ … are its singular values; `spectrum` has the formulas.

    Args:
        name: the site; of a stack of experts `site[e]`.
        largest: σ₁.
        norm: ‖Δ‖, the Frobenius norm.
        concentration: σ₁² / Σ σ². None where the change is zero.
        entropy: −Σ pᵢ ln pᵢ with pᵢ = σᵢ / Σ σ. None where the change is zero.
        kurtosis: of the entries, 3 for a normal distribution. None where all entries are equal.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=1)})
        (site,) = pf.spectrum(net, pf.scale(net.init(), 2.0))
        assert site.largest == site.norm == 0 and site.entropy is None
    """

    name: str
    largest: float
    norm: float
    concentration: float | None
    entropy: float | None
    kurtosis: float | None


class SpectrumReport(Report[SpectrumSite]):
    """What `spectrum` returns: a sequence of sites that prints as a table.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2, init_weights="random")})
        print(pf.spectrum(net, net.init()))
    """

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = [("site", "σ₁", "‖Δ‖", "concentration", "entropy", "kurtosis")]
        for s in self:
            shape = (s.concentration, s.entropy, s.kurtosis)
            rows.append((s.name, short(s.largest), short(s.norm), *("-" if v is None else short(v) for v in shape)))
        return rows


def spectrum(net: Adapted, adapter: Mapping[str, Any]) -> SpectrumReport:
    """Return five figures of the change Δ of each matrix: how large it is, and how far one direction dominates.

    Puertolas Merenciano et al., "Weight space Detection of Backdoors in LoRA Adapters", 2026, arXiv:2602.15195, find
    poisoned adapters by these. With the singular values σ of Δ they are σ₁; ‖Δ‖ = √Σσ²; the concentration σ₁²/Σσ²;
    the spectral entropy −Σ pᵢ ln pᵢ with pᵢ = σᵢ/Σσ, which is 0 at rank one and ln r for r equal values; and Pearson's
    kurtosis of the entries, m₄/m₂² with m_k the mean of (δ − mean δ)^k. The last three do not depend on Δ's size.

    These are figures, no verdict: what is suspect depends on the base and on how clean adapters of it were trained.
    The formulas are those of the authors' detector, with two differences: there Δ is B A without the scale alpha/rank,
    and 1e-12 is added to m₂², which lowers the kurtosis of entries of about 1e-3 and below. So thresholds and
    classifiers that were fitted there do not apply to these figures.

    Changes with factors are never made whole: their singular values come from the factors, and the entries in blocks.
    Norms, biases and other parameters that are no matrix are left out, and so are changes of a layer's bias.

    Args:
        net: the adapter's net.
        adapter: an adapter of it.

    Returns:
        A sequence of sites with `largest`, `norm`, `concentration`, `entropy` and `kurtosis`, which prints as a table.
        Each expert of a stack has its own row.

    Raises:
        ValueError: a method depends on the input, or a change is not finite; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2, init_weights="random")})
        sharpest = max(pf.spectrum(net, net.init()), key=lambda site: site.concentration)
        assert 0.5 <= sharpest.concentration <= 1
    """
    check_net("spectrum", net)
    matrices = [name for name, entry in net.plan.items() if entry.site.kind in MATRIX]
    with torch.no_grad():
        found = [_site(c) for c in changes(net, adapter, matrices)]
    return SpectrumReport([site for sites in found for site in sites])


def _site(change: Change) -> list[SpectrumSite]:
    """The figures of a change; of a stack of experts, of each."""
    name = change.site.name
    parts = [t for t in (change.up, change.down, change.dense) if t is not None]
    if not all(bool(t.isfinite().all()) for t in parts):
        raise ValueError(
            f"{name}: the change has values that are not finite, so it has no spectrum; leave this site out, or take "
            "an adapter whose values are finite"
        )
    if parts[0].dim() == 2:
        return [_figures(name, parts)]
    return [_figures(f"{name}[{e}]", [t[e] for t in parts]) for e in range(len(parts[0]))]


def _figures(name: str, parts: list[Tensor]) -> SpectrumSite:
    """Of a matrix that is one tensor, or the product of two."""
    if len(parts) == 2:
        parts = [t.double() for t in parts]
    s = singular_values(*parts).double()
    norm = float(s.norm())
    if not norm:
        return SpectrumSite(name, 0.0, 0.0, None, None, None)
    largest, entropy = float(s[0]), float(torch.special.entr(s / s.sum()).sum())
    return SpectrumSite(name, largest, norm, min(1.0, (largest / norm) ** 2), entropy, _kurtosis(parts))


def _kurtosis(parts: list[Tensor]) -> float | None:
    """m₄/m₂² of the entries; None where they are equal."""
    left, right = parts[0], parts[-1]  # of one tensor the two are the same
    rows, columns = left.shape[0], right.shape[-1]
    numel = rows * columns
    product = len(parts) == 2
    total = left.sum(0) @ right.sum(1) if product else left.sum(dtype=torch.float64)
    mean = float(total) / numel
    square, fourth = 0.0, 0.0
    for block in left.split(max(1, BLOCK // columns)):
        d = (block @ right if product else block.double()) - mean
        d = d.square()
        square, fourth = square + float(d.sum()), fourth + float(d.square().sum())
    variance = square / numel
    return None if variance <= (ALIKE * mean) ** 2 else fourth / numel / variance**2
