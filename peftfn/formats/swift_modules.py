"""ms-swift's tuners around modules, to read: ADAPTER, SIDE and SCETuning.

A key is the module's name, the tuner's with the adapter's name, and the tensor's:
`layers.0.mlp.adapter_default.linear1.weight`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Size

from peftfn.core.method import Method
from peftfn.formats.binding import ACTIVATIONS, exactly, planned
from peftfn.formats.files import Loaded, Options, mismatch
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.modules.bottleneck import Bottleneck
from peftfn.methods.modules.scetuning import SCETuning
from peftfn.methods.modules.side import STEPS, Side
from peftfn.model.model import Model
from peftfn.net.net import Adapted


class Kind(NamedTuple):
    """One of ms-swift's tuners."""

    key: str  # what comes before the adapter's name
    names: Callable[[Mapping[str, Any]], dict[str, str]]  # configuration ↦ its tensors, under our names
    method: Callable[[Mapping[str, Any], Mapping[str, Size]], Method]  # (configuration, shapes) ↦ ours
    fixed: Mapping[str, tuple[Any, ...]]  # options that have these values alone here


def _two_layers(first: str, second: str) -> dict[str, str]:
    ends = {"weight": ("down", "up"), "bias": ("c", "b")}
    return {f"{n}.{end}": ours[i] for end, ours in ends.items() for i, n in enumerate((first, second))}


def _side(config: Mapping[str, Any]) -> dict[str, str]:
    if config.get("side_module_name", "fcn4") == "mlp":
        return {"alpha": "a", **_two_layers("side_net.fc1", "side_net.fc2")}
    names = {"alpha": "a", "side_net.fc.weight": "up", "side_net.fc.bias": "b"}
    for i in range(len(STEPS)):
        at = f"side_net.conv{i + 1}"
        names |= {f"{at}.0.weight": f"conv{i}", f"{at}.1.weight": f"gain{i}", f"{at}.1.bias": f"bias{i}"}
    return names


def _adapter(config: Mapping[str, Any], shapes: Mapping[str, Size]) -> Method:
    act = config.get("act_layer", "gelu")
    if act not in ACTIVATIONS:
        raise ValueError(f"act_layer is {act!r}; this release reads {', '.join(ACTIVATIONS)}")
    rank, dim = shapes["down"]
    return Bottleneck(rank, ACTIVATIONS[act], dim=dim)


def _scetuning(config: Mapping[str, Any], shapes: Mapping[str, Size]) -> Method:
    rank, dim = shapes["down"]
    mode: Literal["decoder", "encoder"] = "decoder" if config.get("tuner_mode", "decoder") == "decoder" else "encoder"
    ratio = float(config.get("down_ratio", 1.0))
    if int(ratio * dim) != rank:
        raise ValueError(f"down_ratio is {ratio}, and of {dim} channels its tensors have {rank}")
    return SCETuning(mode, ratio, dim)


KINDS = {
    "ADAPTER": Kind(
        "adapter",
        lambda c: _two_layers("linear1", "linear2"),
        _adapter,
        {"method_name": ("forward", None), "hidden_pos": (0, None)},
    ),
    "SIDE": Kind(
        "side",
        _side,
        lambda c, shapes: Side(c.get("side_module_name", "fcn4"), dim=shapes["up"][0]),
        {"side_module_name": ("mlp", "fcn4"), "source_hidden_pos": (0, None), "target_hidden_pos": (0, None)},
    ),
    "SCETuning": Kind(
        "scetuner",
        lambda c: _two_layers("tuner_op.ln1", "tuner_op.ln2"),
        _scetuning,
        {"tuner_mode": ("encoder", "decoder", "identity"), "tuner_op": ("SCEAdapter",)},
    ),
}
"""`swift_type` → how it is read."""


def load(config: Mapping[str, Any], file: Tensors, model: Model, where: Path, options: Options) -> Loaded:
    """The adapter of one of `KINDS`. ValueError for what the model, or this release, has no form for."""
    options.only(where)
    kind = KINDS[config["swift_type"]]
    for option, values in kind.fixed.items():
        if option in config and config[option] not in values:
            raise ValueError(f"{where}: {option} is {config[option]!r}; this release reads {values[0]!r}")
    names = kind.names(config)
    pattern = re.compile(rf"(?:(?P<at>.+)\.)?{kind.key}_(?P<name>[^.]+)\.(?P<rest>{'|'.join(map(re.escape, names))})")
    found: dict[str, dict[str, str]] = {}
    stray, adapters = [], set()
    for key in file.meta:
        if (m := pattern.fullmatch(key)) is None or (m["at"] or "") not in model.modules:
            stray.append(key)
            continue
        adapters.add(m["name"])
        found.setdefault(m["at"] or "", {})[names[m["rest"]]] = key
    missing = [f"{at}: {n}" for at, keys in found.items() for n in names.values() if n not in keys]
    if len(adapters) > 1:
        raise ValueError(f"{file.where}: its tensors are of several adapters: {', '.join(sorted(adapters))}")
    if not found or missing or (stray and options.strict):
        raise mismatch(file.where, missing or ([] if found else [f"…{kind.key}_…"]), stray)
    shapes = {at: {n: file.meta[k].shape for n, k in keys.items()} for at, keys in found.items()}
    try:
        rules = {exactly(at): kind.method(config, shapes[at]) for at in found}
    except (TypeError, ValueError) as e:
        raise ValueError(f"{where}: {e}") from e
    plan = planned(model, rules, where)
    adapter: dict[str, Any] = {}
    for at, entry in plan.items():
        for n, key in found[at].items():
            file.check(key, () if n == "a" else entry.spec[n])
        adapter[at] = {n: file.tensor(key).reshape(entry.spec[n]) for n, key in found[at].items()}
    return Loaded(Adapted(model.root, plan), adapter, unexpected=tuple(stray))
