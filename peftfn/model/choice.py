"""Which modules of a model PEFT's target_modules, exclude_modules and layers_to_transform find."""

import re
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from peftfn.model.model import Model
from peftfn.tensors.quantised import QuantisedWeight

Modules = str | Iterable[str] | Callable[[str], bool]
"""Names of modules; a regular expression that matches whole names, or "all-linear"; or a function of the name."""

_CLASSIFIER = ("classifier", "score")
HEADS = {"SEQ_CLS": _CLASSIFIER, "TOKEN_CLS": _CLASSIFIER, "QUESTION_ANS": ("qa_outputs",)}
"""PEFT's task type → the names of the heads that it trains whole along with any method, if the model has them."""


def matched(
    model: Model,
    modules: Modules,
    exclude: Modules | None = None,
    layers: int | Iterable[int] | None = None,
    layers_pattern: str | Iterable[str] | None = None,
    called: Mapping[str, str] | None = None,
) -> list[str]:
    """Names of the modules that PEFT adapts.

    called: module → the name that the choice knows it by; a module that it lacks is not chosen. Without it, names are
    the model's.
    """
    names = {n: n for n in model.distinct if n} if called is None else called
    if isinstance(modules, str) and modules.lower() == "all-linear":
        hits = [n for n in linears(model) if n in names]
    else:
        hits = [n for n, name in names.items() if matches(modules, name)]
    if exclude:
        hits = [n for n in hits if not matches(exclude, names[n])]
    if layers is None:
        return hits
    if callable(modules) or (isinstance(modules, str) and modules.lower() != "all-linear"):
        raise ValueError("targets: layers goes with names; a regular expression says the layers itself")
    wanted = {layers} if isinstance(layers, int) else set(layers)
    lists = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or ())
    return [n for n in hits if _layer(names[n], lists) in wanted]


def linears(model: Model) -> list[str]:
    """PEFT's "all-linear": every nn.Linear and Conv1D except the output embedding of a transformers model.

    A classification head is one of them: `targets(…, task=)` leaves it out, as PEFT does.
    """
    out = getattr(model.root, "get_output_embeddings", lambda: None)()
    hits = []
    for name, module in model.distinct.items():
        linear = isinstance(module, nn.Linear) or any(c.__name__ == "Conv1D" for c in type(module).__mro__)
        linear = linear or isinstance(model.weights.get(f"{name}.weight"), QuantisedWeight)
        if linear and name and module is not out:
            hits.append(name)
    return hits


def norms(model: Model) -> list[str]:
    """Every normalisation layer that has parameters: by its class's name, and by parameters that are all vectors."""
    return [
        name
        for name, module in model.distinct.items()
        if name
        and any("Norm" in c.__name__ for c in type(module).__mro__)
        and (own := [p for p in module.parameters() if p is not None])
        and all(p.dim() == 1 for p in own)
    ]


def matches(wanted: Modules, name: str) -> bool:
    """Whether a choice of modules takes the module of this name."""
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
