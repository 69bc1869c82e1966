"""FourierFT: W + s·Re ifft2(S), with n trained entries in the spectrum S."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

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
    through one FFT, meets c at its n places, and comes back through another. Where that costs more than to transform
    S (many rows, a small W), the change is made whole, and again in the backward pass.

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
    real: ClassVar = False
    """Whether what `analysed` returns is."""

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
        return self.change(p, w.shape)

    def change(self, p: Leaf, shape: Size) -> Tensor:
        """Δ [out, in], of what `prepare` returns."""
        return self.synthesised(p, self.synthesised(p, self.spectrum(p, shape), shape[1]).mT, shape[0]).mT.real

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        if not x.numel():  # which an FFT refuses
            return F.linear(x, w)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        p = p | {"sc": p["sc"].to(wide.dtype)}
        (out, in_), n, rows = w.shape, p["at"].shape[-1], x.numel() // x.shape[-1]
        given: tuple[Any, ...] = (list(p), w.shape)
        if rows * (n + in_ + out) > (4 if self.real else 2) * in_ * out * (1 + rows / 400):  # Δ costs less, as measured
            y = recomputed(partial(self._by_change, *given), wide, *p.values(), pull=partial(self._pulled, *given))
        else:
            f, sparse = partial(self._by_rows, *given), not self._full(p, w.shape, rows)
            many = sparse and n > 6 * in_  # n numbers a row, where x has in: worth a second run of f
            y = recomputed(f, wide, *p.values()) if many else f(wide, *p.values())
        z = F.linear(x, w)
        return z + y.to(z.dtype)

    def _by_change(self, names: list[str], shape: Size, x: Tensor, *tensors: Tensor) -> Tensor:
        """x Δᵀ, by Δ itself."""
        return F.linear(x, self.change(dict(zip(names, tensors, strict=True)), shape))

    def _pulled(self, names: list[str], shape: Size, d: Tensor, x: Tensor, *tensors: Tensor) -> tuple[Any, ...]:
        """The gradients of x and of c, of that of `_by_change`."""
        p = dict(zip(names, tensors, strict=True))
        of_change = d.reshape(-1, shape[0]).mT @ x.reshape(-1, shape[1])
        s = self.analysed(p, self.analysed(p, of_change).mT).mT.real
        return d @ self.change(p, shape), *(s[tuple(p["at"])] if k == "sc" else None for k in names)

    def _full(self, p: Leaf, shape: Size, rows: int) -> bool:
        """Whether a matrix product with the spectrum is quicker than its places one by one, as measured."""
        return self.real and self.bins(shape[0]) * self.bins(shape[1]) * (1 + 16 / rows) < 100 * p["at"].shape[-1]

    def _by_rows(self, names: list[str], shape: Size, x: Tensor, *tensors: Tensor) -> Tensor:
        """x Δᵀ, by transforms of x."""
        p = dict(zip(names, tensors, strict=True))
        row, col = p["at"]
        z = self.analysed(p, x)  # [..., bins]
        if self._full(p, shape, x.numel() // x.shape[-1]):
            z = F.linear(z, self.spectrum(p, shape))
        else:
            z = z[..., col] * p["sc"]  # [..., n]
            z = z.new_zeros(*z.shape[:-1], self.bins(shape[0])).index_add(-1, row, z)
        return self.synthesised(p, z, shape[0]).real
