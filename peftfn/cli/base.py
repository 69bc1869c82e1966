"""A base model for a command: its structure from config.json or from tensor names, its values mapped from files.

No weights are loaded: a parameter is a mapping of its place in a safetensors file, or, where there is only a
configuration, one number that is expanded to the parameter's shape.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftfn.formats.files import read_json
from peftfn.formats.peft_names import table

INDEX = ".safetensors.index.json"
_EMBEDDING = re.compile(r"(^|[._])(embed\w*|word_embeddings|position_embeddings|token_type_embeddings|wte|wpe|shared)$")
_EITHER_WAY = re.compile(r"(^|\.)c_(attn|proj|fc|q)$")


@dataclass
class Base:
    """A model without weights, and the files that have them.

    files: tensor's name in the files → file; keys: parameter's name in the model → tensor's name in the files.
    hollow: it has no values, only shapes and dtypes. guessed: the kinds of layers are taken from names and shapes.
    """

    model: nn.Module
    files: dict[str, Path] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    hollow: bool = False
    guessed: bool = False


def load_base(path: Path) -> Base:
    """The base model of a folder (config.json, *.safetensors, or both) or of a config.json.

    Raises:
        FileNotFoundError: there is neither.
        ValueError: a broken file, or a model of which too little is known; names the file and the cure.
    """
    folder = path.parent if path.is_file() else path
    config = path if path.is_file() else folder / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file() and path.suffix != ".json":
        raise ValueError(f"{path}: give a folder of safetensors, or a config.json")
    files = {} if path.is_file() else shards(folder)
    if not files and not config.is_file():
        raise FileNotFoundError(f"{folder} holds no base model: neither config.json nor *.safetensors")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with opened_shard(file) as shard:  # the tensors are mapped: they cost no memory, and outlive the handle
            tensors |= {k: shard.get_tensor(k) for k in shard.keys() if files.get(k) == file}  # noqa: SIM118
    for key in sorted(files.keys() - tensors.keys()):
        raise ValueError(f"{files[key]}: {key} is in the index, but not in the file")
    described = read_json(config) if config.is_file() else {}
    known = isinstance(described, dict) and "model_type" in described
    if not known and not tensors:
        raise ValueError(
            f"{config}: not a configuration of transformers (it has no model_type), and the folder has no tensors"
        )
    model = _of_transformers(config) if known else from_names(tensors, folder)
    base = Base(model, files, hollow=not tensors, guessed=not known)
    _fill(base, tensors)
    return base


@contextmanager
def opened_shard(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as e:
        raise ValueError(f"{path}: not a valid safetensors file: {e}") from e


def shards(folder: Path) -> dict[str, Path]:
    """Tensor's name → its file. ValueError for a tensor in two files, or an index that names no file of the folder."""
    indices = sorted(p for p in folder.iterdir() if p.name.endswith(INDEX))
    if len(indices) > 1:
        raise ValueError(f"{folder} has several indices: {', '.join(p.name for p in indices)}")
    if indices:
        read = read_json(indices[0])
        found = read.get("weight_map") if isinstance(read, dict) else None
        if not isinstance(found, dict) or not all(isinstance(n, str) for n in found.values()):
            raise ValueError(f"{indices[0]}: weight_map is {str(found)[:80]}; it must have a file for each tensor")
        for name in set(found.values()):
            if Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{indices[0]}: {name!r} is not a file in this folder")
        return {k: folder / name for k, name in found.items()}
    out: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with opened_shard(path) as file:
            for key in file.keys():  # noqa: SIM118 - no mapping
                if key in out:
                    raise ValueError(f"{path}: {key} is in {out[key].name} too, and no index says which counts")
                out[key] = path
    return out


def _of_transformers(config: Path) -> nn.Module:
    """The model of a configuration, on the meta device; no code from the folder runs."""
    try:
        import transformers
    except ModuleNotFoundError as e:
        raise ValueError(f"{config}: this model needs transformers: pip install 'peftfn[hf]'") from e
    try:
        read = transformers.AutoConfig.from_pretrained(config, trust_remote_code=False)
    except (ValueError, OSError, KeyError, TypeError) as e:
        raise ValueError(f"{config}: transformers {transformers.__version__} does not support it: {e}") from e
    names = getattr(read, "architectures", None) or []
    cls: Any = getattr(transformers, str(names[0]), None) if names else transformers.AutoModel
    if cls is None:
        raise ValueError(f"{config}: transformers {transformers.__version__} has no {names[0]}")
    try:
        with torch.device("meta"):
            model: nn.Module = cls._from_config(read) if names else cls.from_config(read)
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as e:
        raise ValueError(f"{config}: transformers cannot build {names[0] if names else 'it'}: {e}") from e
    return model


def from_names(tensors: Mapping[str, Tensor], where: object) -> nn.Module:
    """A model with a parameter for each tensor, and with the kinds of layers that names and shapes suggest.

    `x.weight` is the weight of an nn.Linear with two axes, unless the name ends like an embedding's, and of a
    convolution with four or five; with three it is a Conv1d if the name says conv, else a stack of experts.

    Raises:
        ValueError: a layer that may be transposed (transformers' Conv1D), which only a configuration can say.
    """
    root = nn.Module()
    # layers first, the outer before the inner, so that each is made as what its weight says
    for key in sorted(tensors, key=lambda k: (not k.endswith(".weight"), k.count("."))):
        t, (*path, attr) = tensors[key], key.split(".")
        name = ".".join(path)
        if attr == "weight" and t.dim() == 2 and _EITHER_WAY.search(name):
            raise ValueError(
                f"{where}: {key} may be stored transposed, as GPT-2's are; put the model's config.json into the folder"
            )
        parent = root
        for part in path[:-1]:
            parent = _child(parent, part)
        if not path:
            owner = root
        elif attr == "weight" and t.is_floating_point() and path[-1] not in parent._modules:
            owner = _layer(name, t)
            parent.add_module(path[-1], owner)
        else:
            owner = _child(parent, path[-1])
        if t.is_floating_point() and attr not in ("running_mean", "running_var"):
            owner.register_parameter(attr, nn.Parameter(t.to("meta"), requires_grad=False))
        else:
            owner.register_buffer(attr, t)
    return root


def _child(parent: nn.Module, name: str) -> nn.Module:
    if name not in parent._modules:
        parent.add_module(name, nn.Module())
    return parent.get_submodule(name)


def _layer(name: str, t: Tensor) -> nn.Module:
    out, *rest = t.shape
    if t.dim() == 2:
        if _EMBEDDING.search(name):
            return nn.Embedding(out, rest[0], device="meta")
        return nn.Linear(rest[0], out, bias=False, device="meta")
    if t.dim() == 3 and "conv" in name.rpartition(".")[2]:
        return nn.Conv1d(rest[0], out, rest[1], bias=False, device="meta")
    if t.dim() in (4, 5):
        conv: Any = nn.Conv2d if t.dim() == 4 else nn.Conv3d
        return conv(rest[0], out, tuple(rest[1:]), bias=False, device="meta")
    return nn.Module()


def _fill(base: Base, tensors: Mapping[str, Tensor]) -> None:
    """Give every parameter its value from the files, or one that takes no memory; ties stay."""
    slots = [
        (f"{prefix}.{attr}" if prefix else attr, module, attr, p)
        for prefix, module in base.model.named_modules(remove_duplicate=False)
        for attr, p in module._parameters.items()
        if p is not None
    ]
    now = _current(base.model, tensors)
    prefix = getattr(base.model, "base_model_prefix", "")
    new: dict[int, nn.Parameter] = {}
    names: dict[int, list[str]] = {}
    for name, _, _, p in slots:
        names.setdefault(id(p), []).append(name)
    for name, module, attr, p in slots:
        key = next((now[n] for n in _spellings([name, *names[id(p)]], prefix) if n in now), None)
        if key is not None:
            base.keys[name] = key
        if id(p) not in new:
            if key is not None and tensors[key].shape != p.shape:
                have, want = list(tensors[key].shape), list(p.shape)
                raise ValueError(f"{base.files[key]}: {key} has shape {have}, and config.json says {want}")
            t = torch.ones((), dtype=p.dtype).expand(p.shape) if key is None else tensors[key]
            new[id(p)] = nn.Parameter(t, requires_grad=False)
        module._parameters[attr] = new[id(p)]
    base.model.eval()


def _current(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of today → name in the files, which may be older."""
    out, old = {k: k for k in tensors}, table(model)
    known = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    for key in tensors if old is not None else ():
        if key not in known and old is not None and (new := old(key)) in known:
            out.setdefault(new, key)
    return out


def _spellings(names: Iterable[str], prefix: str) -> Iterator[str]:
    """Names, and the same with and without the prefix that transformers puts before the model inside of a model."""
    for name in names:
        yield name
        if prefix:
            yield name.removeprefix(f"{prefix}.")
            yield f"{prefix}.{name}"


def guard(base: Base, adapter: Path) -> None:
    """ValueError where the adapter is for transposed layers, and the kinds of the base's layers are a guess."""
    if not base.guessed or not adapter.is_dir():
        return
    for path in (adapter / "adapter_config.json", *adapter.glob("*/adapter_config.json")):
        if path.is_file() and isinstance(config := read_json(path), dict) and config.get("fan_in_fan_out"):
            raise ValueError(
                f"{path}: fan_in_fan_out is on; the base's config.json must be there to say for which layers"
            )
