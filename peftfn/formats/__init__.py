"""Adapters on disk: one module a format, and `save` and `load` in front of them.

A format is a module with three functions:

    is_mine(path) -> bool                                  whether the file or folder `path` is of this format
    load(path, model, options) -> Loaded                   model: a `model.Model`; options: `files.Options`
    save(path, net, adapter, **options)                    the adapter has been checked against the net's plan

and what is common to reading and writing files is in `files.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from torch import nn

from peftfn.formats import hub, kohya, native, peft, swift
from peftfn.formats.files import Loaded, Options, refuse_sharded
from peftfn.formats.occupied import refuse_adapters
from peftfn.formats.peft_extra import REPLICATION, repetition
from peftfn.model.model import Model
from peftfn.net.distributed import distribute
from peftfn.net.net import Adapted
from peftfn.tensors.sharded import is_sharded

FORMATS: dict[str, Any] = {"native": native, "swift": swift, "peft": peft, "kohya": kohya}
"""name → module, in the order in which `load` asks whose a path is."""

PEFTS = (peft.CONFIG, peft.TENSORS, peft.PICKLE)
FILES = frozenset({native.TENSORS, native.CONFIG, peft.TENSORS, peft.CONFIG, peft.PICKLE})


def save(
    path: str | PathLike[str], net: Adapted, adapter: Mapping[str, Any], *, format: str = "native", **options: Any
) -> None:
    """Write an adapter, and the plan it belongs to, to `path`.

    Each file is written beside its place and renamed: an interrupted save leaves the old one. A folder has one adapter:
    the files of a former one there are replaced, also if it was of another format.

    Args:
        format: "native" (any method, bit-exact: adapter.safetensors and peftfn.json), "peft" (what Hugging Face PEFT
            has a configuration for: adapter_model.safetensors and adapter_config.json), "swift" (ms-swift's LoRA, or
            whole modules), or "kohya" (one safetensors file: LoRA, DoRA, LoHa, LoKr; with layout="diffusers" as
            diffusers has it).
        options: of the format: those of `save` in its module.

    Raises:
        ValueError: the format cannot express the plan, or tensors are sharded; names the sites. Nothing has been
            written then.
    """
    module = _format(format)
    if not isinstance(net, Adapted):
        raise TypeError(f"save takes (path, net, adapter), and the second is a {type(net).__name__}")
    net.plan.check(adapter)
    refuse_sharded(net.plan, adapter)
    if repetition(net.model) and format not in ("native", "peft"):
        raise ValueError(
            f"save: the net's model has repeated layers ({REPLICATION}), which format={format!r} cannot say"
        )
    module.save(Path(path), net, adapter, **options)
    _replace_others(Path(path), format)


def load(
    path: str | PathLike[str],
    model: nn.Module,
    *,
    format: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    strict: bool = True,
    key_mapping: Mapping[str, str] | None = None,
    pickled: bool = False,
    gated: bool = False,
    experts: Literal["peft", "unsloth"] = "peft",
) -> Loaded:
    """`net, adapter` from a file or folder, or from a repository of the Hugging Face hub, bound to `model`.

    A file is untrusted input: names, shapes and dtypes are checked against the model before a tensor is read, and the
    model is never changed. Each tensor is read once, onto its site's device.

    Args:
        path: a folder or file; or, where there is none, the hub's "owner/name" (needs huggingface_hub).
        format: one of `FORMATS`; without it, what the path holds says.
        subfolder: folder or file inside of `path`.
        revision: branch, tag or commit on the hub.
        strict: whether tensors that the adapter lacks, or that have no place in the model, are errors. If not, they
            are listed in the result's `missing` and `unexpected`.
        key_mapping: regular expression → replacement, tried in order on each module's name in the file, the first that
            matches counts: for a model whose modules have other names now.
        pickled: read adapter_model.bin (tensors alone, `weights_only=True`) where there is no safetensors file.
        gated: read PEFT's activated LoRAs too, which act from certain tokens on: with `alora_gates` in `net.gated`, as
            the result's `extra["alora_invocation_tokens"]` says, and not in `net.apply`.
        experts: how a PEFT file has lora_B of experts that are one stacked parameter: "peft", rank by rank, or
            "unsloth", expert by expert. Nothing in a file tells the two apart.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a file that is broken, or does not fit the model (names file and key); or a model that holds
            adapters already (names the layer).
    """
    known = Model.of(model)
    refuse_adapters(known)
    where = hub.find(path, subfolder=subfolder, revision=revision, pickled=pickled)
    if where.name in FILES:  # of a folder, which is meant
        where = where.parent
    if format is None:
        format = next((name for name, module in FORMATS.items() if module.is_mine(where)), None)
    if format is None:
        raise FileNotFoundError(f"{where} holds no adapter of a known format ({', '.join(FORMATS)}){_instead(where)}")
    options = Options(strict, key_mapping, pickled, gated, experts)
    loaded: Loaded = _format(format).load(where, known, options)
    if any(map(is_sharded, known.parameters.values())):
        loaded = replace(loaded, adapter=distribute(loaded.net, loaded.adapter))
    return loaded


def _format(name: str) -> Any:
    if name not in FORMATS:
        raise ValueError(f"there is no format {name!r}; choose one of {sorted(FORMATS)}")
    return FORMATS[name]


OWN = {"native": (native.CONFIG, native.TENSORS), "peft": PEFTS, "swift": PEFTS, "kohya": (kohya.FILE,)}
"""Format → the files of an adapter of it in a folder; the one that makes it an adapter first."""


def _replace_others(path: Path, format: str) -> None:
    """A folder has one adapter: when another one has been saved, the files of a former one, of another format, go."""
    if path.is_file():
        return
    keep = () if format == "swift" else OWN[format]  # ms-swift's is in a folder below
    for name in dict.fromkeys(file for files in OWN.values() for file in files if file not in keep):
        (path / name).unlink(missing_ok=True)


def _instead(where: Path) -> str:
    """What a path without an adapter holds instead, and what to do."""
    if not where.is_dir():
        return f": it is a {where.suffix or 'file'}, and adapters are in .safetensors files or in folders"
    below = [p.name for p in sorted(where.iterdir()) if p.is_dir()]
    if inside := [n for n in below if any(module.is_mine(where / n) for module in FORMATS.values())]:
        return f"; there are some in {', '.join(inside)}: give subfolder=, or use load_all"
    for config, *tensors in ((peft.CONFIG, peft.TENSORS, peft.PICKLE), (native.CONFIG, native.TENSORS)):
        if there := next((n for n in tensors if (where / n).is_file()), None):
            return f": {there} is there, and {config}, which says what its tensors mean, is missing; put it beside it"
    return ""
