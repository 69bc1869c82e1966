"""LLaMA-Pro: a new block behind a block, which begins as a copy of it that changes nothing."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from peftfn.core.method import Cases, Leaf
from peftfn.core.modules import Companion, ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place
from peftfn.tensors.cache import cache_in, cache_name, grows, own_layer, prefix_in
from peftfn.tensors.loaded import source_of
from peftfn.tensors.states import states_in, states_out

DOT = "__"
"""Stands for the dot of a parameter's name in a leaf."""


@dataclass(frozen=True)
class LlamaPro(ModuleMethod):
    """block(block(x; W); P): a new block behind a block W [all its parameters], trained in full; it begins as a copy
    whose last projections are 0, so that its residual connections are all that is left of it.

    Wu et al., "LLaMA Pro: Progressive LLaMA with Block Expansion", 2024, arXiv:2401.02415.

    Trainable parameters per site: all of the block. Use it to add knowledge to a model without forgetting, at some of
    its blocks: the last of each group of layers.

    In a call with a cache, the new block's keys and values are in a layer of their own at the end of the cache, which
    must be one that grows (transformers' `DynamicCache`). In a mixed batch each row's are those of its adapter. A
    prefix (`PrefixTuning`) is in the model's own layers alone.

    Args:
        zeroed: names of the parts whose weights and biases start at 0: the last of each residual branch. GPT-2's are
            "c_proj" alone.

    Example:
        import transformers as tf
        size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        model = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=9, **size)).eval()
        net = pf.adapt(model, {"layers.1": pf.LlamaPro()})
        y = net.apply(net.init(seed=0), torch.tensor([[1, 2, 3]])).logits
    """

    cases: ClassVar[Cases] = ({},)

    zeroed: tuple[str, ...] = ("o_proj", "down_proj")

    def init(self, rng: Rng, m: Place) -> Leaf:
        own = dict(m.module.named_parameters())
        lacking = [part for part in self.zeroed if not any(part in name.split(".") for name in own)]
        if lacking or not self.zeroed:
            parts = sorted({name.split(".")[-2] for name in own if "." in name})
            raise ValueError(
                f"a {type(m.module).__name__} has no {', '.join(lacking) or 'parts to begin at 0'}: name a block of "
                f"the model, and in zeroed the last part of each of its residual branches; its parts are "
                f"{', '.join(parts) or 'none'}"
            )
        odd = next((name for name, t in own.items() if not t.is_floating_point()), None)
        if odd is not None:
            raise ValueError(f"its {odd} is {own[odd].dtype}, and a new block is a copy in floating point")

        def fresh(name: str, t: Tensor) -> Tensor:
            if rng.meta or set(self.zeroed) & set(name.split(".")):
                return rng.zeros(*t.shape)
            return t.detach().to(rng.device, rng.dtype, copy=True)

        return {name.replace(".", DOT): fresh(name, t) for name, t in own.items()}

    def companions(self, m: Place, model: Any) -> tuple[Companion, ...]:
        if any(source_of(part) is not None for part in m.module.modules()):
            raise ValueError(
                "a hook of accelerate or diffusers puts this block's weights in place for each call, and a new block "
                "begins as a copy of them: load the model without offload and without layerwise casting"
            )
        return super().companions(m, model)

    def leave(self, p: Leaf, m: Place, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        y, put = states_out(out)
        args, kwargs = states_in(args, kwargs)[1](y)
        params = {k.replace(DOT, "."): t.to(y.dtype) for k, t in p.items()}
        name = cache_name(m.arguments)
        if name in m.arguments:
            kwargs = {**dict(zip(m.arguments, args, strict=False)), **kwargs}
            args = ()
        cache = cache_in(kwargs)
        if cache is None:
            return put(states_out(m.again(params, args, kwargs))[0])
        layer, close = _own_layer(m, cache, y)
        kwargs |= {
            name: _Layer(cache, layer),
            "attention_mask": _own_mask(m, kwargs.get("attention_mask"), cache, layer, y),
        }
        new = m.again(params, args, kwargs)
        close()
        return put(states_out(new)[0])


class _Layer:
    """What a block takes for the cache: one layer of it, whatever index the block has."""

    def __init__(self, cache: Any, layer: Any):
        self._cache, self._layer = cache, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return self._layer.update(keys, values, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(self._layer.get_seq_length())


def _own_layer(m: Place, cache: Any, y: Tensor) -> tuple[Any, Callable[[], None]]:
    """(the new block's own layer of the cache, what puts it back)."""
    index = {part.layer_idx for part in m.module.modules() if hasattr(part, "layer_idx")}
    layers = getattr(cache, "layers", None)
    if layers is None or len(index) != 1 or not grows(cache):
        raise ValueError(
            f"{m.label}: a new block needs a layer of its own in the cache, and a {type(cache).__name__} has no room "
            "for one: give a DynamicCache, or use_cache=False"
        )
    block = layers[index.pop()]  # its tokens are in it already
    return own_layer(cache, m.label, len(y), block.get_seq_length() - y.shape[-2], block)


def _own_mask(m: Place, mask: Any, cache: Any, layer: Any, y: Tensor) -> Any:
    """The block's mask without the positions of a prefix, which the model's own layers alone have."""
    if isinstance(mask, Tensor):
        return mask[..., -layer.get_mask_sizes(y.shape[-2])[0] :]
    if mask is not None and prefix_in(cache).size:
        raise ValueError(
            f"{m.label}: a new block has no prefix, and nothing can be cut off a {type(mask).__name__}: set "
            "attn_implementation to sdpa or eager, or leave the prefix out"
        )
    return mask
