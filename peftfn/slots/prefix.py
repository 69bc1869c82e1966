"""What a prefix does around a backbone's forward: its keys and values stand in the cache in front of every layer's."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peftfn.model.place import Place
from peftfn.slots.gates import Gates
from peftfn.slots.virtual import counted, gathered, named, past
from peftfn.tensors.cache import PREFIX, Prefixed, cache_in, cache_name


def run(
    parts: Sequence[Any], gates: Gates | None, m: Place, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """The backbone's output, each row's keys and values being in its cache before those of its own tokens.

    A cache that is not empty holds them already.
    """
    given = named(m, args, kwargs)
    if m.module.training and any(getattr(q, "gradient_checkpointing", False) for q in m.module.modules()):
        raise ValueError(
            f"{m.label}: gradient checkpointing drops the cache, and a prefix is one: turn it off "
            "(gradient_checkpointing_disable), or use net.checkpointed"
        )
    x = given.get("inputs_embeds", given.get("input_ids"))
    if x is None:
        raise ValueError(f"{m.label}: a prefix needs input_ids or inputs_embeds")
    (rows, tokens), cache = x.shape[:2], cache_in(given)
    before, ours = past(m, cache), cache is None
    values, virtual = gathered(parts, gates, rows, ["keys", "values"], m, True)
    if not before:
        cache = _new(m) if cache is None else cache
        own = getattr(cache, "self_attention_cache", cache)
        keys, states = (values[k].to(m.dtype).expand(rows, *values[k].shape[1:]) for k in ("keys", "values"))
        for layer in range(keys.shape[1]):
            own.update(keys[:, layer], states[:, layer], layer)
        given[cache_name(m.arguments)] = cache
    setattr(cache, PREFIX, Prefixed(virtual.size, virtual.shift))
    counted(given, m, virtual, rows, tokens, before or virtual.size, False)
    out = forward(**given)
    if ours and given.get("use_cache") is False and isinstance(out, Mapping) and cache_in(out) is not None:
        # generate without a cache would go on with this one and the whole input
        return type(out)(**{k: v for k, v in out.items() if k != cache_name(out.keys())})
    return out


def _new(m: Place) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    cache = DynamicCache(config=m.config)
    if getattr(m.config, "is_encoder_decoder", False):
        return EncoderDecoderCache(cache, DynamicCache(config=m.config))
    return cache
