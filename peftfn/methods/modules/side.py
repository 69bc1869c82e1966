"""Side tuning: σ(a) y + (1 − σ(a)) S(x), a small network S beside a module."""

from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place

CHANNELS = (3, 16, 16, 32, 64)
"""Of the images that go into each convolution of "fcn4", and of what comes out of the last."""
STEPS = ((1, 1), (2, 0), (2, 0), (1, 0))
"""(stride, padding) of each."""


@dataclass(frozen=True)
class Side(ModuleMethod):
    """σ(a)·y + (1 − σ(a))·S(x), with x the input and y the output of a module, a one number and S a network of its own.

    S is U gelu(D x + c) + b with the hidden size of y ("mlp"), or four 3×3 convolutions, each with a normalisation of
    two groups of channels and a relu, an average over the image, and a linear layer ("fcn4"): for modules that make
    features [rows, d] of images [rows, 3, height, width] of 15×15 pixels at least. a starts at 0: a fresh adapter
    is half of each, and not the identity.

    Zhang et al., "Side-Tuning: A Baseline for Network Adaptation via Additive Side Networks", 2019, arXiv:1912.13503;
    the networks are those of ms-swift.

    Trainable parameters per site: in·out + out² + 2·out + 1 ("mlp"). Use it around a whole network whose features
    should be completed by those of a small one.

    Args:
        net: S.
        dim: features of y, where the module's weights do not tell; 0: they do. With "mlp", those of x too.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        net = pf.adapt(model, {"0": pf.Side()})
        y = net.apply(net.init(seed=0), torch.ones(3, 8))
    """

    cases: ClassVar[Cases] = ({},)

    net: Literal["mlp", "fcn4"] = "mlp"
    dim: int = 0

    @property
    def identity(self) -> bool:
        return False

    @property
    def features_last(self) -> bool:  # type: ignore[override]
        return self.net == "mlp"

    def init(self, rng: Rng, m: Place) -> Leaf:
        d, a = self.dim or m.width, rng.zeros(1)
        if self.net == "mlp":
            size = self.dim or m.width_in
            up = {"up": rng.kaiming(d, d), "b": rng.uniform(d, bound=1 / sqrt(d))}
            return {"a": a, "down": rng.kaiming(d, size), "c": rng.uniform(d, bound=1 / sqrt(size)), **up}
        leaf = {"a": a}
        for i, (c_in, c_out) in enumerate(pairwise(CHANNELS)):
            leaf |= {
                f"conv{i}": rng.kaiming(c_out, c_in, 3, 3),
                f"gain{i}": rng.ones(c_out),
                f"bias{i}": rng.zeros(c_out),
            }
        return {**leaf, "up": rng.kaiming(d, CHANNELS[-1]), "b": rng.uniform(d, bound=1 / sqrt(CHANNELS[-1]))}

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        h = F.gelu(F.linear(x, p["down"], p["c"])) if self.net == "mlp" else _convolved(p, x)
        share = p["a"].sigmoid()
        return share * y + (1 - share) * F.linear(h, p["up"], p["b"])


def _convolved(p: Leaf, x: Tensor) -> Tensor:
    """[rows, 3, height, width] ↦ [rows, channels]"""
    for i, (stride, padding) in enumerate(STEPS):
        x = F.conv2d(x, p[f"conv{i}"], stride=stride, padding=padding)
        x = F.group_norm(x, 2, p[f"gain{i}"], p[f"bias{i}"]).relu()
    return x.mean((-2, -1))
