"""PEFT's options for choosing modules, as rules: names, a regular expression, "all-linear", layers."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from torch import nn

from peftfn.core.method import Method
from peftfn.core.numbers import checks_numbers
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.trainabletokens import TrainableTokens
from peftfn.model.choice import HEADS, Modules, matched, matches, norms
from peftfn.model.model import Model
from peftfn.model.names import near
from peftfn.model.site import refuse_occupied
from peftfn.tools.target_table import OF_METHOD, USUAL

TASKS = (*HEADS, "CAUSAL_LM", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION")


@checks_numbers
def targets(
    model: nn.Module,
    method: Method,
    modules: Modules | None = None,
    *,
    exclude: Modules | None = None,
    layers: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
    parameters: str | Iterable[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    patterns: Mapping[str, Mapping[str, Any]] | None = None,
    task: str | None = None,
) -> dict[str, Method]:
    """Return rules for `adapt` from what PEFT calls target_modules, exclude_modules, layers_to_transform, and so on.

    Args:
        model: the model to adapt.
        method: the method of every rule.
        modules: names, each of which takes the modules of that name and those that end in it after a dot; or one
            regular expression that must match a whole name; or "all-linear"; or "norms", the weights and biases of
            every normalisation layer; or a function of the name. None (and no `parameters`): the modules that PEFT
            adapts by default in a model of this `model.config.model_type`.
        exclude: modules to leave out, written as `modules`.
        layers: indices of layers to keep: the number after `layers_pattern`, or else the first number in the name.
        layers_pattern: the name, or names, before a layer's index ("layers", "h").
        parameters: parameters that are not the weight of a layer (experts), by suffix.
        rank_pattern, alpha_pattern: name or regular expression → value, for the modules whose name it matches to the
            end, from the start or from a dot on; the first match counts.
        patterns: the same for any field of the method: {"block_size": {"q_proj": 4}}.
        task: PEFT's task type. "SEQ_CLS" and "TOKEN_CLS" train the head in full (`Full` at `classifier` or `score`),
            and "QUESTION_ANS" that at `qa_outputs`; `method` leaves it out. "CAUSAL_LM", "SEQ_2_SEQ_LM" and
            "FEATURE_EXTRACTION" have no head of their own.

    Returns:
        {pattern: method}, one rule for each combination of values, after one for the task's head.

    Raises:
        ValueError: `modules`, a name in it or in `exclude`, or a key of a pattern matches no module; the method has no
            such field; the task is none of these, or the model has no such head; or a module belongs to an adapter
            that another library put into the model, or to a parametrization, and is not named itself.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2))
        rules = pf.targets(model, pf.LoRA(rank=2), ["0"])
        net = pf.adapt(model, rules)
    """
    if not isinstance(method, Method):
        raise TypeError(
            f"targets takes (model, method, modules), and the second argument is a {type(method).__name__}: write "
            "peftfn.targets(model, peftfn.LoRA(rank=8), ['q_proj', 'v_proj'])"
        )
    parameters = [parameters] if isinstance(parameters, str) else list(parameters)
    layers = layers if layers is None or isinstance(layers, int) else list(layers)
    inputs: list[str] = []
    known = Model.of(model)
    names = [n for n in known.distinct if n]
    values = _values(method, rank_pattern, alpha_pattern, patterns)
    heads = _heads(names, task)
    words, all_norms = _words(modules), norms(known) if modules == "norms" else None
    if not isinstance(modules, str):
        _refuse_missing("modules", words, names)
    if modules is None and not parameters:
        modules, inputs = defaults(known, method)
    elif modules is not None:
        modules = all_norms or (words if words and not isinstance(modules, str) else modules)
    chosen = matched(known, modules, exclude, layers, layers_pattern) if modules is not None else []
    chosen = [n for n in chosen if all_norms is None or n in all_norms]
    chosen = [n for n in chosen if not any(n == h or n.startswith(f"{h}.") for h in heads)]
    first: dict[int, str] = {}  # tensor → its first name
    for name, p in known.parameters.items():
        first.setdefault(id(p), name)
    params = [n for n in first.values() if any(n == p or n.endswith(f".{p}") for p in parameters)]
    if not chosen and not params:
        if layers is not None and modules is not None and matched(known, modules, exclude):
            raise ValueError(f"targets: layers is {layers}, and {modules!r} matches no module in such a layer")
        raise ValueError(
            f"targets: {modules or list(parameters)!r} matches no module of the model{_cure(modules, names)}"
        )
    if exclude is not None and not callable(exclude):
        _refuse_missing("exclude", exclude, names)
    _refuse_unused(values, [*chosen, *params])
    named = " ".join([*words, *parameters])
    for name in chosen:
        occupied = "weight" in getattr(model.get_submodule(name), "parametrizations", ())
        refuse_occupied(model, f"{name}.{'parametrizations.weight.original' if occupied else 'weight'}", named)
    for name in params:
        refuse_occupied(model, name, named)
    rules: dict[Method, list[str]] = {}
    ends = r"\.(weight|bias)" if all_norms else r"\.(weight|in_proj_weight)"
    for name in (*chosen, *params):
        own = {f: v for f, keys in values.items() if (v := _first(keys, name)) is not None}
        own |= {"feedforward": True} if inputs and matches(inputs, name) else {}
        rules.setdefault(replace(method, **own), []).append(re.escape(name) + ("" if name in params else ends))
    whole: dict[str, Method] = {rf"^({'|'.join(map(re.escape, heads))})\.": Full()} if heads else {}
    return whole | {f"^({'|'.join(names)})$": m for m, names in rules.items()}


def _words(modules: Modules | None) -> list[str]:
    """What a choice of modules spells out."""
    return [modules] if isinstance(modules, str) else [] if modules is None or callable(modules) else list(modules)


def _values(
    method: Method,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    patterns: Mapping[str, Mapping[str, Any]] | None,
) -> dict[str, Mapping[str, Any]]:
    """{field: {name: value}}. ValueError for a field that the method does not have."""
    values: dict[str, Mapping[str, Any]] = {}
    given = {"rank": rank_pattern or {}, "alpha": alpha_pattern or {}}
    for field, keys in [*given.items(), *(patterns or {}).items()]:
        if keys and field in values:
            raise ValueError(f"targets: patterns has {field!r}, and so has {field}_pattern: give one of them")
        if keys:
            values[field] = keys
    known = [f.name for f in fields(method)]
    for field in values:
        if field not in known:
            raise ValueError(f"targets: {type(method).__name__} has no {field}, which a pattern sets; it has {known}")
    return values


def _heads(names: list[str], task: str | None) -> list[str]:
    """The modules that a task trains in full."""
    if task is None:
        return []
    if task not in TASKS:
        raise ValueError(f"targets: task is {task!r}; it must be one of {', '.join(TASKS)}")
    wanted = HEADS.get(task, ())
    found = [n for n in names if matches(wanted, n)]
    outer = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    if wanted and not outer:
        raise ValueError(
            f"targets: a model for {task} has its head at {' or '.join(wanted)}, and this one has no module of that "
            f"name; name its head in a rule of its own: {{'head': peftfn.Full(), **peftfn.targets(…)}}"
        )
    return outer


def _refuse_missing(what: str, given: str | Iterable[str], names: list[str]) -> None:
    """ValueError for a name, or the one regular expression, that matches no module."""
    whole = isinstance(given, str)
    for name in [given] if isinstance(given, str) else given:
        if name.lower() != "all-linear" and not any(matches(name if whole else [name], n) for n in names):
            raise ValueError(
                f"targets: {what} has {name!r}, which matches no module of the model"
                f"{_cure(name if whole else [name], names)}"
            )


def _cure(wanted: Modules | None, names: list[str]) -> str:
    """What to write for a choice that matches no module."""
    if isinstance(wanted, str) and any(matches([wanted], n) for n in names):
        return f": a string is one regular expression, which a whole name must match; for a name, give [{wanted!r}]"
    words = [wanted] if isinstance(wanted, str) else wanted
    return near(" ".join(words), names) if isinstance(words, list) else ""


def _refuse_unused(values: Mapping[str, Mapping[str, Any]], chosen: list[str]) -> None:
    """ValueError for a pattern's key that matches no chosen module."""
    for field, keys in values.items():
        what = f"{field}_pattern" if field in ("rank", "alpha") else f"patterns[{field!r}]"
        for key in keys:
            if not any(_first({key: True}, n) for n in chosen):
                raise ValueError(
                    f"targets: {what} has {key!r}, which matches none of the {len(chosen)} chosen modules"
                    f"{near(key, chosen)}"
                )


def defaults(model: Model, method: Method) -> tuple[Modules, list[str]]:
    """(modules, those of them whose inputs IA3 scales) that PEFT adapts with this method if one names none."""
    if isinstance(method, TrainableTokens):
        inner = getattr(model.root, "get_input_embeddings", lambda: None)()
        return [next((n for n, m in model.distinct.items() if m is inner), "embed_tokens")], []
    config, name = getattr(model.root, "config", None), type(method).__name__
    kind = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
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
