"""SCETuning: L2 gelu(L1 h) added to what comes out of a module, or to the last channels of what goes in."""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import Positive
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclass(frozen=True)
class SCETuning(ModuleMethod):
    """h + U gelu(D h + c) + b, with h the output of a module, or the last `dim` channels of its input ("decoder").

    At the decoder blocks of a U-Net the last channels of the input are what its skip connection brings. Hidden states
    of four dimensions are images [rows, channels, height, width]; of others, channels are the last dimension.

    Jiang et al., "SCEdit: Efficient and Controllable Image Diffusion Generation via Skip Connection Editing", 2023,
    arXiv:2312.11392; as ms-swift has it, where hints do not enter either.

    Trainable parameters per site: 2·d·⌊ratio·d⌋ + ⌊ratio·d⌋ + d. Use it on the skip connections of a diffusion U-Net.

    Args:
        mode: h: "encoder" is the output, "decoder" the last channels of the input.
        ratio: hidden features, as a share of d.
        dim: channels d of h, where the module's weights do not tell; 0: they do.

    Example:
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 3))
        net = pf.adapt(model, {"2": pf.SCETuning("decoder", dim=2)})
        y = net.apply(net.init(seed=0), torch.ones(1, 3, 8, 8))
    """

    cases: ClassVar[Cases] = ({"ratio": 0.5}, {"mode": "decoder", "ratio": 2.0})

    mode: Literal["encoder", "decoder"] = "encoder"
    ratio: Positive = 1.0
    dim: int = 0

    @property
    def hooks(self) -> frozenset[str]:
        return frozenset({"after" if self.mode == "encoder" else "before"})

    def init(self, rng: Rng, m: Place) -> Leaf:
        d = self.dim or (m.width if self.mode == "encoder" else m.width_in)
        r = int(self.ratio * d)
        if not r:
            raise ValueError(f"SCETuning.ratio is {self.ratio}, which leaves none of {d} channels: give 1/{d} or more")
        down = {"down": rng.kaiming(r, d), "c": rng.uniform(r, bound=1 / sqrt(d))}
        return {**down, "up": rng.zeros(d, r), "b": rng.zeros(d)}

    def before(self, p: Leaf, m: Place, x: Tensor, *seen: Tensor) -> Tensor:
        if self.mode == "encoder":
            return x
        axis, d = (-3 if x.dim() == 4 else -1), p["b"].shape[-1]
        kept, skipped = x.split([x.shape[axis] - d, d], axis)
        return torch.cat([kept, edited(p, skipped)], axis)

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        return edited(p, y) if self.mode == "encoder" else y


def edited(p: Leaf, h: Tensor) -> Tensor:
    """h + U gelu(D h + c) + b over the channels of h."""
    features = h.movedim(-3, -1) if h.dim() == 4 else h
    change = F.linear(F.gelu(F.linear(features, p["down"], p["c"])), p["up"], p["b"])
    return h + (change.movedim(-1, -3) if h.dim() == 4 else change)
