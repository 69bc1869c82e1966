"""The sizes of a backbone's cache of keys and values."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peftfn.model.place import Place
from peftfn.model.structure import lasting_copy

_KNOWN: "WeakKeyDictionary[nn.Module, tuple[int, int, int]]" = WeakKeyDictionary()


def cache_sizes(m: Place) -> tuple[int, int, int]:
    """(layers, heads of keys, size of a head): of the cache that one token leaves on a private copy of the backbone,
    with fake tensors where they do. Configurations name these sizes in too many ways.

    ValueError for a backbone that leaves no cache of keys and values.
    """
    if m.module not in _KNOWN:
        _KNOWN[m.module] = _sizes(m)
    return _KNOWN[m.module]


def _sizes(m: Place) -> tuple[int, int, int]:
    own: Any = lasting_copy(m.module).eval()
    more: dict[str, Any] = {"use_cache": True} if "use_cache" in m.arguments else {}
    if getattr(m.config, "is_encoder_decoder", False):
        more["encoder_hidden_states"] = torch.zeros(1, 1, m.config.hidden_size, dtype=m.dtype, device=m.device)
    ids = torch.zeros(1, 1, dtype=torch.long, device=m.device)
    with torch.no_grad():
        try:
            with FakeTensorMode(allow_non_fake_inputs=True):
                out = own(input_ids=ids, **more)
        except RuntimeError:  # a kernel without a fake form
            out = own(input_ids=ids, **more)
    cache = getattr(out, "past_key_values", None)
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    keys = getattr(layers[0], "keys", None) if layers else None
    if layers is None or keys is None or keys.dim() != 4:
        raise ValueError(
            f"a {type(m.module).__name__} leaves no cache of keys and values, where a prefix goes: use PromptTuning"
        )
    return len(layers), keys.shape[1], keys.shape[3]
