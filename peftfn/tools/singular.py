"""Singular values of what says where an adapter should go: weights, differences of weights, sums of gradients."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfn.core.rng import Rng
from peftfn.model.site import Site
from peftfn.tensors.precision import wide
from peftfn.tensors.quantised import QuantisedWeight

FLOOR = 1e-8
"""What PEFT adds to the smallest singular value before it divides by it."""


def matrix_of(site: Site, weight: Tensor | QuantisedWeight) -> Tensor:
    """The canonical weight [..., out, in] in fp32 or wider, a quantised one made dense.

    Raises:
        ValueError: it has no values, or values that are not finite; it names the site.
    """
    w = weight.dense() if isinstance(weight, QuantisedWeight) else weight
    if w.is_meta:
        raise ValueError(f"{site.name}: the weight is on the meta device and has no values; load the model's weights")
    w = wide(site.canonical(w.detach()))
    if not w.isfinite().all():
        raise ValueError(f"{site.name}: the weight has values that are not finite, so it has no singular values")
    return w


def condition(w: Tensor) -> float:
    """σ₁/(σ_n + 1e-8) of a matrix; of a stack of experts [e, out, in] the mean over the experts."""
    s = torch.linalg.svdvals(w)
    return float((s[..., 0] / (s[..., -1] + FLOOR)).mean())


@dataclass(frozen=True)
class Spectrum:
    """σ² of a matrix in falling order, and their sum, which may count more than are known.

    Experts in one parameter have one rank: their values are summed over the experts.
    """

    values: Tensor
    total: float

    @staticmethod
    def of(w: Tensor) -> "Spectrum":
        """Of a matrix, or of a stack of experts [e, out, in]."""
        squares = torch.linalg.svdvals(w).square()
        squares = squares.sum(0) if squares.dim() == 2 else squares
        return Spectrum(squares, float(squares.sum()))

    def relative(self) -> "Spectrum":
        """With the sum 1, unless all are zero."""
        return Spectrum(self.values / self.total, 1.0) if self.total else self

    def held(self, rank: int) -> float:
        """The share of the sum that the first `rank` values are."""
        return min(1.0, float(self.values[:rank].sum()) / self.total) if self.total else 0.0

    def rank(self, energy: float) -> int:
        """The smallest rank that holds this share, or all values that there are; 0 where all are zero."""
        if not self.total:
            return 0
        short = self.values.cumsum(0) < energy * (1 - 1e-6) * self.total
        return min(len(self.values), int(short.sum()) + 1)


@dataclass
class Sketch:
    """A sum of matrices [..., out, in] that come one by one: whole, or, with a `size`, as two thin products Y = G Ω and
    Z = Ψ G of it.

    Tropp, Yurtsever, Udell and Cevher, "Practical Sketching Algorithms for Low-Rank Matrix Approximation", 2017,
    arXiv:1609.00048, algorithm 4: with Q an orthonormal basis of Y, G ≈ Q (Ψ Q)⁺ Z, exactly where the rank of G is at
    most `size`; values that fall slowly come out too large. It holds (3·size + 1)·(out + in) numbers, or the sum itself
    where that has no more.
    """

    site: Site
    size: int | None
    whole: Tensor | None = None
    maps: tuple[Tensor, Tensor] | None = None  # Ω [in, size], Ψ [2·size + 1, out]
    products: tuple[Tensor, Tensor] | None = None  # Y [out, size], Z [2·size + 1, in]

    def add(self, g: Tensor) -> None:
        """Add a matrix, or a stack of experts [e, out, in]."""
        out, in_ = g.shape[-2:]
        if self.size is None or out * in_ <= (3 * self.size + 1) * (out + in_):
            self.whole = g if self.whole is None else self.whole + g
            return
        if self.maps is None:
            rng = Rng(0, f"{self.site.name}: sketch", device=g.device, dtype=g.dtype)
            self.maps = rng.normal(in_, self.size), rng.normal(2 * self.size + 1, out)
        y, z = g @ self.maps[0], self.maps[1] @ g
        self.products = (y, z) if self.products is None else (self.products[0] + y, self.products[1] + z)

    def spectrum(self) -> Spectrum:
        """Of the sum; a sketch has the `size` largest values, and an estimate of the sum of all."""
        if self.products is None or self.maps is None:
            assert self.whole is not None, "nothing was added"
            return Spectrum.of(self.whole)
        (y, z), psi = self.products, self.maps[1]
        u, t = torch.linalg.qr(psi @ torch.linalg.qr(y)[0])
        known = Spectrum.of(torch.linalg.solve_triangular(t, u.mT @ z, upper=True))
        return Spectrum(known.values, max(known.total, float(z.square().sum()) / len(psi)))


def shared_out(spectra: Mapping[str, Spectrum], budget: int, most: int | None) -> dict[str, int]:
    """{site: rank}: the `budget` largest values of all sites together, of each at most `most`, of none what is zero.

    So no other ranks of the same total hold more of the values' sum. Equal values go to the earlier component, and then
    to the earlier site.
    """
    ranks = dict.fromkeys(spectra, 0)
    for _, _, name in sorted(_components(spectra, most), key=lambda c: (-c[0], c[1]))[:budget]:
        ranks[name] += 1
    return ranks


def _components(spectra: Mapping[str, Spectrum], most: int | None) -> Iterator[tuple[float, int, str]]:
    """(value, its number, site), of values that are not zero up to rounding."""
    for name, spectrum in spectra.items():
        values = spectrum.values
        floor = float(values.max()) * torch.finfo(values.dtype).eps ** 2
        yield from ((v, i, name) for i, v in enumerate(values[:most].tolist()) if v > floor)


def available(spectra: Mapping[str, Spectrum], most: int | None) -> int:
    """How many ranks there are to give."""
    return sum(1 for _ in _components(spectra, most))
