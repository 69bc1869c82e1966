"""The names of Flux's first implementation, which kohya, ComfyUI and others write; diffusers' model has others.

There the projections of an attention are one layer, `double_blocks.0.img_attn.qkv`, where diffusers has `to_q`, `to_k`
and `to_v`: its rows are theirs, one after the other.
"""

import re

_DOUBLE = {
    "attn.to_q": ("img_attn.qkv", 0),
    "attn.to_k": ("img_attn.qkv", 1),
    "attn.to_v": ("img_attn.qkv", 2),
    "attn.add_q_proj": ("txt_attn.qkv", 0),
    "attn.add_k_proj": ("txt_attn.qkv", 1),
    "attn.add_v_proj": ("txt_attn.qkv", 2),
    "attn.to_out.0": ("img_attn.proj", None),
    "attn.to_add_out": ("txt_attn.proj", None),
    "ff.net.0.proj": ("img_mlp.0", None),
    "ff.net.2": ("img_mlp.2", None),
    "ff_context.net.0.proj": ("txt_mlp.0", None),
    "ff_context.net.2": ("txt_mlp.2", None),
    "norm1.linear": ("img_mod.lin", None),
    "norm1_context.linear": ("txt_mod.lin", None),
}
_SINGLE = {
    "attn.to_q": ("linear1", 0),
    "attn.to_k": ("linear1", 1),
    "attn.to_v": ("linear1", 2),
    "proj_mlp": ("linear1", 3),
    "proj_out": ("linear2", None),
    "norm.linear": ("modulation.lin", None),
}
_WHOLE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{new}_embedder.linear_{i}": f"{old}_in.{layer}_layer"
        for new, old in {"timestep": "time", "text": "vector", "guidance": "guidance"}.items()
        for i, layer in ((1, "in"), (2, "out"))
    },
}
"""`norm_out.linear` is left out: its two halves stand the other way round there."""
_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")


def first_name(module: str) -> tuple[str, int | None] | None:
    """(the first implementation's name of a module of diffusers' Flux, which part of that layer it is: None for the
    whole); None for any other module."""
    if module in _WHOLE:
        return _WHOLE[module], None
    if (m := _BLOCK.fullmatch(module)) is None:
        return None
    found = (_SINGLE if m[1] else _DOUBLE).get(m[3])
    return found and (f"{'single' if m[1] else 'double'}_blocks.{m[2]}.{found[0]}", found[1])
