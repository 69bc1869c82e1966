"""AdapterHub's heads: under the model's own names, or flexible ones, `heads.NAME.i.weight`, where i counts what is
between the linear layers too. `head_config.json` says what a flexible head is."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peftfn.formats.files import read_json
from peftfn.formats.tensor_files import Tensors as File
from peftfn.model.model import Model

_KEY = re.compile(r"heads\.(?P<name>[^.]+)\.(?P<i>\d+)\.(?P<what>weight|bias)")


class Flexible(NamedTuple):
    """What a flexible head computes."""

    kind: str
    layers: int = 1
    between: str | None = None  # the activation between two layers
    pooled: bool = False  # whether it begins with what the model's pooler returns

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Flexible":
        layers = int(config.get("layers", 1))
        between = config.get("activation_function") if layers > 1 else None
        return cls(str(config.get("head_type")), layers, between, bool(config.get("use_pooler", False)))


_FIRST = Flexible("classification", 2, "tanh")
"""The package's default head of a sequence: a tanh layer of the first token, and a linear one."""
_FORMS: dict[str, dict[Flexible, tuple[str, ...]]] = {
    "BertForSequenceClassification": {
        Flexible("classification", pooled=True): ("classifier",),
        _FIRST: ("bert.pooler.dense", "classifier"),
    },
    "RobertaForSequenceClassification": {_FIRST: ("classifier.dense", "classifier.out_proj")},
    "XLMRobertaForSequenceClassification": {_FIRST: ("classifier.dense", "classifier.out_proj")},
    "DistilBertForSequenceClassification": {
        Flexible("classification", 2, "relu"): ("pre_classifier", "classifier"),
    },
    **{
        f"{kind}ForTokenClassification": {Flexible("tagging"): ("classifier",)}
        for kind in ("Bert", "Roberta", "XLMRoberta", "DistilBert")
    },
    **{
        f"{kind}ForQuestionAnswering": {Flexible("question_answering"): ("qa_outputs",)}
        for kind in ("Bert", "Roberta", "XLMRoberta", "DistilBert")
    },
}
"""A model's class → a flexible head that it can have → the modules that are its linear layers."""


def fitted(file: File, config: Path, model: Model, strict: bool) -> dict[str, str]:
    """parameter → key of what the model has a place for. ValueError for a flexible head whose sizes the model's head
    does not have, and for one of another form unless it may be left out (strict=False)."""
    keys = _flexible(file, config, model, strict) or {k: model.named[k].name for k in file.meta if k in model.named}
    return {n: k for k, n in keys.items() if model.weights[n].shape == file.meta[k].shape}


def _flexible(file: File, config: Path, model: Model, strict: bool) -> dict[str, str]:
    """key → parameter of a flexible head; nothing for another."""
    found = {k: m for k in file.meta if (m := _KEY.fullmatch(k)) is not None}
    if not found or not config.is_file():
        return {}
    head = Flexible.of(dict(read_json(config).get("config") or {}))
    kind = type(model.root).__name__
    modules = _FORMS.get(kind, {}).get(head)
    if modules is None and not strict:
        return {}
    if modules is None:
        classes = [c for c, forms in _FORMS.items() if head in forms]
        cure = f"load it into a {' or a '.join(classes)}, or give" if classes else "give"
        raise ValueError(
            f"{config}: its head is {head}, which a {kind} has no place for: {cure} strict=False, which leaves it out"
        )
    numbers = sorted({int(m["i"]) for m in found.values()})
    own = dict(zip(numbers, modules, strict=False))
    keys = {k: f"{own.get(int(m['i']))}.{m['what']}" for k, m in found.items()}
    wanted = {f"{n}.{what}" for n in modules for what in ("weight", "bias")}
    if len(numbers) != len(modules) or set(keys.values()) != wanted:
        raise ValueError(
            f"{file.where}: its head has {sorted(found)}, and {head} has {len(modules)} layers with biases"
        )
    for k, n in keys.items():
        if (need := model.weights[n].shape) != file.meta[k].shape:
            raise ValueError(
                f"{file.where}: {k} has shape {list(file.meta[k].shape)}, and the model's {n} {list(need)}: make the "
                f"model with num_labels={file.meta[k].shape[0]}"
            )
    return keys
