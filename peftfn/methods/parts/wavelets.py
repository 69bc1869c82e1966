"""Orthogonal wavelets from their definitions: the low-pass filter h of Daubechies' wavelets, symlets and coiflets.

Every h has ‖h‖ = 1, Σ h = √2 and is orthogonal to its own shifts by two; the names are PyWavelets' (`rec_lo`).
"""

import math
import re
from functools import cache

import torch
from torch import Tensor

_F64 = torch.float64
_OUTSIDE = {2: 0, 3: 0, 4: 0b10, 5: 0b01, 6: 0b101, 7: 0b001, 8: 0b1010, 9: 0b0110, 10: 0b10101}
"""symN: bit i is set where the i-th smallest root of db N lies outside the unit circle in its place."""
_NEAR = {  # coifN, to three digits: where Newton's method starts
    1: [-73, 338, 853, 385, -73, -16],
    2: [16, -41, -67, 386, 813, 417, -76, -59, 24, 6, -2, -1],
    3: [-4, 8, 23, -66, -61, 405, 794, 428, -72, -82, 35, 16, -9, -3, 1, 0, 0, 0],
    4: [1, -2, -7, 16, 27, -81, -56, 415, 782, 434, -67, -96, 39, 25, -15, -6, 4, 1, -1, 0, 0, 0, 0, 0],
}


def length(name: str) -> int:
    """Entries of h, from the name alone."""
    return int(name.strip("dbsymcoif")) * (6 if name.startswith("coif") else 2)


@cache
def low_pass(name: str) -> tuple[float, ...]:
    """h of "db1" to "db38", "sym2" to "sym10", "coif1" to "coif4"."""
    match = re.fullmatch(r"(db|sym|coif)(\d+)", name)
    family, n = (match[1], int(match[2])) if match else ("", 0)
    if family == "db" and 1 <= n <= 38:
        return tuple(_daubechies(n).tolist())
    if family == "sym" and n in _OUTSIDE:
        return tuple(_symlet(n).tolist())
    if family == "coif" and n in _NEAR:
        return tuple(_coiflet(n).tolist())
    raise ValueError(f"no wavelet is named {name!r}: choose one of db1 … db38, sym2 … sym10, coif1 … coif4")


def _daubechies(n: int) -> Tensor:
    """|H(ω)|² = 2 cos²ⁿ(ω/2) Σ_k C(n−1+k, k) sin²ᵏ(ω/2): its minimum-phase root, by the cepstrum of the sum."""
    m = 4096
    w = 2 * math.pi * torch.arange(m, dtype=_F64) / m
    y = torch.sin(w / 2).square()
    c = torch.fft.ifft(sum((float(math.comb(n - 1 + k, k)) * y**k for k in range(n)), 0 * y).log() / 2).real
    c[1 : m // 2] *= 2
    c[m // 2 + 1 :] = 0
    h = torch.exp(torch.fft.fft(c)) * ((1 + torch.exp(-1j * w)) / 2) ** n
    return math.sqrt(2) * torch.fft.ifft(h).real[: 2 * n]


def _symlet(n: int) -> Tensor:
    """As Daubechies', with the roots chosen for the most symmetric h."""
    c = torch.tensor([math.comb(n - 1 + k, k) for k in range(n)], dtype=_F64)
    companion = torch.diag(torch.ones(n - 2, dtype=_F64), -1)
    companion[0] = -c[:-1].flip(0) / c[-1]
    y = torch.linalg.eigvals(companion)
    y = y[y.imag > -1e-9]  # one of each conjugate pair
    z = 1 - 2 * y
    z = z - torch.sqrt(z * z - 1)
    z = torch.where(z.abs() > 1, 1 / z, z)
    z = z[z.abs().argsort()]
    outside = torch.tensor([_OUTSIDE[n] >> i & 1 for i in range(len(z))], dtype=torch.bool)
    h = torch.ones(1, dtype=torch.complex128)
    for root in [-1 + 0j] * n + [r for v in torch.where(outside, 1 / z, z).tolist() for r in _with_conjugate(v)]:
        h = torch.nn.functional.pad(h, (0, 1)) - root * torch.nn.functional.pad(h, (1, 0))
    return math.sqrt(2) * h.real / h.real.sum()


def _with_conjugate(z: complex) -> list[complex]:
    return [z, z.conjugate()] if abs(z.imag) > 1e-8 else [z]


def _coiflet(n: int) -> Tensor:
    """6n entries, 2n vanishing moments of both h (about 2n) and its high-pass: Newton's method on what defines them."""
    i = torch.arange(6 * n, dtype=_F64)
    powers = ((i - 2 * n) / (3 * n)) ** torch.arange(2 * n, dtype=_F64)[:, None]
    moments = torch.cat([powers, powers * (1 - 2 * (i % 2))])
    want = torch.zeros(7 * n, dtype=_F64)
    want[0], want[3 * n] = 1, math.sqrt(2)
    h = torch.tensor(_NEAR[n], dtype=_F64) / 1000
    for _ in range(12):
        ahead, back = (torch.stack([_shift(h, s * 2 * k) for k in range(3 * n)]) for s in (-1, 1))
        error = torch.cat([ahead @ h, moments @ h]) - want
        step = torch.linalg.lstsq(torch.cat([ahead + back, moments]), error[:, None], driver="gelsd").solution
        h = h - step[:, 0]
    return h


def _shift(h: Tensor, by: int) -> Tensor:
    moved = torch.roll(h, by)
    return moved * (torch.arange(len(h)) >= by if by >= 0 else torch.arange(len(h)) < len(h) + by)
