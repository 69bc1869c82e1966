"""Base and adapter by one path: the base that an adapter's configuration names, and the adapter bound to it."""

import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from peftfn.formats import hub, load, native, native_tensors, peft, swift
from peftfn.formats.facts import described
from peftfn.formats.files import Loaded, read_json
from peftfn.formats.tensor_files import opened

TOKENIZER = "tokenizer_config.json"
_SHARED = frozenset({"token", "cache_dir", "local_files_only", "force_download", "proxies"})
"""Arguments of the hub's that `from_pretrained` takes too."""
_AROUND = r"base_layer\.|token_adapter\.|ln_tuning_layers\.|modules_to_save\."
"""What PEFT puts between a layer and its weight."""
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""PEFT's task_type → transformers' class."""


def load_model(
    path: str | PathLike[str],
    *,
    model: str | PathLike[str] | None = None,
    cls: Any = None,
    subfolder: str | None = None,
    revision: str | None = None,
    hub_options: Mapping[str, Any] | None = None,
    adapter_options: Mapping[str, Any] | None = None,
    **pretrained: Any,
) -> Loaded:
    """Read an adapter together with the base model that it names.

    The base is `base_model_name_or_path` of the adapter's configuration, at its `revision`. Its class is the one that
    the adapter was made of (`auto_mapping`), or the one for its `task_type`, or the first of the base's
    `architectures`. Where the adapter's folder has a tokenizer with more tokens than the base, or an embedding with
    more rows, the embedding is resized first.

    Args:
        path: the adapter: a folder, or a Hub repository "owner/name".
        model: the base's folder or repository, in place of the one that the adapter names.
        cls: a class with `from_pretrained`, in place of the one that the adapter's configuration tells.
        subfolder, revision: of the adapter, as for `load`.
        hub_options: as for `load`. token, cache_dir, local_files_only, force_download and proxies are for the base too.
        adapter_options: further arguments of `load`: strict, dtype, …
        pretrained: arguments of the base's `from_pretrained`: dtype, device_map, quantization_config, num_labels, …

    Returns:
        A `Loaded`: `net, adapter = load_model(…)`. The base is `net.model`.

    Raises:
        FileNotFoundError: the adapter, or the base, is not there.
        ValueError: the adapter names no base, or no class of transformers; or as for `load`.
        ModuleNotFoundError: transformers is not installed.
        TypeError: `model` is a module.

    Example:
        import transformers
        base = transformers.GPT2Model(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
        base.save_pretrained("base")
        net = pf.adapt(transformers.GPT2Model.from_pretrained("base"), {"c_attn": pf.LoRA(rank=2)})
        pf.save("adapter", net, net.init(), format="peft")
        net, adapter = pf.load_model("adapter")
    """
    if isinstance(model, nn.Module):
        raise TypeError(f"load_model: model is a {type(model).__name__}; for a model in memory, use load(path, model)")
    try:
        import transformers
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("load_model needs transformers: pip install 'peftfn[hf]'") from e
    base_options = {k: v for k, v in (hub_options or {}).items() if k in _SHARED}
    mine = None if Path(path).exists() and base_options.keys() == (hub_options or {}).keys() else hub_options
    where = hub.find(path, subfolder=subfolder, revision=revision, more=hub.TOKENIZER, options=mine)
    facts = described(where)
    name, kind = _base(facts, where, model), cls or _class(facts, where, transformers)
    options: dict[str, Any] = base_options | pretrained
    if model is None and facts.get("revision") and not Path(name).exists():
        options["revision"] = facts["revision"]
    try:
        base = (kind or _first(name, options, transformers)).from_pretrained(name, **options)
    except OSError as e:
        raise FileNotFoundError(
            f"{name}, the base model of {where}, was not found here or on the Hub: give load_model(…, model=…), its "
            f"folder or repository ({str(e).splitlines()[0]})"
        ) from e
    _resized(base, where, base_options, bool(pretrained.get("trust_remote_code")), transformers)
    loaded = load(where, base, **{"buffers": True, **(adapter_options or {})})
    base.load_state_dict(dict(loaded.buffers), strict=False)
    return loaded


def _base(facts: Mapping[str, Any], where: Path, model: str | PathLike[str] | None) -> str:
    """The base's folder or repository."""
    name = facts.get("base_model_name_or_path") if model is None else str(model)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: it names no base model (base_model_name_or_path): give load_model(…, model=…)")
    return name


def _class(facts: Mapping[str, Any], where: Path, transformers: Any) -> Any:
    """The base's class by the adapter's configuration, or None. A file is not trusted: of transformers alone."""
    mapping = facts.get("auto_mapping")
    mapping = mapping if isinstance(mapping, dict) else {}
    name = mapping.get("base_model_class")
    if isinstance(name, str):
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
        raise ValueError(
            f"{where}: its base is a {name} of {mapping.get('parent_library')}, which is not a transformers model: "
            "import the class, and give load_model(…, cls=…)"
        )
    task = facts.get("task_type")
    if task is not None and task not in TASKS:
        raise ValueError(f"{where}: task_type is {str(task)[:80]!r}; known are {', '.join(TASKS)}")
    return None if task is None else getattr(transformers, TASKS[task])


def _first(name: str, options: Mapping[str, Any], transformers: Any) -> Any:
    """The first of the base's architectures."""
    asked = {k: v for k, v in options.items() if k in (*_SHARED, "revision", "trust_remote_code", "subfolder")}
    config = transformers.AutoConfig.from_pretrained(name, **asked)
    first = next(iter(getattr(config, "architectures", None) or ()), "")
    return getattr(transformers, str(first), None) or transformers.AutoModel


def _resized(base: Any, where: Path, options: Mapping[str, Any], trust: bool, transformers: Any) -> None:
    """Give the base the rows for tokens that were added before training."""
    embedding = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    if embedding is None or not where.is_dir():
        return
    have, rows = len(embedding.weight), _rows(base, embedding, where)
    if (where / TOKENIZER).is_file():
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, trust_remote_code=trust, **options)
        rows = max(rows, len(tokenizer))
    if rows > have:
        base.resize_token_embeddings(rows, mean_resizing=False)


def _rows(base: Any, embedding: Any, where: Path) -> int:
    """The rows of the embedding that the adapter's file was made with, if it says so."""
    name = next(n for n, m in base.named_modules() if m is embedding)
    if (where / native.CONFIG).is_file():
        with opened(where / native.TENSORS) as file:
            key, grown = f"{native_tensors.ROWS}{name}.weight", read_json(where / native.CONFIG).get("grown", {})
            known = (
                key in file.meta and isinstance(grown, dict) and grown.get(f"{name}.weight") == len(embedding.weight)
            )
            return len(embedding.weight) + file.meta[key].shape[:1].numel() if known else 0
    if not (where / peft.TENSORS).is_file() or swift.is_mine(where):
        return 0
    with opened(where / peft.TENSORS) as file:
        whole = re.compile(rf".*\.{re.escape(name)}\.({_AROUND})*weight")
        return max((len(t) for k, t in file.meta.items() if whole.fullmatch(k)), default=0)
