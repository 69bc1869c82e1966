"""BEFT: W x + b + β, a change of the bias alone."""

from dataclasses import dataclass

from torch import Tensor

from peftfn.core.fields import Start
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class BEFT(Weight):
    """W x + b + β with β [out], also at layers without a bias of their own (which then cannot be merged).

    Huang et al., "BEFT: Bias-Efficient Fine-Tuning of Language Models", 2025, arXiv:2509.15974: the biases of the
    value projections. Adding β to existing biases is also what `Full` does on the rule "bias".

    Trainable parameters per site: out. Use it where little data is at hand, for the fewest parameters with an effect.

    Args:
        init_weights: "default" (β zero) or "random" (β standard normal: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6, bias=False), {"weight": pf.BEFT()})  # a bias where the layer has none
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    linear_in = ("beta",)
    cases = ({}, {"init_weights": "random"})

    peft = Peft("BEFT", {"beta": "beft_bias"}, leaf_to=lambda m, p: {"beft_bias": p["beta"][None]})

    init_weights: Start = "default"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"beta": rng.zeros(w.shape[0]) if self.identity else rng.normal(w.shape[0])}

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor:
        return p["beta"] if b is None else b + p["beta"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w)
