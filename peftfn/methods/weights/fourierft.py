"""FourierFT: W + s·Re ifft2(S), with n trained entries in the spectrum S."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.fields import STARTS, PositiveInt, Start
from peftfn.core.method import Cases, Index, Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.transformed import _Transformed


@dataclass(frozen=True)
class FourierFT(_Transformed):
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
        return size

    def analysed(self, p: Leaf, x: Tensor) -> Tensor:
        return torch.fft.ifft(x)

    def synthesised(self, p: Leaf, z: Tensor, size: int) -> Tensor:
        return torch.fft.ifft(z)
