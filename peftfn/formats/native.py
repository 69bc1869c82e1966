"""The native format: adapter.safetensors (trained and frozen tensors) and peftfn.json (rules, methods, shapes)."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.core.make import make
from peftfn.core.method import Method, registry
from peftfn.core.plan import Entry, Plan
from peftfn.core.rules import offered
from peftfn.formats import bases
from peftfn.formats.bases import check_base, marks
from peftfn.formats.beyond import Beyond
from peftfn.formats.buffers import compared, compared_rows, statistics
from peftfn.formats.files import MOST, Loaded, Options, Tensors, mismatch, opened, read_json, write
from peftfn.formats.indices import check_indices
from peftfn.formats.peft_extra import REPLICATION, about, checked, given, repetition, replicated
from peftfn.model.model import Model, weights_of
from peftfn.net.net import Adapted
from peftfn.tensors.sharded import on_mesh

CONFIG, TENSORS, VERSION = "peftfn.json", "adapter.safetensors", 1
BUFFER = "buffer/"
"""What stands before a buffer's name in the file, and before that of a parameter that the base does not have."""
ROWS = "rows/"
"""What stands before the name of a parameter of which the file has the rows that the base does not have."""


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
    tensors = {f"adapter/{k}": t for k, t in _flat(adapter)}
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
    options.only(folder, "buffers", "stored", "base")
    where = folder / CONFIG
    config = _read(where)
    rules, taken = _rules(config, where)
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
        _one_save(file, config, where)
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


def check_saved(path: Path, net: Adapted) -> str:
    """The id of the plan that a file of tensors was saved with.

    Raises:
        FileNotFoundError: it, or its configuration, is missing.
        ValueError: it does not hold an adapter, or its plan is not the net's: same sites, methods and constants.
    """
    where = path.with_name(CONFIG)
    config = _read(where)
    rules, taken = _rules(config, where)
    theirs = {name: rules[rule] for name, rule in taken.items()}
    for name in dict.fromkeys([*theirs, *net.plan]):
        saved, mine = theirs.get(name), net.plan[name].method if name in net.plan else None
        if saved is None or mine is None or (saved != mine and meaning(saved) != meaning(mine)):
            raise ValueError(
                f"{path}: {name}: the file was saved with {saved or 'no method'} here, and the net it is put with has "
                f"{mine or 'none'}: put it with the net that it was saved with, which peftfn.load returns"
            )
        if (shape := config["sites"][name]["shape"]) != list(net.plan[name].site.shape):
            raise ValueError(f"{path}: {name} is {shape} in the file, and {list(net.plan[name].site.shape)} in the net")
    with opened(path) as file:
        _one_save(file, config, where)
        known = dict(net.model.named_parameters(remove_duplicate=False))
        file, _ = compared_rows(file, known, config.get("grown", {}), False, ROWS)
        file, _ = compared(file, dict(net.model.named_buffers()), known, False, BUFFER)
        _places(net.plan, config["constants"], file, True)
        _same_constants(net.plan, config["constants"], file)
    return str(config["id"])


def read_saved(path: Path, net: Adapted, plan: str) -> dict[str, Any]:
    """The adapter in a file of tensors that fits the net, on the CPU. The file is mapped for as long as it takes.

    plan: what `check_saved` returned; a file that was saved with another plan since then is checked again.
    """
    with opened(path) as file:
        if file.metadata.get("id") != plan:
            check_saved(path, net)
        constants = {
            "": {key: key for key in file.meta if key.startswith(("frozen/", BUFFER, ROWS))}
        }  # by `check_saved`
        places, *_ = _places(net.plan, constants, file, True)
        adapter: dict[str, Any] = {name: {} for name, e in net.plan.items() if not e.spec}
        for key, place in places.items():
            _put(adapter, place, file.tensor(key, exact=True), path)
    return adapter


def _rules(config: Mapping[str, Any], where: Path) -> tuple[dict[str, Method], dict[str, str]]:
    """(pattern → method, site → pattern). ValueError for a rule without a site, or a site without a rule."""
    rules = {pattern: from_json(method, where) for pattern, method in config["rules"]}
    taken = {name: site["rule"] for name, site in config["sites"].items()}
    for name, rule in taken.items():
        if rule not in rules:
            raise ValueError(f"{where}: {name} has the rule {rule[:80]!r}, which has no method for it")
    if rules.keys() != set(taken.values()):
        raise ValueError(f"{where}: the rule {min(rules.keys() - set(taken.values()))[:80]!r} matches no site")
    return rules, taken


def _one_save(file: Tensors, config: Mapping[str, Any], where: Path) -> None:
    if file.metadata.get("id") != config["id"]:
        raise ValueError(f"{file.where} and {where} are of different saves: one was interrupted, or is a copy")


def meaning(method: Method) -> tuple[Any, ...]:
    """An identifier that is equal for two methods that do the same with one leaf: all but how they train and start, and
    the scale in place of what it is made of, for alpha=None and alpha=rank mean the same."""
    m = method.eval()
    names = {f.name for f in dataclasses.fields(m)} - {"dropout", "init_weights"}
    if "alpha" in names and hasattr(m, "scale"):
        names = names - {"alpha", "rslora"} | {"scale"}
    return type(m), *((k, getattr(m, k)) for k in sorted(names))


def _same_constants(plan: Plan, constants: Mapping[str, Mapping[str, str]], file: Tensors) -> None:
    """ValueError unless the file's constants are the plan's, bit for bit."""
    for name, entry in plan.items():
        keys = _constant_keys(name, entry, constants, file)
        for k, key in keys.items():
            mine = entry.frozen[k]
            if not torch.equal(file.tensor(key, exact=True), mine.cpu()):
                raise ValueError(
                    f"{file.where}: {name}: its constant {k} differs from the net's: adapt with the same seed, or "
                    "put it with the net that it was saved with, which peftfn.load returns"
                )


def _constant_keys(
    name: str, entry: Entry, constants: Mapping[str, Mapping[str, str]], file: Tensors
) -> Mapping[str, str]:
    """Where the file has the constants of a site. ValueError where it has others than the method."""
    keys = constants.get(name, {})
    if keys.keys() != entry.frozen.keys() or not file.meta.keys() >= set(keys.values()):
        raise ValueError(
            f"{file.where}: {name} has constants {sorted(keys)}, and {entry.method} has {sorted(entry.frozen)}"
        )
    for k, key in keys.items():
        like = entry.frozen[k]
        file.check(key, like.shape, like.is_floating_point())
        if not like.is_floating_point() and file.meta[key].dtype != like.dtype:
            raise ValueError(f"{file.where}: {key} is {file.meta[key].dtype}; its indices are {like.dtype}")
    return keys


def _read(where: Path) -> dict[str, Any]:
    """peftfn.json, its structure checked."""
    config = read_json(where)
    have = (config.get("format"), config.get("version")) if isinstance(config, dict) else (None, None)
    if have != ("peftfn", VERSION):
        raise ValueError(
            f"{where}: format {have[0]!r}, version {have[1]!r}; this release reads 'peftfn', version {VERSION}"
        )
    for key, kind in {"id": str, "rules": list, "constants": dict, "sites": dict}.items():
        if not isinstance(config.get(key), kind) or (not config[key] and key in ("rules", "sites")):
            raise ValueError(f"{where}: {key} is {str(config.get(key))[:80]}; it must be a {kind.__name__}, not empty")
    for rule in config["rules"]:
        if not (isinstance(rule, list) and len(rule) == 2 and isinstance(rule[0], str)):
            raise ValueError(f"{where}: rules has {str(rule)[:80]}; it must be a pattern and a method")
    for name, site in config["sites"].items():
        if not (isinstance(site, dict) and site.keys() == {"shape", "rule"} and isinstance(site["rule"], str)):
            raise ValueError(f"{where}: sites: {name} is {str(site)[:80]}; it must have a shape and a rule")
    for name, keys in config["constants"].items():
        if not (isinstance(keys, dict) and all(isinstance(k, str) for k in keys.values())):
            raise ValueError(f"{where}: constants: {name} is {str(keys)[:80]}; it must be name → key")
    if len({p for p, _ in config["rules"]}) != len(config["rules"]):
        raise ValueError(f"{where}: rules: a pattern occurs twice")
    checked(config.get("extra", {}), where)
    bases.checked(config.get("base", {}), config["sites"], where)
    return config


def _places(
    plan: Plan, constants: Mapping[str, Mapping[str, str]], file: Tensors, strict: bool
) -> tuple[dict[str, list[str]], set[str], set[str], dict[str, tuple[torch.Size, torch.Size]]]:
    """(the file's key → the path to its place in the adapter, missing keys, keys without a place, shapes of those of
    another shape).

    Raises ValueError for tensors that do not fit the plan, and, if strict, for missing and unexpected ones.
    """
    specs = {**{n: e.spec for n, e in plan.items()}, **plan.banks}
    places = {key: _path(key.removeprefix("adapter/"), specs) for key in file.meta if key.startswith("adapter/")}
    want_at = {f"adapter/{n}/{k}": (n, k) for n, spec in specs.items() for k in spec}
    want = want_at.keys()
    used = {key for keys in constants.values() for key in keys.values()}
    stray = {k for k in file.meta if k not in places and k not in used}
    tree: dict[str, Any] = {name: {} for name, spec in specs.items() if not spec}  # all they train is in a bank
    for key, path in places.items():
        _put(tree, path, file.meta[key], file.where)
    shapes = {k: (file.meta[k].shape, torch.Size(specs[want_at[k][0]][want_at[k][1]])) for k in want & places.keys()}
    wrong = {} if strict else {k: pair for k, pair in shapes.items() if pair[0] != pair[1]}
    try:
        plan.check(tree)
        missing, unexpected = set[str](), stray
    except (KeyError, ValueError, TypeError) as error:
        missing, unexpected = (want - places.keys()) | wrong.keys(), places.keys() - want | stray
        if not missing and not unexpected:
            raise ValueError(f"{file.where}: {error.args[0]}") from error
    if strict and (missing or unexpected):
        raise mismatch(file.where, missing, unexpected)
    for key in (want & places.keys()) - wrong.keys() if missing or unexpected - stray else ():
        name, k = places[key]
        file.check(key, specs[name][k])
    places = {key: place for key, place in places.items() if key not in wrong}
    return places, missing, unexpected, wrong


def _filled(
    model: Model, plan: Plan, constants: Mapping[str, Mapping[str, str]], file: Tensors, strict: bool
) -> Loaded:
    """The net and adapter of a plan without constants, with the file's tensors."""
    places, missing, unexpected, wrong = _places(plan, constants, file, strict)
    weights = model.weights | model.at(plan.places)
    devices = {n: w.device for n, w in weights.items()}
    devices |= {e.bank: devices[n] for n, e in plan.items() if e.bank}
    once: dict[tuple[str, torch.device], Tensor] = {}
    entries: dict[str, Entry] = {}
    for name, e in plan.items():
        frozen = {}
        for k, key in _constant_keys(name, e, constants, file).items():
            if (key, devices[name]) not in once:
                once[key, devices[name]] = on_mesh(file.tensor(key, devices[name], exact=True), weights[name])
            frozen[k] = once[key, devices[name]]
        entries[name] = dataclasses.replace(e, frozen=frozen)
    net = Adapted(model.root, Plan(entries, plan.rules, plan.banks))
    check_indices(net.plan, file.where)
    adapter: dict[str, Any] = net.init() if missing else {name: {} for name, e in plan.items() if not e.spec}
    for key, path in places.items():
        if key not in unexpected:
            _put(adapter, path, file.tensor(key, devices[path[0]], exact=True), file.where)
    net.plan.check(adapter)
    return Loaded(net, adapter, tuple(sorted(missing)), tuple(sorted(unexpected)), mismatched=wrong)


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

    name = data.get("method") if isinstance(data, dict) else data
    if not isinstance(data, dict) or not isinstance(name, str) or name not in registry:
        raise ValueError(
            f"{where}: unknown method {name!r}; known are {sorted(registry)}. Import the module that defines it."
        )
    cls = registry[name]
    for field in ("terms", "niter", "depth"):  # how often something is done
        if isinstance(n := data.get(field), int) and n > MOST:
            raise ValueError(f"{where}: {name}.{field} is {n}; at most {MOST} are read from files")
    try:
        return cls(**{k: value(v) for k, v in data.items() if k != "method"})
    except (ValueError, TypeError, AttributeError, ArithmeticError) as e:
        raise ValueError(f"{where}: {cls.__name__} does not accept the values in the file: {e}") from e


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for k, v in tree.items():
        if isinstance(v, Mapping):
            yield from _flat(v, f"{prefix}{k}/")
        else:
            yield f"{prefix}{k}", v


def _path(key: str, names: Mapping[str, Any]) -> list[str]:
    """A key of `_flat` as a path: the first part is one of the names, which may have a slash in it."""
    parts = key.split("/")
    for i in range(1, len(parts)):
        if (name := "/".join(parts[:i])) in names:
            return [name, *parts[i:]]
    return parts


def _put(tree: dict[str, Any], path: list[str], t: Tensor, where: Path) -> None:
    *folders, last = path
    for folder in folders:
        tree = tree.setdefault(folder, {})
        if not isinstance(tree, dict):
            raise ValueError(f"{where}: adapter/{'/'.join(path)} is below a tensor")
    if isinstance(tree.get(last), dict):
        raise ValueError(f"{where}: adapter/{'/'.join(path)} is a tensor, and others are below it")
    tree[last] = t
