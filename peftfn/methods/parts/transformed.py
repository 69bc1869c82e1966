"""What FourierFT and WaveFT share: W + s·T⁻¹(S), by transforms of the rows or of the change, whichever costs less."""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.nn import functional as F

from peftfn.core.method import Leaf, Weight
from peftfn.tensors.remat import recomputed


@dataclass(frozen=True)
class _Transformed(Weight):
    """A change that is a two-dimensional transform of a sparse spectrum S, whose entries "sc" [n] are at "at" [2, n].

    A method gives `bins`, `analysed` and `synthesised`.
    """

    real: ClassVar[bool] = False
    """Whether what `analysed` returns is."""

    def bins(self, size: int) -> int:
        """Rows or columns of the spectrum of a matrix with `size` of them."""
        raise NotImplementedError

    def analysed(self, p: Leaf, x: Tensor) -> Tensor:
        """The transpose of `synthesised`: features [..., in] → what meets the spectrum's columns [..., bins]."""
        raise NotImplementedError

    def synthesised(self, p: Leaf, z: Tensor, size: int) -> Tensor:
        """What comes from the spectrum's rows [..., bins] → features [..., size]."""
        raise NotImplementedError

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
