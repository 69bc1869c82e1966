"""What a model holds that the base it is named after does not: heads that `from_pretrained` drew, because the base's
files have none, and rows of a vocabulary that grew since. An adapter of such a model means nothing without them.

The base's files are looked for on this machine alone: its folder, or the hub's cache. Where they are not there (or are
no safetensors), nothing is known, and nothing said.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from peftfn.formats.files import read_json
from peftfn.formats.peft_names import table
from peftfn.tensors.sharded import is_sharded

FILES = ("model.safetensors.index.json", "model.safetensors")
"""What transformers calls a model's files."""
_POOLER = "pooler"
"""The one part of a backbone that a base may lack."""


@dataclass(frozen=True)
class Beyond:
    """fresh: parameter → its value, of which the base's files have nothing. grown: parameter → the rows that the base's
    files have of it, fewer than it has now.
    """

    fresh: Mapping[str, Tensor] = field(default_factory=dict)
    grown: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> "Beyond":
        """What the model holds beyond its base."""
        files = _files(model)
        if not files:
            return cls()
        known, prefix = _known(model, files), f"{getattr(model, 'base_model_prefix', '')}."
        named = dict(model.named_parameters(remove_duplicate=False))
        there = {id(p) for n, p in named.items() if n in known}  # by one of its names, if it is tied
        fresh = {
            n: p.detach()
            for n, p in named.items()
            if id(p) not in there and prefix != "." and (not n.startswith(prefix) or _POOLER in n.split("."))
        }
        grown = {
            n: rows
            for n in _embeddings(model)
            if n in known and (rows := _rows(files[known[n]], known[n])) and rows < len(named[n])
        }
        for n in (*fresh, *grown):
            if is_sharded(named[n]):
                raise ValueError(
                    f"save: {n} has values that are not in the base, and is sharded: save with a net of the model "
                    "without sharding, or leave its values out of the file with fresh=False"
                )
        return cls(fresh, grown)

    def __bool__(self) -> bool:
        return bool(self.fresh or self.grown)

    def values(self, model: nn.Module) -> dict[str, Tensor]:
        """Whole values: fresh parameters, and those of which rows were added."""
        return {**self.fresh, **{n: model.get_parameter(n).detach() for n in self.grown}}


def _files(model: nn.Module) -> dict[str, Path]:
    """Tensor's name in the base's files → its file."""
    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name or not hasattr(model, "base_model_prefix"):
        return {}
    index, single = (_found(name, file) for file in FILES)
    if index is not None:
        read = read_json(index)
        places = read.get("weight_map") if isinstance(read, dict) else None
        return {str(k): index.parent / str(v) for k, v in places.items()} if isinstance(places, dict) else {}
    return dict.fromkeys(_names(single), single) if single is not None else {}


def _found(name: str, file: str) -> Path | None:
    """The base's file on this machine."""
    if (Path(name) / file).is_file():
        return Path(name) / file
    if Path(name).exists():
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError:
        return None
    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:  # a path that was there once
        return None
    return Path(found) if isinstance(found, str) else None


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as shard:
            return list(shard.keys())
    except SafetensorError:  # a broken base is not what is being saved
        return []


def _rows(file: Path, key: str) -> int:
    """The first size of a tensor in a file; 0 where there is none."""
    try:
        with safe_open(file, framework="pt") as shard:
            return int((shard.get_slice(key).get_shape() or [0])[0])
    except (SafetensorError, OSError):  # not all of the base's files need be here
        return 0


def _known(model: Any, files: Mapping[str, Path]) -> dict[str, str]:
    """The model's name of a tensor, in any spelling → its name in the files: with and without the prefix that
    transformers puts before a model inside of a model, and as its table of old names has it."""
    prefix, renamed = f"{model.base_model_prefix}.", table(model)
    out: dict[str, str] = {}
    for key in files:
        for name in (key, *((renamed(key),) if renamed else ())):
            for spelling in (name, f"{prefix}{name}", name.removeprefix(prefix)):
                out.setdefault(spelling, key)
    return out


def _embeddings(model: Any) -> list[str]:
    """The names of the embedding's weight and the head's."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(w) for layer in layers if isinstance(w := getattr(layer, "weight", None), nn.Parameter)}
    return [n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in weights]
