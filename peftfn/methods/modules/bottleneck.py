"""Bottleneck adapters: y + s·U act(D h + c) + b, h being what comes out of a module, or what goes in, or its norm."""

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
from peftfn.tensors.states import states_out

Activation = Literal["relu", "gelu", "silu", "tanh", "none", "gelu_tanh", "leaky_relu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "none": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
}


@dataclass(frozen=True)
class Bottleneck(ModuleMethod):
    """y + s·U act(D h + c) + b, h the output y of the module, or its input x: a small network around a module.

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", 2019, arXiv:1902.00751 (after the attention and
    after the feed-forward block); Pfeiffer et al., 2020, arXiv:2005.00247 (after the feed-forward block alone);
    He et al., "Towards a Unified View", 2021, arXiv:2110.04366 (parallel: of="input"). With of="normed" the module is a
    norm, and N(x + s·U act(D N(x) + c) + b) comes out: Pfeiffer's in models that normalise after the residual
    connection (BERT), as AdapterHub trains it.

    Trainable parameters per site: rank·(in + out) + rank + out. Use it as the classic adapter: where AdapterHub's
    checkpoints come from, and where a non-linear change is wanted.

    Args:
        rank: features between D and U.
        activation: act; "none" leaves it out.
        of: h: "output" is serial (Houlsby), "input" is parallel, "normed" is what a norm makes of its input (Pfeiffer).
        source: with of="input", the module whose input h is, by its name or a unique end of it; "": this one. A norm
            before the module, say, whose input is the residual stream.
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
        {"rank": 2, "of": "normed"},
        {"rank": 2, "of": "input", "source": "stem"},
    )

    rank: PositiveInt = 8
    activation: Activation = "gelu"
    of: Literal["output", "input", "normed"] = "output"
    scale: float = 1.0
    dropout: Probability = 0.0
    dim: int = 0
    init_weights: Literal["default", "random"] = "default"
    source: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source and self.of != "input":
            raise ValueError(
                f'{type(self).__name__}.source is {self.source!r}, and of is {self.of!r}: give of="input", or no source'
            )

    @property
    def entered(self) -> tuple[str, ...]:
        return (self.source,) if self.source else ()

    @property
    def hooks(self) -> frozenset[str]:
        return frozenset({"before" if self.of == "normed" else "after"})

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        return self.of != "normed"  # it runs the module, whose weights are those of one adapter then

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.of != "normed"  # a norm is, and another module need not be

    def init(self, rng: Rng, m: Place) -> Leaf:
        (out, size), r = self.sizes(m), self.rank
        up = rng.kaiming(out, r) if self.init_weights == "random" else rng.zeros(out, r)
        return {"down": rng.kaiming(r, size), "c": rng.zeros(r), "up": up, "b": rng.zeros(out)}

    def sizes(self, m: Place) -> tuple[int, int]:
        """(features of y, of h)."""
        if self.of == "normed" and all(m.sizes) and m.width_in != m.width:
            raise ValueError(
                f'with of="normed" the module is a norm, and this {m.made_of.__name__} makes {m.width} features of '
                f"{m.width_in}: name a norm, or another h"
            )
        out = self.dim or (m.width_in if self.of == "normed" else m.width)
        return out, self.dim or (m.width_in if self.of == "input" else out)

    def before(self, p: Leaf, m: Place, x: Tensor, *seen: Tensor) -> Tensor:
        return x if self.of != "normed" else self.changed(p, x, states_out(m.forward(x))[0])

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        if self.of == "normed":
            return y
        return self.changed(p, y, y if self.of == "output" else seen[0] if self.source else x)

    def changed(self, p: Leaf, y: Tensor, h: Tensor) -> Tensor:
        """y with what the network makes of h."""
        inner = ACTIVATIONS[self.activation](F.linear(self.dropped(h), p["down"], p["c"]))
        if self.scale == 1:
            return y + F.linear(inner, p["up"], p["b"])
        return torch.add(y, F.linear(inner, p["up"]), alpha=self.scale) + p["b"]
