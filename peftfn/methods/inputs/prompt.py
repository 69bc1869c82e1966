"""Prompt tuning: n trained embeddings in front of the input's."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import Tokens
from peftfn.core.rng import Rng
from peftfn.model.place import Place


@dataclass(frozen=True)
class PromptTuning(Tokens):
    """cat[P, E(ids)] in place of E(ids), with P [n, d] trained; heads see the outputs of the real tokens alone.

    Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", 2021, arXiv:2104.08691.

    Trainable parameters per site: n·d. Use it for large models, and where many tasks share a batch: rows with
    other prompts, and with none, go together.

    Args:
        n: virtual tokens.
        start: "normal" draws P from N(0, 1), as PEFT does; "vocabulary" takes the embeddings of random tokens.
        ids: start from the embeddings of these tokens, repeated to n: a text, through your tokenizer.
        pooled: for heads that pool position 0 above the backbone (RoBERTa's, ELECTRA's): "token" gives them the first
            token's state, "virtual" the first virtual token's, as PEFT does.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {".*": pf.PromptTuning(n=3)})  # ".*" finds the backbone, "model"
        logits = net.apply(net.init(seed=0), torch.tensor([[1, 2, 3]])).logits
        assert logits.shape == (1, 3, 9)
    """

    cases: ClassVar[Cases] = ({"n": 3}, {"n": 2, "start": "vocabulary"}, {"n": 4, "ids": (1, 3)})

    n: PositiveInt = 8
    start: Literal["normal", "vocabulary"] = "normal"
    ids: tuple[int, ...] | None = None
    pooled: Literal["token", "virtual"] = "token"

    identity = False  # type: ignore[assignment]

    def init(self, rng: Rng, m: Place) -> Leaf:
        if (self.ids is None and self.start == "normal") or rng.meta:
            return {"tokens": rng.normal(self.n, m.width)}
        weight: Tensor = m.embedding().weight.detach()  # type: ignore[operator]
        if self.ids is None:
            at = rng.permutation(len(weight)).cpu().repeat(-(-self.n // len(weight)))[: self.n]
        else:
            if not all(0 <= i < len(weight) for i in self.ids) or not self.ids:
                raise ValueError(f"PromptTuning.ids is {self.ids}: give ids of tokens, from 0 to {len(weight) - 1}")
            at = torch.tensor(self.ids).repeat(-(-self.n // len(self.ids)))[: self.n]
        return {"tokens": weight[at.to(weight.device)].to(rng.dtype)}
