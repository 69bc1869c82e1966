"""Bottleneck adapters: y + s·U act(D h + c) + b, h being what comes out of a module, or what goes in."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Probability
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place

Activation = Literal["relu", "gelu", "silu", "tanh", "none"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "none": lambda x: x,
}


@dataclass(frozen=True)
class Bottleneck(ModuleMethod):
    """y + s·U act(D h + c) + b, h the output y of the module, or its input x: a small network around a module.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, arXiv:1902.00751 (after the attention and
    after the feed-forward block); Pfeiffer et al., 2020, arXiv:2005.00247 (after the feed-forward block alone);
    He et al., "Towards a Unified View", 2021, arXiv:2110.04366 (parallel: of="input").

    Trainable parameters per site: rank·(in + out) + rank + out. Use it as the classic adapter: where AdapterHub's
    checkpoints come from, and where a non-linear change is wanted.

    Args:
        rank: features between D and U.
        activation: act; "none" leaves it out.
        of: h: "output" is serial (Houlsby, Pfeiffer), "input" is parallel.
        scale: s.
        dropout: probability of dropping a feature of h in train mode.
        dim: features of the hidden states, where the module's weights do not tell; 0: they do.
        init_weights: "default" (D Kaiming-uniform, the rest zero), or "random" (U too: not the identity, for tests).

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        net = pf.adapt(model, {"0": pf.Bottleneck(rank=4)})
        y = net.apply(net.init(seed=0), torch.ones(3, 8))
    """

    cases: ClassVar[Cases] = (
        {"rank": 2, "scale": 0.5},
        {"rank": 3, "activation": "tanh", "of": "input", "dropout": 0.5},
        {"rank": 2, "activation": "none", "init_weights": "random"},
    )

    rank: PositiveInt = 8
    activation: Activation = "gelu"
    of: Literal["output", "input"] = "output"
    scale: float = 1.0
    dropout: Probability = 0.0
    dim: int = 0
    init_weights: Literal["default", "random"] = "default"

    def init(self, rng: Rng, m: Place) -> Leaf:
        out, r = self.dim or m.width, self.rank
        size = out if self.of == "output" else self.dim or m.width_in
        up = rng.kaiming(out, r) if self.init_weights == "random" else rng.zeros(out, r)
        return {"down": rng.kaiming(r, size), "c": rng.zeros(r), "up": up, "b": rng.zeros(out)}

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        h = self.dropped(y if self.of == "output" else x)
        inner = ACTIVATIONS[self.activation](F.linear(h, p["down"], p["c"]))
        return y + self.scale * F.linear(inner, p["up"]) + p["b"]
