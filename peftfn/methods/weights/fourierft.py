"""FourierFT: W + s·Re ifft2(S), with n trained entries in the spectrum S."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Size, Tensor
from torch.nn import functional as F

from peftfn.core.fields import STARTS, PositiveInt, Start
from peftfn.core.method import Cases, Index, Leaf, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.tensors.remat import recomputed


@dataclass(frozen=True)
class FourierFT(Weight):
    """W + s·Re ifft2(S), S [out, in] zero but for n entries c [n] at random places (weights of a shape share them).

    Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", 2024, arXiv:2405.03003. x goes
    through one FFT, meets c at its n places, and comes back through another: the large matrix is never made.

    Trainable parameters per site: n_frequency. Use it for tiny files with changes all over the weight; it costs two
    transforms a call.

    Args:
        n_frequency: n, trained entries; at most out·in.
        scaling: s.
        seed: of the places, drawn as PEFT draws them (random_loc_seed); they are not saved.
        init_weights: "default" (zero) or "random" (normal: not the identity; PEFT's default).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.FourierFT(n_frequency=10)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    linear_in = ("sc",)
    cases: ClassVar[Cases] = (
        {"n_frequency": 12, "scaling": 30.0},
        {"n_frequency": 9, "scaling": 20.0, "seed": 3, "init_weights": "random"},
    )

    peft = Peft(
        "FOURIERFT",
        {"c": "fourierft_spectrum"},
        {"n_frequency": "n_frequency", "scaling": "scaling", "seed": "random_loc_seed", "init_weights": "init_weights"},
        {"init_weights": STARTS},
    )

    n_frequency: PositiveInt = 1000
    scaling: float = 150.0
    seed: int = 777
    init_weights: Start = "default"

    std: ClassVar = 1.0

    def places(self, at: Tensor, out: int, in_: int) -> Tensor:
        """Row and column in the spectrum, [2, n], of the places at [n] of a flattened [out, in]."""
        return torch.stack([at // in_, at % in_])

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        drawn: dict[tuple[int, int], Tensor] = {}
        for site, w in weights.items():
            out, in_ = w.shape[-2:]
            if self.n_frequency > out * in_:
                raise ValueError(
                    f"{site}: {type(self).__name__}.n_frequency is {self.n_frequency}, more than the {out * in_} "
                    f"entries of a weight [{out}, {in_}]: choose at most that"
                )
            if (out, in_) not in drawn:
                at = rng.reseeded(self.seed).permutation(out * in_)[: self.n_frequency].clone()
                drawn[out, in_] = self.places(at, out, in_)
        return {site: {"at": drawn[w.shape[-2], w.shape[-1]]} for site, w in weights.items()}

    def indices(self, p: Leaf, w: Tensor) -> Mapping[str, Index]:
        return {"at": Index((self.bins(w.shape[0]), self.bins(w.shape[1])), distinct=True)}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"c": rng.zeros(self.n_frequency) if self.identity else rng.normal(self.n_frequency, std=self.std)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        return {k: t for k, t in p.items() if k != "c"} | {"sc": self.scaling * p["c"]}

    def bins(self, size: int) -> int:
        """Rows or columns of the spectrum of a matrix with `size` of them."""
        return size

    def analysed(self, p: Leaf, x: Tensor) -> Tensor:
        """Features [..., in] → what meets the spectrum's columns [..., bins]."""
        return torch.fft.ifft(x)

    def synthesised(self, p: Leaf, z: Tensor, size: int) -> Tensor:
        """What comes from the spectrum's rows [..., bins] → features [..., size]."""
        return torch.fft.ifft(z)

    def spectrum(self, p: Leaf, shape: Size) -> Tensor:
        row, col = p["at"]
        return p["sc"].new_zeros(self.bins(shape[0]), self.bins(shape[1])).index_put((row, col), p["sc"])

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        out, in_ = w.shape
        return self.synthesised(p, self.synthesised(p, self.spectrum(p, w.shape), in_).mT, out).mT.real

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        if not x.numel():  # which an FFT refuses
            return F.linear(x, w)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        p = p | {"sc": p["sc"].to(wide.dtype)}
        f, y = partial(self._change, list(p), w.shape), F.linear(x, w)
        many = p["at"].shape[-1] > 6 * w.shape[1]  # n numbers a row, where x has in: worth a second run of f
        return y + (recomputed(f, wide, *p.values()) if many else f(wide, *p.values())).to(y.dtype)

    def _change(self, names: list[str], shape: Size, x: Tensor, *tensors: Tensor) -> Tensor:
        """x deltaᵀ, of what `prepare` returns."""
        p = dict(zip(names, tensors, strict=True))
        row, col = p["at"]
        z, rows = self.analysed(p, x), self.bins(shape[0])  # z [..., bins]
        if rows * z.shape[-1] < 64 * len(row) and not z.is_complex():  # so full that a matrix product is quicker
            z = F.linear(z, self.spectrum(p, shape))
        else:
            z = z[..., col] * p["sc"]  # [..., n]
            z = z.new_zeros(*z.shape[:-1], rows).index_add(-1, row, z)
        return self.synthesised(p, z, shape[0]).real
