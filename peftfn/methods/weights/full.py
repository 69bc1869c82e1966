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

    Trainable parameters per site: in·out, or all of a vector. Use it to train norms, biases, heads and new embeddings
    as a whole.

    Example:
        model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 6))
        net = pf.adapt(model, {"1.weight": pf.LoRA(rank=2), "0|bias": pf.Full()})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    linear_in = ("diff",)
    kinds = ALL

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"diff": rng.zeros(*w.shape)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return p["diff"]
