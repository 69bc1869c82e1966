"""PEFT configuration keys that are not about the method: the model it is for, and when the adapter acts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peftfn.core.fields import MOST_ROUNDS
from peftfn.core.plan import Plan
from peftfn.methods.weights.alora import ALoRA
from peftfn.methods.weights.lora import LoRA
from peftfn.model.model import Model
from peftfn.model.structure import lasting_copy
from peftfn.net.net import Adapted

INVOCATION, REPLICATION = "alora_invocation_tokens", "layer_replication"
EVERY = frozenset({"task_type", "base_model_name_or_path", "revision", "auto_mapping"})
"""Keys that all of PEFT's types have."""
OF_TYPES = {
    "tokenizer_name_or_path": frozenset({"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"}),
    "auxiliary_loss_weight": frozenset({"SHADOW"}),
}
"""Key → the types that have it."""
KEYS = EVERY | OF_TYPES.keys() | {INVOCATION, REPLICATION}
_KINDS: dict[str, tuple[type, ...]] = {"auto_mapping": (dict,), "auxiliary_loss_weight": (float, int)}
"""Key → what its value may be; a str where nothing is said."""


def told(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """What a configuration says that is not about the method, under the keys that its type has."""
    kind = config["peft_type"]
    found = {k: config[k] for k in sorted(KEYS & config.keys()) if kind in OF_TYPES.get(k, (kind,))}
    found = {k: v for k, v in found.items() if v or type(v) in (int, float)}  # a weight of 0 says something
    _check_kinds({k: v for k, v in found.items() if k not in (INVOCATION, REPLICATION)}, where)
    return found


def taken(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """Remove and return the keys that are not about the method. ValueError for what would change outputs silently."""
    extra = told(config, where)
    config.pop(REPLICATION, None)
    if config.get("arrow_config"):
        raise ValueError(
            f"{where}: arrow_config makes this a router over other adapters, and its tensors have no effect: load "
            "the adapters that it routes to, each from its folder, and weigh them with net.gated"
        )
    tokens = extra.get(INVOCATION)
    if tokens is None:
        config.pop(INVOCATION, None)
        return extra
    if not isinstance(tokens, list) or not all(type(t) is int and t >= 0 for t in tokens):
        raise ValueError(f"{where}: {INVOCATION} is {str(tokens)[:80]}; it must be a list of token ids")
    return extra


def check_gated(plan: Plan, where: object) -> None:
    """ValueError where PEFT's activated LoRA would act on all tokens, or differently."""
    for name, entry in plan.items():
        if type(entry.method) not in (LoRA, ALoRA) or entry.site.kind not in ("linear", "linear_t"):
            raise ValueError(
                f"{where}: {INVOCATION} is for LoRA at linear layers; {name} ({entry.site.kind}) has {entry.method}, "
                "which PEFT does not gate: save the two as separate adapters"
            )


def replicate(model: nn.Module, spans: Sequence[Sequence[int]]) -> nn.Module:
    """Return a deeper model, made of a model's own layers, whose copies an adapter tells apart.

    It shares all parameters with the model and stores nothing twice, while each of its layers has a site, and so an
    adapter, of its own: PEFT's `layer_replication`. `save` writes the spans into its files, and `load` makes the same
    of the plain model.

    Args:
        model: a Llama-like (`layers`), BERT-like (`encoder.layer`) or Falcon-like (`h`) model. It stays as it is.
        spans: pairs [start, end) of layers, one after the other: [[0, 4], [2, 5]] are layers 0 1 2 3 2 3 4.

    Returns:
        The deeper model.

    Raises:
        ValueError: the model has no list of layers, or a span is not within it.

    Example:
        from transformers import LlamaConfig, LlamaForCausalLM
        sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_attention_heads=2)
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2))
        deep = pf.replicate(model, [[0, 2], [1, 2]])  # layers 0 1 1
        net = pf.adapt(deep, {"q_proj": pf.LoRA(rank=2)})
        assert len(net.plan) == 3
    """
    return replicated(Model.of(model), [list(s) for s in spans], "replicate").root


def replicated(model: Model, spans: Any, where: object) -> Model:
    """A copy of the model whose layers are those of the spans [start, end), one after the other, as PEFT's
    `replicate_layers` makes them. It shares the storage of all parameters. Such a copy is returned unchanged.

    Llama-like models have their layers in `layers`, BERT-like ones in `encoder.layer`, Falcon-like ones in `h`.
    """
    if repetition(model.root) == {REPLICATION: spans}:
        return model
    copy: Any = lasting_copy(model.root)
    inner = copy
    while hasattr(inner, "model"):
        inner = inner.model
    inner = getattr(inner, "bert", inner)
    places = (inner, "layers"), (getattr(inner, "encoder", None), "layer"), (inner, "h")
    home, name = next(((h, n) for h, n in places if hasattr(h, n)), (None, ""))
    layers = getattr(home, name, None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{where}: {REPLICATION} repeats layers, and this model has no layers, encoder.layer or h")
    count = len(layers)
    if not isinstance(spans, list) or not all(
        isinstance(s, list) and [type(i) for i in s] == [int, int] and 0 <= s[0] < s[1] <= count for s in spans
    ):
        raise ValueError(f"{where}: {REPLICATION} is {str(spans)[:80]}; give spans [start, end) of {count} layers")
    sources = [i for start, end in spans[:MOST_ROUNDS] for i in range(start, end)]
    if len(sources) > MOST_ROUNDS or len(spans) > MOST_ROUNDS:
        raise ValueError(
            f"{where}: {REPLICATION} makes {len(sources)} layers; at most {MOST_ROUNDS} are read from files"
        )
    config: Any = getattr(inner, "config", None)
    if hasattr(config, "num_hidden_layers"):
        config.num_hidden_layers = len(sources)
    if isinstance(kinds := getattr(config, "layer_types", None), list) and len(kinds) == count:
        config.layer_types = [kinds[i] for i in sources]
    made = nn.ModuleList(lasting_copy(layers[i]) for i in sources)
    for i, layer in enumerate(made):
        numbered: list[Any] = [m for m in layer.modules() if hasattr(m, "layer_idx")]
        for module in numbered:
            module.layer_idx = i
    setattr(home, name, made)
    copy._peft_replication = spans
    return Model.of(copy)


def given(extra: Mapping[str, Any] | None, net: Adapted) -> dict[str, Any]:
    """What `save` puts into the configuration. ValueError for keys that are not about this, and for a net that they do
    not go with."""
    extra = {**(extra or {}), **repetition(net.model)}
    if odd := sorted(extra.keys() - KEYS):
        raise ValueError(f"save: extra has {odd[0]!r}; it may have {', '.join(sorted(KEYS))}")
    if extra.get(INVOCATION):
        check_gated(net.plan, "save")
    return extra


def check_type(extra: Mapping[str, Any], kind: str) -> None:
    """ValueError for a key that PEFT's type does not have: PEFT would leave it out."""
    if odd := next((k for k in extra if kind not in OF_TYPES.get(k, (kind,))), None):
        raise ValueError(f"save: extra has {odd!r}, which is of {', '.join(sorted(OF_TYPES[odd]))}, and this is {kind}")


def about(model: nn.Module) -> dict[str, Any]:
    """What a configuration says of the model by itself: its name, and its class and library, by which PEFT's
    AutoPeftModel finds it."""
    cls, name = type(model), getattr(model, "name_or_path", None)
    found: dict[str, Any] = {"auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__}}
    return found | ({"base_model_name_or_path": name} if isinstance(name, str) and name else {})


def task_of(model: nn.Module) -> str | None:
    """PEFT's task_type for a model of transformers, by its class; None if it has a class of its own.

    PEFT chooses the class that puts virtual tokens in front of an input by it: a file without one loads as the base.
    """
    if not hasattr(model, "config") or not type(model).__module__.startswith("transformers."):
        return None
    from transformers.models.auto import modeling_auto

    for task, mapping in _CLASSES.items():
        names = getattr(modeling_auto, f"MODEL_{mapping}MAPPING_NAMES").values()
        if any(type(model).__name__ in ([name] if isinstance(name, str) else name) for name in names):
            return task
    return None


_CLASSES = {  # in this order: some classes are in two
    "SEQ_2_SEQ_LM": "FOR_SEQ_TO_SEQ_CAUSAL_LM_",
    "SEQ_CLS": "FOR_SEQUENCE_CLASSIFICATION_",
    "TOKEN_CLS": "FOR_TOKEN_CLASSIFICATION_",
    "QUESTION_ANS": "FOR_QUESTION_ANSWERING_",
    "CAUSAL_LM": "FOR_CAUSAL_LM_",
    "FEATURE_EXTRACTION": "",
}
"""task_type → part of the name of transformers' table of classes."""


def checked(extra: Any, where: Path) -> dict[str, Any]:
    """The keys that are not about the method, from a file. ValueError for others, or for values of another kind."""
    if not isinstance(extra, dict) or (odd := extra.keys() - KEYS):
        what = str(extra if not isinstance(extra, dict) else sorted(odd))[:80]
        raise ValueError(f"{where}: extra has {what}; it may have {', '.join(sorted(KEYS))}")
    _check_kinds(extra, f"{where}: extra")
    return extra


def _check_kinds(extra: Mapping[str, Any], where: object) -> None:
    for key, value in extra.items():
        kinds = (list,) if key == INVOCATION else _KINDS.get(key, (str,))
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"{where}: {key} is {str(value)[:80]}; it must be a {kinds[0].__name__}")


def repetition(model: nn.Module) -> dict[str, Any]:
    """{"layer_replication": spans} of a model that `replicated` made; {} of any other."""
    return {REPLICATION: model._peft_replication} if hasattr(model, "_peft_replication") else {}
