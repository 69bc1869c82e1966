"""Adapter files: others' are read as untrusted input, ours are written so that none is ever half there."""

import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from peftfn.core.plan import Adapter, Plan
from peftfn.formats.tensor_files import Tensors
from peftfn.model.model import Model
from peftfn.net.net import Adapted
from peftfn.tensors.sharded import is_sharded
from peftfn.tensors.tree import leaves, mapped

LIMIT = 1 << 24
"""Bytes of a configuration file; the largest real ones (a pattern for every layer) are far smaller."""


@dataclass(frozen=True)
class Loaded:
    """What `load` returns. It unpacks into two: `net, adapter = load(…)`.

    Args:
        net: the net, bound to the model.
        adapter: an adapter of it.
        missing: with strict=False, keys that the adapter needs and the file lacks; these tensors have the values of a
            fresh adapter.
        unexpected: with strict=False, keys of the file that have no place in the model; these tensors are not used.
        extra: what the file says that is not about the method, under PEFT's keys: `task_type`,
            `base_model_name_or_path`, the `alora_invocation_tokens` of an activated LoRA, … In the native and PEFT's
            format, `save(…, extra=loaded.extra)` writes them.
        mismatched: with strict=False, key → (shape in the file, shape in the model) of tensors that do not fit; these
            tensors are not used, and are in `missing` where the adapter needs them.
        buffers: with buffers=True, the file's buffers that differ from the model's, by the model's names. The adapter
            was trained with them: `model.load_state_dict(loaded.buffers, strict=False)`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pf.save("adapter", net, net.init())
        loaded = pf.load("adapter", net.model, strict=False)
        assert loaded.missing == loaded.unexpected == ()
    """

    net: Adapted
    adapter: Adapter
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    mismatched: Mapping[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.net, self.adapter))


@dataclass(frozen=True)
class Options:
    """How a file is read: what `load` says of each of these. A format refuses all but what has a meaning for it."""

    strict: bool = True
    key_mapping: Mapping[str, str] | None = None
    pickled: bool = False
    experts: Literal["peft", "unsloth"] = "peft"
    buffers: bool = False
    ignore: tuple[str, ...] = ()
    stored: bool = False
    base: Literal["any", "same"] | None = None

    def __post_init__(self) -> None:
        if self.experts not in ("peft", "unsloth"):
            raise ValueError(f"load: experts is {self.experts!r}; give 'peft' or 'unsloth'")
        if self.base not in ("any", "same", None):
            raise ValueError(f"load: base is {self.base!r}; give 'any' or 'same'")

    def only(self, where: Path, *taken: Literal["key_mapping", "experts", "ignore", "stored", "base"]) -> None:
        """ValueError for an option that would have no effect on what is read at `where`: any but those that its reader
        takes, and `strict`, `pickled` and `buffers`, which allow something."""
        for option in fields(self):
            said = getattr(self, option.name) != option.default
            if said and option.name not in ("strict", "pickled", "buffers", *taken):
                name = {"stored": "dtype='file'"}.get(option.name, option.name)
                raise ValueError(f"load: {name} has no effect on what is read at {where}: leave it out")


def read_json(path: Path) -> Any:
    """The value in a JSON file. ValueError for a large file, one that is not JSON, and a key that is there twice."""
    if (size := path.stat().st_size) > LIMIT:
        raise ValueError(f"{path}: {size} bytes; a configuration has at most {LIMIT}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for k, v in pairs:
            if k in seen:
                raise ValueError(f"the key {k!r} occurs twice")
            seen[k] = v
        return seen

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=once, parse_float=_number, parse_int=_number)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON: {e}") from e


def _number(text: str) -> float:
    """A number of a JSON text. ValueError for one that no tensor could hold."""
    value = float(text)
    if abs(value) > torch.finfo(torch.float32).max:
        raise ValueError(f"{text[:20]} is too large for fp32")
    return int(text) if text.lstrip("-").isdigit() else value


def on_devices(loaded: Loaded) -> Loaded:
    """The leaves of modules on the devices of their modules. Those of weights are read onto theirs."""
    net, adapter = loaded.net, dict(loaded.adapter)
    for name, place in Model.of(net.model).at(net.plan.places).items() if net.plan.places else ():
        adapter[name] = mapped(adapter[name], partial(Tensor.to, device=place.device))
    return replace(loaded, adapter=adapter)


def as_stored(loaded: Loaded, file: Tensors) -> Loaded:
    """The adapter in the dtype that the file's tensors have. ValueError where they have several."""
    kinds = {t.dtype for t in file.meta.values() if t.is_floating_point() and t.dim()}  # an alpha is a number
    if len(kinds) != 1 or any(k.itemsize < 2 for k in kinds):
        names = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds))
        raise ValueError(
            f"{file.where}: its tensors are {names}, so dtype='file' says no dtype to compute in: give one"
        )
    (dtype,) = kinds
    return replace(loaded, adapter=mapped(loaded.adapter, lambda t: t.to(dtype)))


def mismatch(where: Path, missing: Iterable[str], unexpected: Iterable[str], more: str = "") -> ValueError:
    """The error for tensors that a file lacks or that have no place."""

    def some(keys: list[str]) -> str:
        return ", ".join(map(repr, keys[:4])) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

    lacks, odd = sorted(missing), sorted(unexpected)
    parts = [f"lacks {len(lacks)} tensors: {some(lacks)}"] if lacks else []
    parts += [f"{len(odd)} tensors have no place in this model: {some(odd)}{more}"] if odd else []
    return ValueError(f"{where}: {'; '.join(parts)}. load(…, strict=False) leaves such tensors out and lists them.")


def write(path: Path, content: Mapping[str, Tensor] | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file (tensors: as safetensors). It replaces the old one only when it is complete."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            tensors = {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in content.items()}
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_sharded(plan: Plan, adapter: Mapping[str, Any]) -> None:
    """ValueError unless every tensor of the adapter and of the plan's constants is whole, as a file holds them."""
    for name, tree in adapter.items():
        if any(map(is_sharded, leaves(tree))):
            raise ValueError(
                f"{name}: its leaf is sharded, and a file holds whole tensors. Call a = peftfn.gather(adapter, rank=0) "
                "on every rank, and save a on rank 0"
            )
    for name, e in plan.items():
        if any(map(is_sharded, e.frozen.values())):
            raise ValueError(
                f"{name}: its constants are sharded like the model, and a file holds whole tensors. Save with a net "
                "of the model without sharding, peftfn.adapt(model, rules)"
            )
