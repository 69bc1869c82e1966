"""PEFT's way to say which modules are adapted, as rules: names, a regular expression, "all-linear", layers."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from peftfn.core.method import Method
from peftfn.model.names import near
from peftfn.model.site import refuse_occupied
from peftfn.tensors.quantised import quantised
from peftfn.tools.target_table import OF_METHOD, USUAL

Modules = str | Iterable[str] | Callable[[str], bool]
"""Names of modules; a regular expression that matches whole names, or "all-linear"; or a function of the name."""


def targets(
    model: nn.Module,
    method: Method,
    modules: Modules | None = None,
    *,
    exclude: Modules | None = None,
    layers: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
    parameters: Iterable[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
) -> dict[str, Method]:
    """Rules for `adapt` from what PEFT calls target_modules, exclude_modules, layers_to_transform, and so on.

    Args:
        modules: names, each of which takes the modules of that name and those that end in it after a dot; or one
            regular expression that must match a whole name; or "all-linear"; or a function of the name. Without it (and
            without `parameters`), what PEFT adapts in a model of this `model.config.model_type`.
        exclude: modules to leave out, written as `modules`.
        layers: indices of layers to keep, the number after `layers_pattern`, or the first number in the name.
        parameters: parameters that are no layer's weight (experts), by suffix.
        rank_pattern, alpha_pattern: name or regular expression → value, for the modules whose name it matches to the
            end, from the start or from a dot on; the first that matches counts.

    Raises:
        ValueError: nothing is found; or what is found belongs to an adapter that another library put into the model, or
            to a parametrization, and is not named itself.
    """
    inputs: list[str] = []
    if modules is None and not parameters:
        modules, inputs = defaults(model, method)
    chosen = matched(model, modules, exclude, layers, layers_pattern) if modules is not None else []
    params = [n for n, _ in model.named_parameters() if any(n == p or n.endswith(f".{p}") for p in parameters)]
    if not chosen and not params:
        names = [n for n, _ in model.named_modules() if n]
        raise ValueError(
            f"targets: {modules or list(parameters)!r} takes no module of the model{near(str(modules), names)}"
        )
    words = [modules] if isinstance(modules, str) else [] if modules is None or callable(modules) else modules
    named = " ".join([*words, *parameters])
    for name in chosen:
        occupied = "weight" in getattr(model.get_submodule(name), "parametrizations", ())
        refuse_occupied(model, f"{name}.{'parametrizations.weight.original' if occupied else 'weight'}", named)
    for name in params:
        refuse_occupied(model, name, named)
    rules: dict[Method, list[str]] = {}
    for name in (*chosen, *params):
        rank, alpha = _first(rank_pattern, name), _first(alpha_pattern, name)
        given = {k: v for k, v in (("rank", rank), ("alpha", alpha)) if v is not None}
        odd = given.keys() - {f.name for f in fields(method)}
        if odd:
            raise ValueError(
                f"targets: {type(method).__name__} has no {sorted(odd)[0]}, which a pattern gives at {name}"
            )
        own = replace(method, **given, **({"feedforward": True} if inputs and _matches(inputs, name) else {}))
        rules.setdefault(own, []).append(re.escape(name) + ("" if name in params else r"\.(weight|in_proj_weight)"))
    return {f"^({'|'.join(names)})$": m for m, names in rules.items()}


def defaults(model: nn.Module, method: Method) -> tuple[Modules, list[str]]:
    """(modules, those of them whose inputs IA3 scales) that PEFT adapts with this method if one names none."""
    kind, name = getattr(getattr(model, "config", None), "model_type", None), type(method).__name__
    found = OF_METHOD.get(name, {}).get(str(kind)) or USUAL.get(str(kind))
    if found is None:
        raise ValueError(
            f"targets: no default modules for a model of type {kind!r}; name them, or say modules='all-linear'"
        )
    if found.startswith(".*"):
        return found, []
    return found.replace("*", "").split(), [n.removesuffix("*") for n in found.split() if n.endswith("*")]


def matched(
    model: nn.Module,
    modules: Modules,
    exclude: Modules | None = None,
    layers: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
) -> list[str]:
    """Names of the modules that PEFT adapts."""
    names = [n for n, _ in model.named_modules() if n]
    if isinstance(modules, str) and modules.lower() == "all-linear":
        hits = linears(model)
    else:
        hits = [n for n in names if _matches(modules, n)]
    if exclude:
        hits = [n for n in hits if not _matches(exclude, n)]
    if layers is None:
        return hits
    if callable(modules) or (isinstance(modules, str) and modules.lower() != "all-linear"):
        raise ValueError("targets: layers goes with names; a regular expression says the layers itself")
    wanted = {layers} if isinstance(layers, int) else set(layers)
    lists = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or ())
    return [n for n in hits if _layer(n, lists) in wanted]


def linears(model: nn.Module) -> list[str]:
    """PEFT's "all-linear": every nn.Linear and Conv1D except the output embedding of a transformers model.

    A classification head is one of them: exclude it by name (PEFT does so where task_type is SEQ_CLS).
    """
    out = getattr(model, "get_output_embeddings", lambda: None)()
    hits = []
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or any(c.__name__ == "Conv1D" for c in type(module).__mro__)
        linear = linear or quantised(module) is not None
        if linear and name and module is not out:
            hits.append(name)
    return hits


def _matches(wanted: Modules, name: str) -> bool:
    if callable(wanted):
        return wanted(name)
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == w or name.endswith(f".{w}") for w in wanted)


def _layer(name: str, lists: list[str]) -> int | None:
    """The layer's number in a module's name."""
    for pattern in lists:
        if m := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", name):
            return int(m[1])
    m = None if lists else re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return int(m[1]) if m else None


def _first(pattern: Mapping[str, Any] | None, name: str) -> Any:
    """PEFT's lookup: the value of the first key that matches the name to its end, from the start or after a dot."""
    return next((v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", name)), None)
