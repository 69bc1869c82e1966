"""LLaMA-Pro: a new block behind a layer, a copy of it that starts as the identity and is trained in full."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place
from peftfn.tensors.states import states_in, states_out

LAST = ("o_proj", "down_proj")
"""Layers of a block whose output its residual connections add."""
DYNAMIC = ("DynamicLayer", "DynamicSlidingWindowLayer")
"""Layers of a cache that can have others behind them."""


@dataclass(frozen=True)
class NewBlock(ModuleMethod):
    """block(p, y), y the output of a layer and block the layer's own forward with parameters p of its own.

    p starts as a copy of the layer's, but for its last projections, which are zero, so that the residual connections
    alone are left. The layers that get a new block are those that the rule names. With a cache, as in `generate`, the
    block of layer i of n keeps its keys and values in layer n + i. That is for one adapter: several of one batch would
    write over each other, so generate with use_cache=False there; a step with a past says so.

    Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", 2024, arXiv:2401.02415.

    Trainable parameters per site: those of the layer. Use it to teach a model much that is new and keep what it knows.

    Args:
        zeroed: names of the parameters, or ends of names, that start at zero; (): o_proj's and down_proj's.
        adds: whether y is added to what the block returns, for a module without residual connections of its own.

    Example:
        import transformers as tf
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {r"layers\\.1": pf.NewBlock()})
        y = net.apply(net.init(seed=0), torch.tensor([[1, 2, 3]])).logits
    """

    cases: ClassVar[Cases] = ({"zeroed": ("o_proj.weight",), "adds": True},)

    zeroed: tuple[str, ...] = ()
    adds: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "zeroed", tuple(self.zeroed))  # a list, as files have it

    def init(self, rng: Rng, m: Place) -> Leaf:
        ends = self.zeroed or tuple(f"{layer}.{k}" for layer in LAST for k in ("weight", "bias"))
        own = {k: t for k, t in m.module.named_parameters() if t.is_floating_point()}
        if not any(k.endswith(ends) for k in own):
            raise ValueError(
                f"none of the parameters of this {type(m.module).__name__} ends in {', '.join(ends)}: name those whose "
                "product its residual connections add: zeroed=('c_proj.weight', 'c_proj.bias')"
            )
        return {
            k.replace(".", "__"): rng.zeros(*t.shape)
            if k.endswith(ends)
            else rng.empty(*t.shape)
            if rng.meta
            else t.detach().to(rng.device, rng.dtype, copy=True)
            for k, t in own.items()
        }

    def leave(self, p: Leaf, m: Place, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        y, put = states_out(out)
        _, put_in = states_in(args, kwargs)
        given, named = put_in(y)
        cache = named.get("past_key_values")
        if cache is not None:
            named = {**named, "past_key_values": _behind(cache, m, y)}
        params = {k.replace("__", "."): t.to(y.dtype) for k, t in p.items()}
        new = states_out(m.again(params, given, named))[0]
        return put(y + new if self.adds else new)


def _behind(cache: Any, m: Place, y: Tensor) -> Any:
    """The cache for the block, behind those of the model's layers; None where nothing is in the past and it would be
    shared. The module's own layer has the tokens of y already."""
    own = next(part.layer_idx for part in m.module.modules() if hasattr(part, "layer_idx"))
    layer, at = cache.layers[own], m.config.num_hidden_layers + own
    if type(layer).__name__ not in DYNAMIC:
        raise ValueError(
            f"{m.label}: a new block keeps keys and values of its own, and a layer of this cache is a "
            f"{type(layer).__name__}: give a DynamicCache, or use_cache=False"
        )
    window = {"sliding_window": layer.sliding_window} if hasattr(layer, "sliding_window") else {}
    while len(cache.layers) <= at:
        cache.layers.append(type(layer)(**window))
    past, kept = layer.get_seq_length() - y.shape[-2], cache.layers[at].get_seq_length()
    if layer.keys.shape[0] == y.shape[0] and kept == past:
        return Behind(cache, m.config.num_hidden_layers)
    if past:
        raise ValueError(
            f"{m.label}: a new block goes on with a cache that has {kept} of {past} tokens of its own, or other rows: "
            "several adapters of one batch share none. Give use_cache=False, or call net.apply for one at a time"
        )
    return None


class Behind:
    """A cache whose layer i is layer n + i of another."""

    def __init__(self, cache: Any, n: int):
        self._cache, self._n = cache, n

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._cache.update(keys, values, self._n + layer_idx, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)
