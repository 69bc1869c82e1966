"""AdapterPlus: y + g ⊙ (U act(D y + c) + b), a bottleneck adapter with a trained scale for each channel."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Probability
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.methods.modules.bottleneck import ACTIVATIONS, Activation
from peftfn.model.place import Place


@dataclass(frozen=True)
class AdapterPlus(ModuleMethod):
    """y + g ⊙ (U act(D y + c) + b), y the output of a module and g a scale for each channel, which starts at 1.

    In train mode each row is left out with probability `drop_path`, and the change of the others is divided by
    1 − drop_path (stochastic depth).

    Steitz and Roth, "Adapters Strike Back", CVPR 2024, arXiv:2406.06820.

    Trainable parameters per site: 2·rank·d + rank + 2·d. Use it for vision transformers, after the feed-forward block.

    Args:
        rank: features between D and U.
        activation: act; "none" leaves it out.
        drop_path: probability of leaving a row out in train mode.
        dropout: probability of dropping a feature of the change in train mode.
        dim: features of the hidden states, where the module's weights do not tell; 0: they do.
        init_weights: "default" (D normal with standard deviation 0.01, U zero), or "random" (U as D, as in the paper:
            nearly the identity, but not the identity).

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        net = pf.adapt(model, {"0": pf.AdapterPlus(rank=4)})
        y = net.apply(net.init(seed=0), torch.ones(3, 8))
    """

    cases: ClassVar[Cases] = (
        {"rank": 2},
        {"rank": 3, "activation": "relu", "dropout": 0.5, "drop_path": 0.5, "init_weights": "random"},
    )
    in_eval: ClassVar = (("dropout", 0.0), ("drop_path", 0.0))

    rank: PositiveInt = 8
    activation: Activation = "gelu"
    drop_path: Probability = 0.0
    dropout: Probability = 0.0
    dim: int = 0
    init_weights: Literal["default", "random"] = "default"

    def init(self, rng: Rng, m: Place) -> Leaf:
        d, r = self.dim or m.width, self.rank
        up = rng.zeros(d, r) if self.init_weights == "default" else rng.normal(d, r, std=0.01)
        return {"down": rng.normal(r, d, std=0.01), "c": rng.zeros(r), "up": up, "b": rng.zeros(d), "g": rng.ones(d)}

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        inner = ACTIVATIONS[self.activation](F.linear(y, p["down"], p["c"]))
        change = self.dropped(p["g"] * F.linear(inner, p["up"], p["b"]))
        if self.drop_path:
            kept = torch.rand_like(change[..., :1, :1]) >= self.drop_path  # one draw a row
            change = change * kept / (1 - self.drop_path)
        return y + change
