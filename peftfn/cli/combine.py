"""`peftfn combine`: several adapters' files merged into one, without a model where the adapters are LoRAs."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftfn.cli.base import Base, load_base
from peftfn.cli.convert import bound, free, named, of_values
from peftfn.core.plan import Entry, WeightEntry
from peftfn.formats import hub, peft, save, swift
from peftfn.formats import peft_config as configs
from peftfn.formats.files import Loaded, opened, read_json
from peftfn.formats.peft_keys import PREFIX
from peftfn.tools import merging

_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""What says in PEFT's configuration which layers are adapted."""


def combine(
    paths: Sequence[str | Path],
    out: Path,
    method: str,
    weights: Sequence[float] | None = None,
    model: Path | None = None,
    to: str = "peft",
    **options: Any,
) -> str:
    """Merge the adapters at `paths` by a function of `pf.merging`, and write the result; returns a line about it.

    Args:
        method: the function's name.
        weights: a number for each adapter; None for 1 each.
        model: the base: a folder, or a config.json where no change depends on the base's values. Without it, the local
            folder that the first adapter's configuration names. LoRAs in PEFT's format need none.
        to: "peft" or "native".
        options: of the function.

    Raises:
        FileExistsError: `out` is there, and no empty folder.
        ValueError: an option that the function does not have; adapters of different bases; an adapter that needs a
            model, or the model's values; or what the function itself raises. Nothing has been written then.
    """
    free(out)
    run = getattr(merging, method)
    known = inspect.signature(run).parameters
    for k in options:
        if k not in known:
            raise ValueError(f"--{k} is not an option of --method {method}")
    found = [hub.find(p) for p in paths]
    where = model or named(found[0])
    base = _outline(found) if where is None else load_base(where)
    loaded = [bound(path, base, any_base=model is not None) for path in found]
    if model is None:
        _one_base(found, loaded)
    if base.hollow:
        for path, (net, _) in zip(found, loaded, strict=True):
            for name, entry in net.plan.items():
                if not _by_factors(entry):
                    raise ValueError(
                        f"{path}: {name}: the change that {entry.method} makes depends on the base's values; give a "
                        "--model folder with *.safetensors"
                    )
    net, adapter = run(loaded, weights, **options)
    extra: dict[str, Any] = (
        {"extra": {k: v for k, v in loaded[0].extra.items() if k != "auto_mapping"}} if to == "peft" else {}
    )
    save(out, net, adapter, format=to, **extra)
    if where is None:
        _name_layers(out, found, [n.rpartition(".")[0] for n in net.plan])
    methods = ", ".join(sorted({str(e.method) for e in net.plan.values()}))
    return f"wrote {out}: {method} of {len(found)} adapters, {methods} at {len(net.plan)} sites"


def _by_factors(entry: Entry) -> bool:
    """Whether the change of the site needs no value of the base."""
    return isinstance(entry, WeightEntry) and not of_values(entry) and not entry.prepares and entry.low


def _one_base(paths: Sequence[Path], loaded: Sequence[Loaded]) -> None:
    """ValueError where the configurations name different bases."""
    names = [(path, a.extra.get("base_model_name_or_path")) for path, a in zip(paths, loaded, strict=True)]
    names = [(path, name) for path, name in names if name]
    for path, name in names[1:]:
        if name != names[0][1]:
            raise ValueError(
                f"{path} is for {name!r} and {names[0][0]} for {names[0][1]!r}: changes of different bases do not add "
                "up. If the two are one base, give it as --model"
            )


# Without a model.


def _outline(paths: Sequence[Path]) -> Base:
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


def _name_layers(out: Path, paths: Sequence[Path], modules: Sequence[str]) -> None:
    """Let the configuration name the layers as all of the adapters' do, or each by its whole name: what was written
    is for a model that has no other layers."""
    where = out / peft.CONFIG
    if not where.is_file():
        return
    given = [{k: read_json(p / peft.CONFIG).get(k) for k in _TARGETS} for p in paths]
    config = read_json(where)
    same = all(_sorted(g) == _sorted(given[0]) for g in given) and given[0]["target_modules"]
    config |= {k: v for k, v in given[0].items() if v is not None} if same else {"target_modules": sorted(set(modules))}
    where.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _sorted(given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: sorted(v) if isinstance(v, list) else v for k, v in given.items()}
