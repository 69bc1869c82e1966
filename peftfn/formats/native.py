"""The native format: adapter.safetensors (trained and frozen tensors) and peftfn.json (rules, methods, shapes)."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftfn.apply import Adapted, adapt
from peftfn.method import Method, registry
from peftfn.plan import Adapter, Plan

CONFIG, TENSORS, VERSION = "peftfn.json", "adapter.safetensors", 1


def save(folder: Path, net: Adapted, adapter: Mapping[str, Any]) -> None:
    """Both files are written beside their final names and renamed: an interrupted save leaves the old ones."""
    tensors = {f"adapter/{k}": t for k, t in _flat(adapter)}
    stored: dict[int, str] = {}  # a constant that several sites share is written once
    for name, entry in net.plan.items():
        for k, t in entry.frozen.items():
            key = stored.setdefault(id(t), f"frozen/{name}/{k}")
            tensors[key] = t
    constants = {n: {k: stored[id(t)] for k, t in e.frozen.items()} for n, e in net.plan.items() if e.frozen}
    config = {
        "format": "peftfn",
        "version": VERSION,
        "torch": torch.__version__,
        "rules": [[pattern, to_json(method)] for pattern, method in net.plan.rules.items()],
        "constants": constants,
        "sites": {name: list(entry.site.shape) for name, entry in net.plan.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".{TENSORS}.{os.getpid()}", folder / f".{CONFIG}.{os.getpid()}"
    save_file({k: t.detach().contiguous().clone() for k, t in tensors.items()}, written[0], metadata={"format": "pt"})
    written[1].write_text(json.dumps(config, indent=2, ensure_ascii=False))
    os.replace(written[0], folder / TENSORS)
    os.replace(written[1], folder / CONFIG)


def load(folder: Path, model: nn.Module) -> tuple[Adapted, Adapter]:
    config = json.loads((folder / CONFIG).read_text())
    if config.get("format") != "peftfn" or config.get("version") != VERSION:
        raise ValueError(
            f"{folder / CONFIG}: format {config.get('format')!r}, version {config.get('version')!r}; this release "
            f"reads 'peftfn', version {VERSION}"
        )
    rules = {pattern: from_json(method, folder / CONFIG) for pattern, method in config["rules"]}
    net = adapt(model, rules)
    want = {name: list(e.site.shape) for name, e in net.plan.items()}
    if want != config["sites"]:
        odd = sorted(n for n in want.keys() | config["sites"].keys() if want.get(n) != config["sites"].get(n))
        raise ValueError(
            f"{folder / CONFIG}: made for another model: {len(odd)} sites differ, first {odd[0]} (file: "
            f"{config['sites'].get(odd[0])}, model: {want.get(odd[0])})"
        )
    adapter: Adapter = {name: {} for name, e in net.plan.items() if not e.spec}  # all that they train is in a bank
    frozen: dict[str, Tensor] = {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    devices = {name: weights[name].device for name in net.plan}
    devices |= {e.bank: devices[n] for n, e in net.plan.items() if e.bank}
    with safe_open(folder / TENSORS, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            group, place, *path = key.split("/")
            # a copy: a mapped tensor is not aligned as torch aligns its own, and BLAS would round differently
            t = file.get_tensor(key).to(devices.get(place, "cpu"), copy=True)
            if group == "adapter":
                _put(adapter, [place, *path], t)
            else:
                frozen[key] = t
    entries = {}
    for name, e in net.plan.items():
        names = config["constants"].get(name, {})
        if names.keys() != e.frozen.keys() or not frozen.keys() >= set(names.values()):
            raise ValueError(f"{folder}: {name} has constants {sorted(names)}, and {e.method} has {sorted(e.frozen)}")
        entries[name] = dataclasses.replace(e, frozen={k: frozen[key].to(devices[name]) for k, key in names.items()})
    net = Adapted(model, Plan(entries, net.plan.rules, net.plan.banks))
    net.plan.check(adapter)
    return net, adapter


def to_json(method: Method) -> dict[str, Any]:
    """{"method": class name, field: value, …}; methods inside methods too."""

    def value(v: Any) -> Any:
        if isinstance(v, Method):
            return to_json(v)
        return [value(x) for x in v] if isinstance(v, list | tuple) else v

    return {"method": type(method).__name__} | {
        f.name: value(getattr(method, f.name))
        for f in dataclasses.fields(method)  # type: ignore[arg-type]
    }


def from_json(data: Any, where: Path) -> Method:
    """The method of `to_json`. ValueError for a method or field this release does not know."""

    def value(v: Any) -> Any:
        if isinstance(v, dict):
            return from_json(v, where)
        return tuple(value(x) for x in v) if isinstance(v, list) else v

    if not isinstance(data, dict) or data.get("method") not in registry:
        name = data.get("method") if isinstance(data, dict) else data
        raise ValueError(
            f"{where}: unknown method {name!r}; known are {sorted(registry)}. Import the module that defines it."
        )
    cls = registry[data["method"]]
    try:
        return cls(**{k: value(v) for k, v in data.items() if k != "method"})
    except TypeError as e:
        raise ValueError(f"{where}: {cls.__name__} does not take what the file gives it: {e}") from e


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for k, v in tree.items():
        if isinstance(v, Mapping):
            yield from _flat(v, f"{prefix}{k}/")
        else:
            yield f"{prefix}{k}", v


def _put(tree: dict[str, Any], path: list[str], t: Tensor) -> None:
    *folders, last = path
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = t
