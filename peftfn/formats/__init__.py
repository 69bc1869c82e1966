"""Adapters on disk: one module a format, and `save` and `load` in front of them.

A format is a module with three functions:

    is_mine(path) -> bool                                  whether the file or folder `path` is of this format
    load(path, model, options) -> Loaded                   model: a `model.Model`; options: `files.Options`
    save(path, net, adapter, **options)                    the adapter has been checked against the net's plan

and what is common to reading and writing files is in `files.py` and `tensor_files.py`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from peftfn.core.method import Method
from peftfn.formats import adapterhub, bare, gguf, hub, kohya, mlx, native, peft, pyreft, swift
from peftfn.formats.beyond import Beyond
from peftfn.formats.files import Loaded, Options, on_devices, refuse_sharded
from peftfn.formats.occupied import refuse_adapters
from peftfn.formats.peft_extra import REPLICATION, repetition
from peftfn.methods.weights.full import Full
from peftfn.model.model import Model
from peftfn.net.distributed import distribute
from peftfn.net.net import Adapted
from peftfn.tensors.sharded import is_sharded
from peftfn.tensors.tree import mapped

FORMATS: dict[str, Any] = {
    "native": native,
    "swift": swift,
    "mlx": mlx,
    "adapterhub": adapterhub,
    "pyreft": pyreft,
    "peft": peft,
    "gguf": gguf,
    "kohya": kohya,
}
"""name → module, in the order in which `load` asks whose a path is."""

BY_METHOD: dict[str, Any] = {"adapterhub": adapterhub, "pyreft": pyreft}
"""Those whose files may need a method to say what they mean."""

PEFTS = (peft.CONFIG, peft.TENSORS, peft.PICKLE)
FILES = frozenset({native.TENSORS, native.CONFIG, peft.TENSORS, peft.CONFIG, peft.PICKLE, mlx.TENSORS})


def save(
    path: str | PathLike[str],
    net: Adapted,
    adapter: Mapping[str, Any],
    *,
    format: str = "native",
    fresh: bool = True,
    **options: Any,
) -> None:
    """Write an adapter, and the plan it belongs to, to `path`.

    Each file is written under a temporary name and then renamed, so an interrupted save leaves the old one. A folder
    has one adapter: `save` replaces the files of a former one, also of another format.

    Args:
        path: a folder; for "kohya" and "gguf", a file.
        net: the adapter's net.
        adapter: an adapter of it.
        format: "native" (any method, bit-exact: adapter.safetensors and peftfn.json), "peft" (what Hugging Face PEFT
            has a configuration for: adapter_model.safetensors and adapter_config.json), "swift" (ms-swift's LoRA, or
            whole modules), "mlx" (MLX-LM's LoRA and DoRA), "gguf" (llama.cpp's LoRA: one .gguf file), or "kohya" (one
            safetensors file: LoRA, DoRA, LoHa, LoKr; with layout="diffusers" as diffusers has it).
        fresh: whether the file has what the net's model holds and the base it is named after does not, as far as the
            base's files are on this machine: a head that `from_pretrained` drew, rows of a grown vocabulary. Formats
            that have no place for them are an error then.
        options: further options of the format; docs/checkpoints.md lists them. For "native" and "peft", `buffers`: the
            model's buffers that belong to the adapter, as `buffers_of` returns them; and `extra`: what is not about the
            methods, under PEFT's keys (`task_type`, `revision`, …).

    Raises:
        ValueError: the format cannot express the plan, or tensors are sharded; it names the sites. The path is a file,
            and the format writes a folder. Nothing has been written.
        TypeError: `path` is not a path, or `net` is not a net.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pf.save("adapter", net, net.init())
        pf.save("for_peft", net, net.init(), format="peft")
    """
    module = _format(format)
    if not isinstance(net, Adapted):
        raise TypeError(f"save takes (path, net, adapter), and the second argument is a {type(net).__name__}")
    if not isinstance(path, str | PathLike):
        raise TypeError(f"save takes (path, net, adapter), and the path is {path!r}: give a string or a Path")
    if format not in ("gguf", "kohya") and Path(path).is_file():
        raise ValueError(f"save: {Path(path)} is a file, and format={format!r} writes a folder: give another path")
    net.plan.check(adapter, lead=int(options.get("tasks", False)))
    refuse_sharded(net.plan, adapter)
    if repetition(net.model) and format not in ("native", "peft"):
        raise ValueError(
            f"save: the net's model has repeated layers ({REPLICATION}), which format={format!r} cannot express; "
            "use format='native' or 'peft'"
        )
    beyond = Beyond.of(net.model) if fresh else Beyond()
    if format in ("native", "peft"):
        options["beyond"] = beyond
    elif lost := sorted(
        beyond.values(net.model).keys() - {n for n, e in net.plan.items() if isinstance(e.method, Full)}
    ):
        raise ValueError(
            f"save: {lost[0]} has values that are not in the base {net.model.name_or_path}, and format={format!r} has "
            "no place for them: use format='native' or 'peft', or leave them out with fresh=False"
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
    experts: Literal["peft", "unsloth"] = "peft",
    buffers: bool = False,
    ignore: Iterable[str] = (),
    method: Method | None = None,
    base: Literal["any", "same"] | None = None,
    dtype: torch.dtype | Literal["file"] | None = None,
    hub_options: Mapping[str, Any] | None = None,
) -> Loaded:
    """Read an adapter from a file, a folder or the Hugging Face Hub, and bind it to `model`.

    A file is untrusted input: names, shapes and dtypes are checked against the model before a tensor is read, and the
    model is never changed. Each tensor is read once, onto its site's device.

    Args:
        path: a folder or file; if it does not exist, a Hub repository "owner/name" (needs huggingface_hub).
        model: the base, without adapters of other libraries.
        format: "native", "peft", "swift", "mlx", "adapterhub", "pyreft", "gguf" or "kohya"; None detects it.
        subfolder: folder or file inside `path`.
        revision: branch, tag or commit on the Hub.
        strict: whether missing tensors, tensors that have no place in the model, and tensors of another shape are
            errors. If False, the result lists them in `missing`, `unexpected` and `mismatched`.
        key_mapping: regular expression → replacement, tried in order on each module's name in the file; the first match
            counts. For a model whose modules have other names now.
        pickled: whether to read pickles (adapter_model.bin, pytorch_adapter.bin; only tensors, `weights_only=True`) if
            there is no safetensors file.
        experts: the order of lora_B in a PEFT file, for experts that are one stacked parameter: "peft", rank by rank,
            or "unsloth", expert by expert. A file does not say which of the two it has.
        buffers: whether the file may have buffers other than the model's (running statistics). The result has them in
            `buffers`; if False, they are an error.
        ignore: keys of a PEFT configuration that this release does not know, and that make no difference.
        method: what PEFT's tensors mean where no configuration is beside them, where pyreft's interventions act, and
            which ReFT AdapterHub's file has. Ranks are those of the tensors.
        base: None compares the model's weights with the marks that a native file has of those it was made on, a few
            values of each site; other values are an error. "any" does not compare; "same" wants a file with marks.
        dtype: of the leaves; "file" is what the file's tensors have. None keeps a native file's own, and makes others
            at least fp32.
        hub_options: further arguments of huggingface_hub's `snapshot_download`: token, cache_dir, local_files_only, …

    Returns:
        A `Loaded`: `net, adapter = load(…)`.

    Raises:
        FileNotFoundError: `path` has no adapter.
        ValueError: the file is broken or does not fit the model (it names the file and key); or the model holds
            adapters already (it names the layer).
        TypeError: the arguments are in the wrong order.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
        pf.save("adapter", net, net.init())
        net, adapter = pf.load("adapter", model)
    """
    if not isinstance(path, str | PathLike) or not isinstance(model, nn.Module):
        raise TypeError(
            f"load takes (path, model), not ({type(path).__name__}, {type(model).__name__}): give the path first"
        )
    known = Model.of(model)
    refuse_adapters(known)
    if dtype not in (None, "file") and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"load: dtype is {dtype}; an adapter's leaves are floating-point")
    where = hub.find(path, subfolder=subfolder, revision=revision, pickled=pickled, options=hub_options)
    if where.name in FILES:  # of a folder, which is meant
        where = where.parent
    options = Options(strict, key_mapping, pickled, experts, buffers, _names(ignore), dtype == "file", base)
    if format is None and method is None:
        format = next((name for name, module in FORMATS.items() if module.is_mine(where)), None)
    if format is None and method is None:
        raise FileNotFoundError(f"{where} holds no adapter of a known format ({', '.join(FORMATS)}){_instead(where)}")
    if base == "same" and (format != "native" or method is not None):
        raise ValueError(f"load: base='same' needs the marks of a native file, and {where} has another format")
    if format is None:
        format = next((name for name, module in BY_METHOD.items() if module.is_mine(where)), None)
    if method is not None and format not in (None, "peft", *BY_METHOD):
        raise ValueError(f"load: method= is for tensors without a configuration, and format is {format!r}")
    loaded: Loaded
    if format in BY_METHOD:
        loaded = BY_METHOD[format].load(where, known, options, method)
    elif method is not None:
        loaded = bare.load(where, known, method, options)
    else:
        loaded = _format(str(format)).load(where, known, options)
    loaded = on_devices(loaded)
    if isinstance(dtype, torch.dtype):
        loaded = replace(loaded, adapter=mapped(loaded.adapter, lambda t: t.to(dtype)))
    if any(map(is_sharded, known.parameters.values())):
        loaded = replace(loaded, adapter=distribute(loaded.net, loaded.adapter))
    return loaded


def _names(ignore: Iterable[str]) -> tuple[str, ...]:
    if isinstance(ignore, str):
        raise TypeError(f"load: ignore is {ignore!r}; give a list of keys, [{ignore!r}]")
    return tuple(ignore)


def _format(name: str) -> Any:
    if name not in FORMATS:
        raise ValueError(f"{name!r} is not a format; choose one of {sorted(FORMATS)}")
    return FORMATS[name]


OWN = {
    "native": (native.CONFIG, native.TENSORS),
    "peft": PEFTS,
    "swift": PEFTS,
    "mlx": (mlx.CONFIG, mlx.TENSORS),
    "kohya": (kohya.FILE,),
    "gguf": (),
}
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
        return f": it is a {where.suffix or 'file'}; give a .safetensors file or a folder"
    below = [p.name for p in sorted(where.iterdir()) if p.is_dir()]
    if inside := [n for n in below if any(module.is_mine(where / n) for module in FORMATS.values())]:
        return f"; its sub-folders {', '.join(inside)} do: pass subfolder=…, or use load_all"
    cure = ", or say what they are, load(…, method=pf.LoRA(alpha=16)) for one"
    for config, *tensors in (PEFTS, (native.CONFIG, native.TENSORS), (mlx.CONFIG, mlx.TENSORS)):
        if there := next((n for n in tensors if (where / n).is_file()), None):
            return (
                f": it has {there}, but not {config}, which describes its tensors; put {config} into the folder{cure}"
            )
    return ""
