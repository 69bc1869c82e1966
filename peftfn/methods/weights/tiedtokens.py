"""TiedTokens: TrainableTokens of an embedding and of the head that is tied to it, trained as one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.weights.trainabletokens import TrainableTokens


@dataclass(frozen=True)
class TiedTokens(TrainableTokens):
    """W with row `tokens[i]` replaced by T[i], one T [n, dim] for all sites of the rule.

    For a language model whose head is the embedding (`tie_word_embeddings`): the rule "embed_tokens|lm_head" trains
    the rows of both as one, as PEFT does on such a model.

    Trainable parameters per site: tokens·dim for the whole rule. Use it for new tokens in a model whose head is its
    embedding.

    Args:
        tokens: indices of the rows, each once.

    Raises:
        ValueError: the sites have different rows at these tokens, or rows of different sizes.

    Example:
        model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(9, 8), "lm_head": torch.nn.Linear(8, 9)})
        model["lm_head"].weight = model["embed"].weight
        net = pf.adapt(model, {"embed|lm_head.weight": pf.TiedTokens(tokens=(7, 8))})
        adapter = net.init(seed=0)
    """

    cases = ({"tokens": (4, 0)}, {"tokens": (5,)})

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        super().init(rng, w)
        return {}

    def bank(self, rng: Rng, weights: Mapping[str, Tensor]) -> Leaf:
        chosen = {name: self._chosen(rng, name, w) for name, w in weights.items()}
        name, t = next(iter(chosen.items()))
        for other, rows in chosen.items():
            if rows.shape != t.shape or not (t.is_meta or torch.equal(rows, t)):
                raise ValueError(
                    f"TiedTokens: {other} has other rows at {self.tokens} than {name}; tie the two weights, or give "
                    "each its own TrainableTokens"
                )
        return {"t": t.to(rng.device, rng.dtype)}

    def _chosen(self, rng: Rng, name: str, w: Tensor) -> Tensor:
        rows = w.mT if rng.sites[name].kind == "embedding" else w
        if max(self.tokens) >= len(rows):
            return w.new_empty(len(self.tokens), rows.shape[1])  # `init` says at which site, and what to do
        return rows[torch.tensor(self.tokens, device=w.device)]
