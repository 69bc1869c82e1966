"""Full: W + D, a difference of the weight's own shape."""

from dataclasses import dataclass

from torch import Tensor

from peftfn.core.method import ALL, Leaf, Weight
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class Full(Weight):
    """W + D with D of the parameter's own shape, starting at zero: full fine-tuning of chosen parameters.

    On biases this is BitFit (Ben Zaken et al., 2021, arXiv:2106.10199), on norms LN-tuning (Zhao et al., 2023,
    arXiv:2312.11420), on a head what PEFT calls modules_to_save. Takes every kind of site.

    Trains in·out, or all of a vector numbers. For: norms, biases, heads, new embeddings.
    """

    linear_in = ("diff",)
    kinds = ALL

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"diff": rng.zeros(*w.shape)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["diff"]
