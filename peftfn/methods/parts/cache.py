"""The sizes of a backbone's cache of keys and values."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftfn.model.place import Place, is_encoder_of_two
from peftfn.model.structure import lasting_copy
from peftfn.tensors.cache import cache_in, cache_name
from peftfn.tensors.sharded import is_sharded

_KNOWN: "WeakKeyDictionary[nn.Module, tuple[int, int, int]]" = WeakKeyDictionary()


def cache_sizes(m: Place) -> tuple[int, int, int]:
    """(layers, heads of keys, size of a head) of the cache that one fake token leaves on a private copy of the
    backbone, since configurations name these sizes in many ways; what they say where a kernel has no fake form.

    ValueError for a backbone that leaves no cache of keys and values.
    """
    if m.module not in _KNOWN:
        _KNOWN[m.module] = _sizes(m)
    return _KNOWN[m.module]


_NONE = "a {} leaves no cache of keys and values, where a prefix goes: use PromptTuning"


def refuse_sharded_heads(m: Place, why: str) -> None:
    """ValueError for a module whose attention has a part of its heads on each process."""
    if any(is_sharded(p) for p in m.module.parameters()):
        raise ValueError(
            f"{why}, and under tensor parallelism each process has some of them: choose a method at the hidden states "
            "(PromptTuning, Bottleneck) or for weights, or shard what as_module returns (FSDP2)"
        )


@contextmanager
def _unlogged() -> Iterator[None]:
    """torch logs the traceback of a kernel without a fake form, which is no error here."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _sizes(m: Place) -> tuple[int, int, int]:
    refuse_sharded_heads(m, "a prefix has keys and values of every head")
    if is_encoder_of_two(m.module, m.config):
        raise ValueError(_NONE.format(type(m.module).__name__))
    from transformers import DynamicCache

    own: Any = lasting_copy(m.module, hooked=True).eval()
    one = torch.ones(1, 1, dtype=torch.long, device=m.device)
    more: dict[str, Any] = {"attention_mask": one, **({"use_cache": True} if "use_cache" in m.arguments else {})}
    if getattr(m.config, "is_encoder_decoder", False):
        more["encoder_hidden_states"] = torch.zeros(1, 1, m.config.hidden_size, dtype=m.dtype, device=m.device)
    try:
        with torch.no_grad(), _unlogged(), FakeTensorMode(allow_non_fake_inputs=True):
            name = cache_name(m.arguments)
            given = DynamicCache(config=m.config) if name in m.arguments else None
            if given is not None and not getattr(m.config, "is_encoder_decoder", False):
                more[name] = given  # an encoder fills it, and returns none
            out = own(input_ids=one, **more)
    except (RuntimeError, AttributeError):  # a kernel without a fake form, or a quantised layer without its values
        c = m.config
        heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
        return c.num_hidden_layers, heads, getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    except IndexError:  # a cache without layers: of no keys and values
        raise ValueError(_NONE.format(type(m.module).__name__)) from None
    cache = (cache_in(out) if isinstance(out, Mapping) else None) or given
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    if layers is None or keys is None or keys.dim() != 4:
        raise ValueError(_NONE.format(type(m.module).__name__))
    return len(layers), keys.shape[1], keys.shape[3]
