"""Layer dropping: in train mode a layer is left out at random."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.fields import Probability
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclass(frozen=True)
class LayerDrop(ModuleMethod):
    """x for rows that are dropped and y for the others, x the input and y the output of a module of one width.

    In train mode each row is dropped with probability `rate`; in eval mode none is. The layer runs in any case, so this
    saves no time. It has no parameters: it is for a net that has other methods too.

    Fan et al., "Reducing Transformer Depth on Demand with Structured Dropout", 2019, arXiv:1909.11556 (there whole
    batches are dropped).

    Trainable parameters per site: 0. Use it to train adapters that do without some layers.

    Args:
        rate: probability of dropping a row's layer in train mode.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)).train()
        net = pf.adapt(model, {"0.weight": pf.LoRA(2), "1": pf.LayerDrop(0.5)})
        y = net.apply(net.init(seed=0), torch.ones(3, 2, 8))
    """

    cases: ClassVar[Cases] = ({"rate": 0.5},)
    in_eval: ClassVar = (("rate", 0.0),)

    rate: Probability = 0.1

    def init(self, rng: Rng, m: Place) -> Leaf:
        before, after = m.sizes
        if before != after:
            raise ValueError(
                f"LayerDrop puts what goes into a module in place of what comes out, and here {before or 'no'} "
                f"features go in and {after} come out: name a module of one width, such as a whole layer"
            )
        return {}

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        if not self.rate:
            return y
        return torch.where(torch.rand_like(y[..., :1, :1]) < self.rate, x, y)  # one draw a row
