"""The older names of a diffusion U-Net's modules, which kohya's SDXL files and ComfyUI use; diffusers' are newer.

`down_blocks.1.attentions.0.proj_in` of diffusers is `input_blocks.4.1.proj_in` there: blocks are counted through, with
a block for each of the resnets and each sampler.
"""

import re
from collections.abc import Collection

_WHOLE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def older(module: str, modules: Collection[str]) -> str | None:
    """The older name of a module of diffusers' U-Net, whose modules are given; None for any other.

    A block of the encoder has L resnets and a sampler (L + 1 blocks there), one of the decoder L + 1 resnets, the last
    of them together with the sampler.
    """
    layers = 0
    while f"down_blocks.0.resnets.{layers}.conv1" in modules:
        layers += 1
    if not layers:
        return None
    if module in _WHOLE:
        return _WHOLE[module]
    if m := _MIDDLE.fullmatch(module):
        kind, i, rest = m[1], int(m[2]), m[3]
        return f"middle_block.{2 * i + (kind == 'attentions')}.{_RESNET.get(rest, rest) if kind == 'resnets' else rest}"
    if not (m := _BLOCK.fullmatch(module)):
        return None
    side, block, kind, i, rest = m[1], int(m[2]), m[3], int(m[4]), m[5]
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{1 + first + layers}.0.op"
    if kind == "upsamplers":
        attends = any(name.startswith(f"up_blocks.{block}.attentions.") for name in modules)
        return f"output_blocks.{first + layers}.{1 + attends}.{rest}"
    place = f"input_blocks.{1 + first + i}" if side == "down" else f"output_blocks.{first + i}"
    return f"{place}.0.{_RESNET.get(rest, rest)}" if kind == "resnets" else f"{place}.1.{rest}"
