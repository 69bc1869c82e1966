"""MLX-LM's format: adapters.safetensors and an adapter_config.json with `num_layers` and `lora_parameters`, both ways.

Its LoRA is x ↦ W x + s·(x a) b, with a [in, rank] and b [rank, out] under `….q_proj.lora_a` and `….q_proj.lora_b`, and
one rank and one s for all layers; its DoRA has the magnitude `….m` [out] too. `keys` are names of modules in a layer,
or whole names, and `num_layers` counts layers from the last. `fine_tune_type` "full" has whole weights.

Reading is a renaming in front of PEFT's reader, with both factors transposed.
"""

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfn.core.combine import is_expression
from peftfn.formats import peft
from peftfn.formats import peft_config as configs
from peftfn.formats.files import Loaded, Options, read_json, write
from peftfn.formats.peft_keys import PREFIX
from peftfn.formats.tensor_files import Tensors, opened
from peftfn.methods.weights.dora import DoRA
from peftfn.methods.weights.lora import LoRA
from peftfn.model.model import Model
from peftfn.model.site import Site
from peftfn.net.net import Adapted

CONFIG, TENSORS = peft.CONFIG, "adapters.safetensors"
_ENDS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector"}
_LAYER = re.compile(r"(?P<head>(?:.*\.)?layers)\.(?P<i>\d+)\.(?P<key>.+)")
_PARAMETERS = frozenset({"rank", "scale", "dropout", "keys", "alpha"})
"""What `lora_parameters` has; older releases wrote an `alpha` that nothing reads."""


def is_mine(path: Path) -> bool:
    return (path / TENSORS).is_file() and (path / CONFIG).is_file()


def save(folder: Path, net: Adapted, adapter: Mapping[str, Any]) -> None:
    """Write one folder. ValueError, naming the site, for what MLX-LM has no form for."""
    methods = {n: e.method for n, e in net.plan.items()}
    first = next(iter(methods.values()))
    for name, entry in net.plan.items():
        method, leaf = entry.method, adapter[name]
        if is_expression(leaf) or leaf.keys() != entry.spec.keys():
            raise ValueError(f"{name}: MLX-LM's files have no sums, scalings or prepared adapters; save their origin")
        kinds = ("linear", "embedding") if type(method) is LoRA else ("linear",)
        if type(method) not in (LoRA, DoRA) or entry.site.kind not in kinds or "beta" in entry.spec:
            raise ValueError(f"{name}: MLX-LM's files have no {method} for this layer ({entry.site.kind})")
        _alone(name, entry.site)
        if method != first:
            raise ValueError(f"{name}: MLX-LM has one rank and scale for all layers: {method} is not {first}")
    assert isinstance(first, LoRA | DoRA)
    tensors: dict[str, Tensor] = {}
    keys, layers = dict[str, None](), [0]
    for name, entry in net.plan.items():
        module, leaf = entry.site.module, adapter[name]
        down, up = leaf["a"].mT, leaf["b"].mT
        if entry.site.kind == "embedding" and down.shape[0] != entry.site.shape[0]:
            down, up = up.mT, down.mT
        tensors |= {f"{module}.lora_a": down, f"{module}.lora_b": up}
        tensors |= {f"{module}.m": leaf["m"]} if "m" in leaf else {}
        place = _LAYER.fullmatch(module)
        keys[place["key"] if place else module] = None
        layers.append(_count(net.model, place["head"]) - int(place["i"]) if place else 0)
    parameters = {"rank": first.rank, "scale": first.scale, "dropout": first.dropout, "keys": list(keys)}
    kind = "dora" if isinstance(first, DoRA) else "lora"
    config = {"fine_tune_type": kind, "num_layers": max(layers), "lora_parameters": parameters}
    write(folder / TENSORS, tensors)
    write(folder / CONFIG, json.dumps(config, indent=4, ensure_ascii=False))


def load(folder: Path, model: Model, options: Options) -> Loaded:
    options.only(folder, "key_mapping", "stored")
    where = folder / CONFIG
    config = read_json(where)
    kind = config.get("fine_tune_type", "lora") if isinstance(config, dict) else None
    if kind not in ("lora", "dora", "full"):
        raise ValueError(f"{where}: fine_tune_type is {str(kind)[:80]!r}; MLX-LM has 'lora', 'dora' and 'full'")
    with opened(folder / TENSORS) as file:
        theirs = {"peft_type": "LN_TUNING"} if kind == "full" else _lora(config, where, kind == "dora", file, model)
        return peft.build(model, configs.checked(theirs, where), file, where, options)


def _lora(config: dict[str, Any], where: Path, dora: bool, file: Tensors, model: Model) -> dict[str, Any]:
    """PEFT's configuration of the same; the tensors of `file` get PEFT's names and shapes."""
    given, count = config.get("lora_parameters"), config.get("num_layers", config.get("lora_layers", -1))
    if not isinstance(given, dict) or type(count) is not int:
        raise ValueError(f"{where}: num_layers must be a number, and lora_parameters an object with rank and scale")
    if odd := sorted(given.keys() - _PARAMETERS):
        raise ValueError(f"{where}: lora_parameters has {odd[0]!r}, which this release does not know")
    rank, scale, drop = (given.get(k) for k in ("rank", "scale", "dropout"))
    if type(rank) is not int or rank < 1 or not isinstance(scale, int | float) or isinstance(scale, bool):
        raise ValueError(f"{where}: lora_parameters has rank {rank!r} and scale {scale!r}; both must be numbers")
    for key in list(file.meta):
        module, _, end = key.rpartition(".")
        if end in _ENDS:
            place = _LAYER.fullmatch(module)
            total = _count(model.root, place["head"]) if place else 0
            if place and 0 < count < total and int(place["i"]) < total - count:
                raise ValueError(f"{file.where}: {key} is of layer {place['i']}, and num_layers is {count} of {total}")
            if (site := model.named.get(f"{module}.weight")) is not None:
                _alone(f"{file.where}: {key}", site)
            _renamed(file, key, module, end, site is not None and site.kind == "embedding")
    theirs = {"peft_type": "LORA", "r": rank, "lora_alpha": scale * rank, "use_dora": dora, "lora_dropout": drop or 0}
    keys = given.get("keys")
    if isinstance(keys, list) and keys and all(isinstance(k, str) for k in keys) and not dora:
        named = [n for n in model.distinct if _meant(n, keys, count, model)]
        theirs["target_modules"] = named or None
    elif keys is not None and not dora:
        raise ValueError(f"{where}: keys is {str(keys)[:80]}; it must be a list of names")
    return theirs


def _meant(module: str, keys: list[str], count: int, model: Model) -> bool:
    """Whether the configuration names a module: by its name in one of the last layers, or by its whole name."""
    place = _LAYER.fullmatch(module)
    if place is None or module in keys:
        return module in keys
    total = _count(model.root, place["head"])
    return place["key"] in keys and (count <= 0 or int(place["i"]) >= total - count)


def _renamed(file: Tensors, key: str, module: str, end: str, embedding: bool) -> None:
    """One tensor under PEFT's name; a factor is transposed, and an embedding's two change places, as PEFT has them."""
    shape, source = file.meta[key].shape, file.sources[key]
    if end == "m":
        file.replaced([key], f"{PREFIX}{module}.{_ENDS[end]}", source, shape)
        return
    if len(shape) != 2:
        raise ValueError(f"{file.where}: {key} has shape {list(shape)}; it must be a matrix")
    name = f"lora_embedding_{end[-1].upper()}" if embedding else _ENDS[end]
    file.replaced([key], f"{PREFIX}{module}.{name}", partial(lambda read: read().mT, source), reversed(shape))


def _alone(where: str, site: Site) -> None:
    """ValueError for an embedding that is the head too: MLX-LM changes both, where PEFT and we change one."""
    if site.kind == "embedding" and site.tied:
        raise ValueError(f"{where}: MLX-LM's LoRA of an embedding changes {site.tied[0]} too, which is tied to it")


def _count(root: Any, layers: str) -> int:
    """How many layers there are in a list of the model's; 0 where it has none of that name."""
    try:
        return len(list(root.get_submodule(layers).children()))
    except AttributeError:
        return 0
