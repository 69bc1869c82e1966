"""IA3: l ⊙ (W x + b), or W (l ⊙ x) for feed-forward layers."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


def _written(m: "IA3") -> dict[str, Any]:
    if not m.scales_bias and not m.feedforward:
        raise ValueError("IA3.scales_bias is False, and PEFT's IA3 always scales the bias: use the native format")
    return {}


@dataclass(frozen=True)
class IA3(Weight):
    """l ⊙ (W x + b) with l [out]; with feedforward, W (l ⊙ x) + b with l [in].

    Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", 2022,
    arXiv:2205.05638: outputs of keys and values, inputs of the second feed-forward layer.

    Trainable parameters per site: out, or in. Use it for thousands of tenants with a few examples each.

    Args:
        feedforward: scale the layer's input features instead of its outputs (and bias).
        scales_bias: whether l, on the outputs, scales the bias too, as in the paper and PEFT; LyCORIS leaves it alone.

    Example:
        mlp = torch.nn.ModuleDict({"v_proj": torch.nn.Linear(8, 8), "down_proj": torch.nn.Linear(16, 8)})
        net = pf.adapt(mlp, {"v_proj.weight": pf.IA3(), "down_proj.weight": pf.IA3(feedforward=True)})
        adapter = net.init(seed=0)
    """

    cases = ({}, {"feedforward": True}, {"scales_bias": False})

    peft = Peft(
        "IA3",
        {"l": "ia3_l"},
        {"feedforward": "feedforward_modules"},
        writes=_written,
        leaf_to=lambda m, p: {"ia3_l": p["l"][None] if m.feedforward else p["l"][:, None]},
    )

    feedforward: bool = False
    scales_bias: bool = True

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"l": rng.ones(w.shape[1 if self.feedforward else 0])}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return w * ((p["l"] if self.feedforward else p["l"][:, None]) - 1)

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.feedforward or not self.scales_bias else b * p["l"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w * p["l"]) if self.feedforward else dot(x, w) * p["l"]

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return F.linear(x * p["l"], w) if self.feedforward else F.linear(x, w) * p["l"]
