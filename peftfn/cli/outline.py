"""A base in outline, for commands on LoRAs that are given no model: its layers are what the adapters' files say."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftfn.cli.base import Base
from peftfn.cli.convert import of_values
from peftfn.core.plan import Entry, WeightEntry
from peftfn.formats import peft, swift
from peftfn.formats import peft_config as configs
from peftfn.formats.peft_keys import PREFIX
from peftfn.formats.tensor_files import opened


def by_factors(entry: Entry) -> bool:
    """Whether the change of the site needs no value of the base."""
    return isinstance(entry, WeightEntry) and not of_values(entry) and not entry.prepares and entry.low


def outline(paths: Sequence[Path]) -> Base:
    """A model of the layers that the files of LoRAs speak of: their names, shapes and kinds are all in the tensors."""
    root = nn.Module()
    for path in paths:
        for name, layer in _layers(path).items():
            parent = root
            *above, last = name.split(".")
            for part in above:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            if (old := parent._modules.get(last)) is not None and old.weight.shape != layer.weight.shape:
                have, want = list(old.weight.shape), list(layer.weight.shape)  # type: ignore[arg-type]
                raise ValueError(f"{path}: {name} is {want}, and {have} in {paths[0]}: they are of different models")
            parent.add_module(last, layer)
    return Base(root.eval(), hollow=True)


def _layers(path: Path) -> dict[str, Any]:
    """Module's name → a layer whose weight takes no memory. ValueError where the tensors do not say all."""
    if not peft.is_mine(path) or swift.is_mine(path):
        raise ValueError(f"{path}: only the base model says which layers its names mean: give --model")
    config = configs.read(path / peft.CONFIG)
    odd = next((k for k in ("fan_in_fan_out", "target_parameters", "modules_to_save") if config.get(k)), None)
    if config["peft_type"] != "LORA" or odd:
        raise ValueError(f"{path}: {odd or config['peft_type']} says too little without the base model: give --model")
    shapes: dict[str, dict[str, torch.Size]] = {}
    with opened(path / peft.TENSORS) as file:
        for key, t in file.meta.items():
            name, found, tensor = key.removeprefix(PREFIX).rpartition(".lora_")
            if not found or t.dim() > 2 or not key.startswith(PREFIX):
                raise ValueError(f"{path}: only the base model says what {key} is for: give --model")
            shapes.setdefault(name, {})[tensor.removesuffix(".weight")] = t.shape
    out: dict[str, Any] = {}
    for name, s in shapes.items():
        match s:
            case {"A": a, "B": b}:
                out[name] = nn.Linear(a[1], b[0], bias="B.bias" in s, device="meta")
            case {"embedding_A": a, "embedding_B": b}:
                out[name] = nn.Embedding(a[1], b[0], device="meta")
            case _:
                raise ValueError(f"{path}: {name} has {sorted(s)}; a LoRA has A and B")
        for attr, p in list(out[name]._parameters.items()):
            if p is not None:
                one = torch.ones(()).expand(p.shape)
                out[name]._parameters[attr] = nn.Parameter(one, requires_grad=False)
    return out
