"""Deep prompts: trained states in place of the virtual tokens' before a layer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclass(frozen=True)
class DeepPrompt(ModuleMethod):
    """x with P [n, d] in place of the states of each row's first n tokens that the attention mask keeps: at layers
    after the first, together with `PromptTuning(n)` at the backbone, whose virtual tokens these are.

    Jia et al., "Visual Prompt Tuning", 2022, arXiv:2203.12119 (VPT-deep). Where the cache has tokens nothing is
    replaced: it holds what the first step made. Positions of a prefix are no tokens.

    Trainable parameters per site: n·d. Use it where a prompt at the input alone changes too little.

    Args:
        n: tokens whose states are replaced.
        dim: d, where the module's weights do not tell; 0: they do.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {"model": pf.PromptTuning(n=3), r"layers\\.[1-9]\\d*": pf.DeepPrompt(n=3)})
        logits = net.apply(net.init(seed=0), torch.tensor([[1, 2, 3]])).logits
    """

    cases: ClassVar[Cases] = ({"n": 2}, {"n": 1})
    sees_mask: ClassVar[bool] = True

    n: PositiveInt = 8
    dim: int = 0

    identity = False  # type: ignore[assignment]

    def init(self, rng: Rng, m: Place) -> Leaf:
        d = self.dim or m.width_in
        return {"tokens": rng.uniform(self.n, d, bound=(6 / ((self.n + 1) * d)) ** 0.5)}  # Xavier's, of [1, n, d]

    def before(self, p: Leaf, m: Place, x: Tensor, *seen: Tensor) -> Tensor:
        (mask,) = seen
        if mask.shape[-1] != x.shape[-2]:
            return x  # a later step: the cache holds the virtual tokens
        at = mask.long().cumsum(-1) - 1  # the number of each token in its row
        mine = (mask & (at < self.n))[..., None]
        return torch.where(mine, p["tokens"][at.clamp(0, self.n - 1)], x)
