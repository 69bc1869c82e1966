"""NEFTune: noise on embeddings in train mode."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclass(frozen=True)
class NEFTune(ModuleMethod):
    """y + u, u uniform in (−m, m) with m = alpha/√(T·d), y [..., T, d] the output of an embedding, in train mode alone.

    T counts padding too, as in the paper's code. It has no parameters: it is for a net that has other methods too.

    Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", 2023, arXiv:2310.05914.

    Trainable parameters per site: 0. Use it at a model's embeddings (embed_tokens), beside other methods, for
    instruction tuning.

    Args:
        alpha: size of the noise.

    Example:
        model = torch.nn.Sequential(torch.nn.Embedding(9, 8), torch.nn.Linear(8, 2)).train()
        net = pf.adapt(model, {"0": pf.NEFTune(), "1.weight": pf.LoRA(2)})
        y = net.apply(net.init(seed=0), torch.tensor([[1, 2, 3]]))
    """

    cases: ClassVar[Cases] = ({"alpha": 3.0},)
    in_eval: ClassVar = (("alpha", 0.0),)

    alpha: float = 5.0

    def init(self, rng: Rng, m: Place) -> Leaf:
        return {}

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        if not self.alpha:
            return y
        tokens, d = y.shape[-2:]
        return y + (2 * torch.rand_like(y) - 1) * (self.alpha / (tokens * d) ** 0.5)
