"""PEFT's options for choosing modules, as rules: names, a regular expression, "all-linear", layers."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from peftfn.core.method import Method
from peftfn.methods.weights.trainabletokens import TrainableTokens
from peftfn.model.choice import Modules, matched, matches
from peftfn.model.model import Model
from peftfn.model.names import near
from peftfn.model.site import refuse_occupied
from peftfn.tools.target_table import OF_METHOD, USUAL


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
    """Return rules for `adapt` from what PEFT calls target_modules, exclude_modules, layers_to_transform, and so on.

    Args:
        model: the model to adapt.
        method: the method of every rule.
        modules: names, each of which takes the modules of that name and those that end in it after a dot; or one
            regular expression that must match a whole name; or "all-linear"; or a function of the name. None (and no
            `parameters`): the modules that PEFT adapts by default in a model of this `model.config.model_type`.
        exclude: modules to leave out, written as `modules`.
        layers: indices of layers to keep: the number after `layers_pattern`, or else the first number in the name.
        layers_pattern: the name, or names, before a layer's index ("layers", "h").
        parameters: parameters that are not the weight of a layer (experts), by suffix.
        rank_pattern, alpha_pattern: name or regular expression → value, for the modules whose name it matches to the
            end, from the start or from a dot on; the first match counts.

    Returns:
        {pattern: method}, one rule for each rank and alpha.

    Raises:
        ValueError: `modules`, a name in `exclude`, or a key of a pattern matches no module; or a module belongs to an
            adapter that another library put into the model, or to a parametrization, and is not named itself.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        rules = pf.targets(model, pf.LoRA(rank=2), ["0"])
        net = pf.adapt(model, rules)
    """
    inputs: list[str] = []
    known = Model.of(model)
    names = [n for n in known.distinct if n]
    if modules is None and not parameters:
        modules, inputs = defaults(known, method)
    chosen = matched(known, modules, exclude, layers, layers_pattern) if modules is not None else []
    first: dict[int, str] = {}  # tensor → its first name
    for name, p in known.parameters.items():
        first.setdefault(id(p), name)
    params = [n for n in first.values() if any(n == p or n.endswith(f".{p}") for p in parameters)]
    if not chosen and not params:
        raise ValueError(
            f"targets: {modules or list(parameters)!r} matches no module of the model{near(str(modules), names)}"
        )
    _refuse_unused(names, exclude, {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}, [*chosen, *params])
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
                f"targets: {type(method).__name__} has no {sorted(odd)[0]}, which a pattern sets at {name}"
            )
        own = replace(method, **given, **({"feedforward": True} if inputs and matches(inputs, name) else {}))
        rules.setdefault(own, []).append(re.escape(name) + ("" if name in params else r"\.(weight|in_proj_weight)"))
    return {f"^({'|'.join(names)})$": m for m, names in rules.items()}


def _refuse_unused(
    names: list[str], exclude: Modules | None, patterns: Mapping[str, Mapping[str, Any] | None], chosen: list[str]
) -> None:
    """ValueError for a name in `exclude` that matches no module, and for a pattern's key that matches no chosen one."""
    given = [exclude] if isinstance(exclude, str) else [] if exclude is None or callable(exclude) else list(exclude)
    whole = isinstance(exclude, str)
    for name in given:
        if name.lower() != "all-linear" and not any(matches(name if whole else [name], n) for n in names):
            raise ValueError(f"targets: exclude has {name!r}, which matches no module of the model{near(name, names)}")
    for pattern, keys in patterns.items():
        for key in keys or {}:
            if not any(_first({key: True}, n) for n in chosen):
                raise ValueError(
                    f"targets: {pattern} has {key!r}, which matches none of the {len(chosen)} chosen modules"
                    f"{near(key, chosen)}"
                )


def defaults(model: Model, method: Method) -> tuple[Modules, list[str]]:
    """(modules, those of them whose inputs IA3 scales) that PEFT adapts with this method if one names none."""
    if isinstance(method, TrainableTokens):
        inner = getattr(model.root, "get_input_embeddings", lambda: None)()
        return [next((n for n, m in model.distinct.items() if m is inner), "embed_tokens")], []
    kind, name = getattr(getattr(model.root, "config", None), "model_type", None), type(method).__name__
    found = OF_METHOD.get(name, {}).get(str(kind))
    if found is None and name == "OSF":
        return "all-linear", []
    found = found or USUAL.get(str(kind))
    if found is None:
        raise ValueError(
            f"targets: no default modules for a model of type {kind!r}; name them, or pass modules='all-linear'"
        )
    if found.startswith(".*"):
        return found, []
    return found.replace("*", "").split(), [n.removesuffix("*") for n in found.split() if n.endswith("*")]


def _first(pattern: Mapping[str, Any] | None, name: str) -> Any:
    """PEFT's lookup: the value of the first key that matches the name to its end, from the start or after a dot."""
    return next((v for k, v in (pattern or {}).items() if re.match(rf"(.*\.)?({k})$", name)), None)
