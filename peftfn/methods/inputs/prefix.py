"""Prefix tuning: trained keys and values in front of every layer's."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt
from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import Prefix
from peftfn.core.rng import Rng
from peftfn.methods.parts.cache import cache_sizes
from peftfn.model.place import Place


@dataclass(frozen=True)
class PrefixTuning(Prefix):
    """cat[K_l, keys] and cat[V_l, values] in every layer l, K_l and V_l [heads, n, head size] trained; with `hidden`,
    an MLP tanh makes them of n trained inputs, and `net.prepare` computes them once.

    Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, arXiv:2101.00190.

    Trainable parameters per site: n·2·layers·heads·head size. Use it for generation; it takes places in the cache.

    Args:
        n: positions in front.
        hidden: width of the MLP; None: the keys and values are trained themselves.
        shifts: whether the model's own tokens have their positions behind the prefix (as in PEFT), or from 0 on (as in
            AdapterHub's package).

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {".*": pf.PrefixTuning(n=3)})
        logits = net.apply(net.init(seed=0), torch.tensor([[1, 2, 3]])).logits
    """

    cases: ClassVar[Cases] = ({"n": 3}, {"n": 2, "hidden": 4}, {"n": 2, "shifts": False})

    n: PositiveInt = 8
    hidden: PositiveInt | None = None
    shifts: bool = True

    identity = False  # type: ignore[assignment]

    def init(self, rng: Rng, m: Place) -> Leaf:
        layers, heads, size = cache_sizes(m)
        d, width, h = 2 * layers * heads * size, heads * size, self.hidden
        if h is None:
            return {"kv": rng.normal(self.n, d)}
        return {
            "inputs": rng.normal(self.n, width),
            "w0": rng.kaiming(h, width),
            "b0": rng.uniform(h, bound=width**-0.5),
            "w1": rng.kaiming(d, h),
            "b1": rng.uniform(d, bound=h**-0.5),
        }

    def frozen(self, rng: Rng, m: Place) -> Leaf:
        return sizes(rng, m)

    def prefix(self, p: Leaf, m: Place) -> tuple[Tensor, Tensor]:
        kv = p["kv"] if "kv" in p else F.linear(F.linear(p["inputs"], p["w0"], p["b0"]).tanh(), p["w1"], p["b1"])
        return apart(kv, p)


def sizes(rng: Rng, m: Place) -> Leaf:
    """An empty constant whose shape says the sizes of the cache: layers, heads and head size."""
    return {"sizes": rng.empty(*cache_sizes(m), 0)}


def apart(kv: Tensor, p: Leaf) -> tuple[Tensor, Tensor]:
    """[n, layers·2·heads·head size], as PEFT stores a prefix ↦ (keys, values), each [layers, heads, n, head size]."""
    layers, heads, size, _ = p["sizes"].shape
    keys, values = kv.unflatten(-1, (layers, 2, heads, size)).permute(2, 1, 3, 0, 4)
    return keys, values


def together(keys: Tensor, values: Tensor) -> Tensor:
    """What `apart` takes apart."""
    return torch.stack([keys, values]).permute(3, 1, 0, 2, 4).flatten(1)
