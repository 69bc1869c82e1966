"""Small configurations of any transformers architecture: a bound for every field that makes a model large."""

import re
from typing import Any

from transformers import PreTrainedConfig

FREE = None  # as the class has it
BOUNDS: list[tuple[int | None, str]] = [
    # bound, the field's name (searched; the first that is found counts)
    (64, r"max_position|max_(source|target)_pos|n_positions|n_ctx|max_seq(uence)?_len|seq_length|context_length$"),
    (128, r"vocab_size|n_vocab|num_embeddings$"),
    (1, r"(num_hidden_groups|inner_group_num|n_group|top_?k_group|num_expert_group)$"),
    (2, r"(experts_per_tok(en)?|num_selected_experts|(moe_)?top_?k|moe_k)$"),
    (1, r"n(um)?_shared_experts$|first_(k_)?dense|first_.*dense|moe_layer_start"),
    (4, r"(n_routed|num|num_local|moe_num|n)_experts$"),
    (2, r"key_value_heads|kv_heads|n_head_kv|num_kv|multi_query_group_num|linear_num_key_heads$"),
    (4, r"linear_num_value_heads$"),
    (8, r"(n_mamba|mamba_n|mamba_num)_heads$|mamba_(d_head|head_?dim)$|linear_(key|value)_head_dim$"),
    (FREE, r"(mamba_d_state|state_size|dt_rank|time_step_rank|n_?groups)$"),
    (16, r"(q|kv|o)_lora_rank$"),
    (8, r"(qk_rope|qk_nope|qk|v)_head_dim$"),
    (4, r"(_heads|^num_heads|n_heads?|attention_heads)$"),
    (8, r"(head_dim|head_size|d_kv|d_head|head_width)$"),
    (2, r"(_layers|n_layer|depth|num_blocks)$"),
    (48, r"intermediate|ffn|d_ff|n_inner|inner_dim|feedforward_dim|mlp_(dim|hidden)|ff_dim"),
    (32, r"(image|img|input)_size$"),
    (8, r"patch_size$"),
    (16, r"(num_mel(_bins)?|n_mels|mel_bins|feature_size)$"),
    (7, r"(num_(query_tokens|latents|object_queries|detection_tokens|queries)|query_length)$"),
    (FREE, r"(window(_size)?|local_attention|chunk_size)$"),
    (
        32,
        r"((hidden|embedding|embed|output_hidden|cross_attention_hidden)_size|d_model|n_embd|dim|embed_dims|width"
        r"|(hidden|channels)_(dim|channels|features)|size_per\w*|lru_width|hidden)$",
    ),
]
LISTS: list[tuple[int, str]] = [
    (1, r"(depths|layers_per\w*|blocks)$"),
    (32, r"hidden_sizes|embed_dims|channels|_dims|conv_dim|encoder_hidden|decoder_hidden|(image|img|input)_size$"),
    (32, r"spatial_shapes$"),
    (4, r"heads$"),
]
RANDOM = re.compile(r"dropout|drop_(path|prob|rate)|_drop$|pdrop|layerdrop|jitter|mask_(time|feature)_prob")
TOKEN = re.compile(r"token_(id|index)$|_id$|_idx$")
KEPT = {"transformers_version", "id2label", "label2id", "layer_types", "dtype"}
FIRST_TOKEN = 90
"""Special tokens with large ids are given ids from here on: below any vocabulary, above what inputs are drawn from."""


def small(cls: type[PreTrainedConfig], given: dict[str, Any]) -> PreTrainedConfig:
    """A small configuration. given: field, dotted for one of a part ("text_config.head_dim") → its value."""
    return _small(cls, given, {})


def _small(cls: type[PreTrainedConfig], given: dict[str, Any], tokens: dict[str, int]) -> PreTrainedConfig:
    usual = cls()
    fields = {}
    for name in sorted(vars(usual)):
        if name.startswith("_") or name in KEPT:
            continue
        try:
            value = getattr(usual, name, None)
        except Exception:  # one that each layer has its own value of
            continue
        if isinstance(value, PreTrainedConfig):
            part = {k.removeprefix(f"{name}."): v for k, v in given.items() if k.startswith(f"{name}.")}
            fields[name] = _small(type(value), part, tokens)
        elif (less := _less(name, value, tokens)) != value:
            fields[name] = less
    fields |= {k: v for k, v in given.items() if "." not in k}
    return _accepted(cls, fields, given)


def _less(name: str, value: Any, tokens: dict[str, int]) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        if TOKEN.search(name) and value >= 100:
            return tokens.setdefault(name, FIRST_TOKEN + len(tokens) % 37)
        bound = next((b for b, pattern in BOUNDS if re.search(pattern, name)), FREE)
        return value if bound is None or value <= 0 else min(value, bound)
    if isinstance(value, float):
        return 0.0 if RANDOM.search(name) else value
    if isinstance(value, list | tuple) and value and all(type(v) is int for v in value):
        bound = next((b for b, pattern in LISTS if re.search(pattern, name)), None)
        heads = bool(re.search(r"heads$", name))  # three do not divide what widths are cut to
        return value if bound is None else type(value)(2 if heads and v == 3 else min(v, bound) for v in value)
    return value


def _accepted(cls: type[PreTrainedConfig], fields: dict[str, Any], given: dict[str, Any]) -> PreTrainedConfig:
    """The configuration, without those of our own bounds that its validator refuses."""
    refused: Exception | None = None
    for left_out in (r"(?!)", r"head_dim$", r"layers$", r"heads$", r""):
        try:
            return cls(**{k: v for k, v in fields.items() if k in given or not re.search(left_out, k)})
        except Exception as e:
            refused = refused or e
    assert refused is not None
    raise refused
