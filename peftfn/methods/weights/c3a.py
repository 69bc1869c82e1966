"""C3A: W + C, C made of circulant blocks: every block of x is convolved around a circle with a trained kernel."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, divides
from peftfn.core.method import Leaf, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng

_RANDOM = ("xavier_uniform", "kaiming_uniform", "gaussian")


@dataclass(frozen=True)
class C3A(Weight):
    """W + C/in, block (m, n) of C being the circulant matrix C[a, t] = k[m, n, (t − a) mod b], k [out/b, in/b, b].

    Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", 2024, arXiv:2407.19342. Runs as FFTs of
    length b; C is never made. The division by `in` is PEFT's.

    Trainable parameters per site: in·out/block_size. Use it for a change of high rank from few parameters.

    Args:
        block_size: b; it must divide in and out.
        init_weights: "zeros", or the starts that are not the identity: "xavier_uniform" (U(±√(6/(in + out))), PEFT's
            default), "kaiming_uniform" (U(±1/√in)) and "gaussian" (N(0, 1)).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.C3A(block_size=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    linear_in = ("sk",)
    cases = ({"block_size": 2}, {"block_size": 1, "init_weights": "gaussian"})

    peft = Peft(
        "C3A",
        {"k": "c3a_kernel"},
        {"block_size": "block_size", "init_weights": "init_weights"},
        {"init_weights": [("zeros", True), ("xavier_uniform", False), *((s, s) for s in _RANDOM)]},
    )

    block_size: PositiveInt = 256
    init_weights: Literal["zeros", "xavier_uniform", "kaiming_uniform", "gaussian"] = "zeros"

    @property
    def identity(self) -> bool:
        return self.init_weights == "zeros"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), b = w.shape, self.block_size
        divides(self, "block_size", b, out=out, **{"in": in_})
        shape = (out // b, in_ // b, b)
        if self.init_weights == "gaussian":
            return {"k": rng.normal(*shape)}
        bounds = {"zeros": 0.0, "xavier_uniform": sqrt(6 / (in_ + out)), "kaiming_uniform": 1 / sqrt(in_)}
        return {"k": rng.uniform(*shape, bound=bounds[self.init_weights])}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        return {"sk": p["k"] / w.shape[1]}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        i = torch.arange(self.block_size, device=w.device)
        blocks = p["sk"][:, :, (i - i[:, None]) % self.block_size]  # [out/b, in/b, a, t]
        return blocks.transpose(1, 2).flatten(2).flatten(0, 1)

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        if not x.numel():  # which an FFT refuses
            return F.linear(x, w)
        wide = torch.promote_types(x.dtype, torch.float32)
        f = torch.fft.rfft(x.to(wide).unflatten(-1, (-1, self.block_size)))  # [..., in/b, b/2 + 1]
        z = torch.einsum("...nf,mnf->...mf", f, torch.fft.rfft(p["sk"].to(wide)).conj())
        y = F.linear(x, w)
        return y + torch.fft.irfft(z, self.block_size).flatten(-2).to(y.dtype)
