"""WaveFT: W + s·idwt2(S), with n trained entries among a matrix' wavelet coefficients S; or W + s·S."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import STARTS, PositiveInt
from peftfn.core.method import Cases, Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.wavelets import length, low_pass
from peftfn.methods.weights.fourierft import FourierFT


@dataclass(frozen=True)
class WaveFT(FourierFT):
    """W + s·idwt2(S), S zero but for n entries c [n] at random places: FourierFT with wavelets for waves.

    Bilican et al., "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", 2025, arXiv:2505.12532.
    One level of the transform; with a filter of length L, S is [out, in] centred in a matrix larger by L − 2, as in
    PEFT. x goes through a filter bank, meets c at its n places, and comes back through another; or, as with FourierFT,
    the change is made whole.

    Trainable parameters per site: n_frequency. Use it for tiny files with local changes; it costs two filter banks a
    call.

    Args:
        n_frequency: n, trained entries; at most out·in.
        scaling: s.
        seed: of the places, drawn as PEFT draws them (random_loc_seed); they are not saved.
        wavelet: "db1" (Haar) to "db38", "sym2" to "sym10", "coif1" to "coif4". PEFT's own table is wrong for coif4 and
            coif5 (not orthogonal), and ends at db10.
        idwt: transform; otherwise S itself is the change.
        init_weights: "default" (zero) or "random" (normal of std 0.01: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.WaveFT(n_frequency=10, wavelet="db2")})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases: ClassVar[Cases] = (
        {"n_frequency": 12, "scaling": 4.0},
        {"n_frequency": 20, "scaling": 3.0, "wavelet": "sym4", "seed": 3},
        {"n_frequency": 15, "scaling": 2.0, "idwt": False},
    )

    peft = Peft(
        "WAVEFT",
        {"c": "waveft_spectrum"},
        {
            "n_frequency": "n_frequency",
            "scaling": "scaling",
            "seed": "random_loc_seed",
            "wavelet": "wavelet_family",
            "idwt": "use_idwt",
            "init_weights": "init_weights",
        },
        {"init_weights": STARTS},
    )

    n_frequency: PositiveInt = 2592
    scaling: float = 25.0
    wavelet: str = "db1"
    idwt: bool = True

    std: ClassVar = 0.01
    real: ClassVar = True

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            low_pass(self.wavelet)
        except ValueError as e:
            raise ValueError(f"WaveFT.wavelet is {self.wavelet!r}: {e}") from None

    def bins(self, size: int) -> int:
        return 2 * ((size + length(self.wavelet) - 1) // 2) if self.idwt else size

    def places(self, at: Tensor, out: int, in_: int) -> Tensor:
        row, col = ((i + (self.bins(n) - n) // 2, self.bins(n) // 2) for i, n in ((at // in_, out), (at % in_, in_)))
        if not self.idwt:
            return torch.stack([row[0], col[0]])
        # PEFT puts what is high-pass over the rows and low-pass over the columns top right, and the other bottom left.
        swapped = (row[0] < row[1]) != (col[0] < col[1])
        return torch.stack([torch.where(swapped, (i + half) % (2 * half), i) for i, half in (row, col)])

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        leaves = super().shared(rng, weights)
        if not self.idwt:
            return leaves
        h = torch.tensor(low_pass(self.wavelet), dtype=torch.float64)
        high = h.flip(0) * (1 - 2 * (torch.arange(len(h)) % 2))
        bank = torch.stack([h, high]).to(rng.device, rng.dtype)
        return {site: leaf | {"bank": bank} for site, leaf in leaves.items()}

    def analysed(self, p: Leaf, x: Tensor) -> Tensor:
        """The transpose of `synthesised`: features [..., size] → coefficients [..., bins], low-pass ones first."""
        if not self.idwt:
            return x
        extra = length(self.wavelet) - 2
        y = F.pad(x.reshape(-1, 1, x.shape[-1]), (extra, self.bins(x.shape[-1]) - x.shape[-1]))
        return F.conv1d(y, p["bank"][:, None].to(x.dtype), stride=2).reshape(*x.shape[:-1], -1)

    def synthesised(self, p: Leaf, z: Tensor, size: int) -> Tensor:
        if not self.idwt:
            return z
        extra = length(self.wavelet) - 2
        y = F.conv_transpose1d(z.reshape(-1, 2, z.shape[-1] // 2), p["bank"][:, None].to(z.dtype), stride=2)
        return y[:, 0, extra : extra + size].reshape(*z.shape[:-1], size)
