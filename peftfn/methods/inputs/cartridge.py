"""Cartridges: a prefix whose first positions stay, usually the cache of a text."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import Prefix
from peftfn.core.rng import Rng
from peftfn.methods.inputs.prefix import apart, sizes
from peftfn.methods.parts.cache import cache_sizes
from peftfn.model.place import Place


@dataclass(frozen=True)
class Cartridge(Prefix):
    """As `PrefixTuning`, with the keys and values of the first `still` positions constant: they hold the attention's
    sink, and training them is unstable.

    Eyuboglu et al., "Cartridges: Lightweight and general-purpose long context representations via self-study", 2025,
    arXiv:2506.06266. `cartridge_of` starts from the cache of a text.

    Trainable parameters per site: (n − still)·2·layers·heads·head size. Use it to distil a long context into n
    positions.

    Args:
        n: positions in front.
        still: how many of them, the first, are not trained.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {".*": pf.Cartridge(n=4)})
        logits = net.apply(net.init(seed=0), torch.tensor([[1, 2, 3]])).logits
    """

    cases: ClassVar[Cases] = ({"n": 3}, {"n": 4, "still": 2})

    n: PositiveInt = 8
    still: PositiveInt = 1

    identity = False  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.still >= self.n:
            raise ValueError(f"Cartridge.still is {self.still}: give fewer than n={self.n}, so that some are trained")

    def init(self, rng: Rng, m: Place) -> Leaf:
        layers, heads, size = cache_sizes(m)
        return {"kv": rng.normal(self.n - self.still, 2 * layers * heads * size)}

    def frozen(self, rng: Rng, m: Place) -> Leaf:
        layers, heads, size = cache_sizes(m)
        return {"first": rng.normal(self.still, 2 * layers * heads * size), **sizes(rng, m)}

    def prefix(self, p: Leaf, m: Place) -> tuple[Tensor, Tensor]:
        return apart(torch.cat([p["first"].to(p["kv"].dtype), p["kv"]]), p)


def cartridge_of(cache: Any) -> Leaf:
    """Return the prepared leaf of a prefix from a cache: {"keys", "values"}, each [layers, heads, n, head size].

    Args:
        cache: transformers' cache of a batch of one, as a model returns it for a text with `use_cache=True`. The first
            n positions of several caches one after the other compose cartridges: concatenate them along dimension 2.

    Raises:
        ValueError: the cache has several rows.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        from peftfn.methods.inputs.cartridge import cartridge_of
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)).eval()
        text = torch.tensor([[1, 2, 3, 4]])
        net = pf.adapt(model, {".*": pf.Cartridge(n=4)})
        a = {"model": cartridge_of(model(text, use_cache=True).past_key_values)}
        logits = net.apply(a, torch.tensor([[5, 6]])).logits  # as if the text stood in front
    """
    layers = getattr(cache, "self_attention_cache", cache).layers
    keys, values = (torch.stack([getattr(layer, k) for layer in layers]) for k in ("keys", "values"))
    if keys.shape[1] != 1:
        raise ValueError(f"cartridge_of: the cache has {keys.shape[1]} rows; a cartridge is made of one text")
    return {"keys": keys[:, 0].detach().clone(), "values": values[:, 0].detach().clone()}
