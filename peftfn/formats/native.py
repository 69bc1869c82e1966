"""The native format: adapter.safetensors (trained and frozen tensors) and peftfn.json (rules, methods, shapes)."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.core.make import make
from peftfn.core.plan import Entry, Plan
from peftfn.core.rules import offered
from peftfn.formats.bases import check_base, marks
from peftfn.formats.beyond import Beyond
from peftfn.formats.buffers import compared, compared_rows, statistics
from peftfn.formats.files import Loaded, Options, write
from peftfn.formats.indices import check_indices
from peftfn.formats.native_config import VERSION, read, rules_of, to_json
from peftfn.formats.native_tensors import BUFFER, ROWS, constant_keys, flat, one_save, places_in, put
from peftfn.formats.peft_extra import REPLICATION, about, given, repetition, replicated
from peftfn.formats.tensor_files import Tensors, opened
from peftfn.model.model import Model, weights_of
from peftfn.net.net import Adapted
from peftfn.tensors.sharded import on_mesh

CONFIG, TENSORS = "peftfn.json", "adapter.safetensors"


def is_mine(path: Path) -> bool:
    return (path / CONFIG).is_file()


def save(
    folder: Path,
    net: Adapted,
    adapter: Mapping[str, Any],
    *,
    buffers: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Any] | None = None,
    beyond: Beyond | None = None,
) -> None:
    """Write the two files.

    Args:
        buffers: the model's that belong to the adapter; those of whole modules are the net's.
        extra: what is not about the methods, under PEFT's keys: `task_type`, `revision`, …
        beyond: what the model holds beyond its base.
    """
    beyond = beyond or Beyond()
    more = {k: v for k, v in {**about(net.model), **given(extra, net)}.items() if k != REPLICATION}
    tensors = {f"adapter/{k}": t for k, t in flat(adapter)}
    tensors |= {f"{BUFFER}{k}": t for k, t in (statistics(net, buffers) | dict(beyond.fresh)).items()}
    tensors |= {f"{ROWS}{k}": net.model.get_parameter(k).detach()[n:] for k, n in beyond.grown.items()}
    stored: dict[int, str] = {}  # a constant that several sites share is written once
    for name, entry in net.plan.items():
        for k, t in entry.frozen.items():
            tensors[stored.setdefault(id(t), f"frozen/{name}/{k}")] = t
    config: dict[str, Any] = {
        "format": "peftfn",
        "version": VERSION,
        "torch": torch.__version__,
        "rules": [[pattern, to_json(method)] for pattern, method in net.plan.rules.items()],
        "constants": {n: {k: stored[id(t)] for k, t in e.frozen.items()} for n, e in net.plan.items() if e.frozen},
        "sites": {n: {"shape": list(e.site.shape), "rule": e.rule} for n, e in net.plan.items()},
    }
    if base := marks(net.plan, weights_of(net.model), (*beyond.fresh, *beyond.grown)):
        config["base"] = base
    config |= {"extra": more, **repetition(net.model), **({"grown": dict(beyond.grown)} if beyond.grown else {})}
    # the two files are renamed one after the other: this says whether they are of one save
    config["id"] = hashlib.sha256(json.dumps(config).encode()).hexdigest()[:16]
    write(folder / TENSORS, tensors, {"id": config["id"]})
    write(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False))


def load(folder: Path, model: Model, options: Options) -> Loaded:
    options.only(folder, "stored", "base")
    where = folder / CONFIG
    config = read(where)
    rules, taken = rules_of(config, where)
    if REPLICATION in config:
        model = replicated(model, config[REPLICATION], where)
    offers = {pattern: offered(model, method) for pattern, method in rules.items()}
    for name, site in config["sites"].items():
        have = offers[taken[name]].get(name)
        if have is None or list(have.shape) != site["shape"]:
            raise ValueError(
                f"{where}: made for another model: {name or 'the model'} is {site['shape']} in the file, and "
                + ("not in the model" if have is None else f"{list(have.shape)} in the model")
            )
        if have.kind not in rules[taken[name]].kinds:
            raise ValueError(f"{where}: {name} has the rule {taken[name][:80]!r}, which has no method for it")
    try:
        plan = make(model, rules, 0, taken=taken, constants=False)
    except (ValueError, TypeError, AttributeError, RuntimeError, MemoryError, ArithmeticError) as e:
        raise ValueError(f"{where}: its methods do not fit the model: {e}") from e
    with opened(folder / TENSORS) as file:
        one_save(file, config, where)
        if odd := [k for k, t in file.meta.items() if t.is_floating_point() and t.element_size() == 1]:
            raise ValueError(f"{file.where}: {odd[0]} is {file.meta[odd[0]].dtype}, in which no adapter computes")
        known = {n: t for n, t in model.weights.items() if isinstance(t, Tensor)}
        file, rows = compared_rows(file, known, config.get("grown", {}), options.buffers, ROWS)
        file, buffers = compared(file, model.buffers, known, options.buffers, BUFFER)
        buffers |= rows
        loaded = _filled(model, plan, config["constants"], file, options.strict)
        if options.base != "any":
            names = config.get("extra", {}).get("base_model_name_or_path"), getattr(model.root, "name_or_path", None)
            check_base(config.get("base", {}), model.weights, names, where)
        return replace(loaded, buffers=buffers, extra=config.get("extra", {}))


def _filled(
    model: Model, plan: Plan, constants: Mapping[str, Mapping[str, str]], file: Tensors, strict: bool
) -> Loaded:
    """The net and adapter of a plan without constants, with the file's tensors."""
    places, missing, unexpected, wrong = places_in(plan, constants, file, strict)
    weights = model.weights | model.at(plan.places)
    devices = {n: w.device for n, w in weights.items()}
    devices |= {e.bank: devices[n] for n, e in plan.items() if e.bank}
    once: dict[tuple[str, torch.device], Tensor] = {}
    entries: dict[str, Entry] = {}
    for name, e in plan.items():
        frozen = {}
        for k, key in constant_keys(name, e, constants, file).items():
            if (key, devices[name]) not in once:
                once[key, devices[name]] = on_mesh(file.tensor(key, devices[name], exact=True), weights[name])
            frozen[k] = once[key, devices[name]]
        entries[name] = dataclasses.replace(e, frozen=frozen)
    net = Adapted(model.root, Plan(entries, plan.rules, plan.banks))
    check_indices(net.plan, file.where)
    adapter: dict[str, Any] = net.init() if missing else {name: {} for name, e in plan.items() if not e.spec}
    for key, path in places.items():
        if key not in unexpected:
            put(adapter, path, file.tensor(key, devices[path[0]], exact=True), file.where)
    net.plan.check(adapter)
    return Loaded(net, adapter, tuple(sorted(missing)), tuple(sorted(unexpected)), mismatched=wrong)
