"""A model of a backbone's own class with other sizes, made of its configuration: what it is, and what it begins as."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.rng import Rng
from peftfn.model.place import Place

SIZES = {
    "depth": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "intermediate": ("intermediate_size", "ffn_dim", "n_inner"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
}
"""Field → its names in configurations."""


def smaller(m: Place, sizes: Mapping[str, int], *, embeds: bool) -> nn.Module:
    """A model of the backbone's own class without values, with other sizes, as `SIZES` names them. embeds: whether it
    has an embedding of its own, too."""
    config: Any = copy.deepcopy(m.module.config)
    for field, value in sizes.items():
        setattr(config, named(config, field, SIZES[field]), value)
    depth, kinds = of_config(config, "depth"), getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = [*kinds, *[kinds[-1]] * depth][:depth]
    if (window := getattr(config, "max_window_layers", None)) is not None:
        config.max_window_layers = min(window, depth)
    with torch.device("meta"):
        net: Any = m.made_of(config)
    if not embeds:
        embedding = net.get_input_embeddings()
        path = next(n for n, part in net.named_modules() if part is embedding)
        net.get_submodule(path.rpartition(".")[0])._modules[path.rpartition(".")[2]] = None
    return net.eval()  # type: ignore[no-any-return]


def of_config(config: Any, field: str) -> Any:
    """A size of a configuration, by our name for it."""
    return getattr(config, named(config, field, SIZES[field]))


def named(config: Any, field: str, names: tuple[str, ...]) -> str:
    name = next((n for n in names if hasattr(config, n)), None)
    if name is None:
        raise ValueError(f"a mirror has another {field}, and a {type(config).__name__} has none of {', '.join(names)}")
    return name


def fresh(net: Any, rng: Rng) -> dict[str, Tensor]:
    """The parameters of a model of transformers', as its configuration says: norms as its class begins them, other
    vectors zero, and the rest normal, but for a padding token's row of a table: it is zero, and gets no gradient."""
    std = getattr(net.config, "initializer_range", 0.02)
    out: dict[str, Tensor] = {}
    for path, part in net.named_modules():
        own = {k: t for k, t in part._parameters.items() if t is not None}
        begun = copy.deepcopy(part).to_empty(device="cpu") if own and all(t.dim() == 1 for t in own.values()) else None
        if begun is not None and not rng.meta:
            net._init_weights(begun)
        for k, t in own.items():
            name = f"{path}.{k}" if path else k
            if t.dim() > 1:
                out[name] = rng.normal(*t.shape, std=std)
                if isinstance(part, nn.Embedding) and part.padding_idx is not None:
                    out[name][part.padding_idx] = 0
            elif begun is None or rng.meta:
                out[name] = rng.zeros(*t.shape)
            else:
                out[name] = begun._parameters[k].detach().to(rng.device, rng.dtype)  # type: ignore[union-attr]
    return out
