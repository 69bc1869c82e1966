"""Hugging Face PEFT's format: adapter_config.json and adapter_model.safetensors, both ways.

Reading: the file's keys say which layers are adapted, the configuration says how; whatever differs from layer to layer
becomes a rule of its own. Writing: one method for all layers (ranks, alphas and what else has a pattern may differ),
and `Full` wherever PEFT has `modules_to_save`, trained biases or LN-tuning.

Bit-exact are the tensors of every method. A tensor that PEFT saves whole (modules_to_save, biases) is read as its
difference to the base in fp32, so that base + difference may differ from it in the last bit.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfn.core.modules import Prefix, Tokens
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_extra, peft_inputs, peft_poly
from peftfn.formats.beyond import Beyond
from peftfn.formats.card import write_card
from peftfn.formats.files import Loaded, Options, as_stored, write
from peftfn.formats.peft_compact import compact as compacted
from peftfn.formats.peft_experts import ranked, stacked
from peftfn.formats.peft_keys import PeftNames
from peftfn.formats.peft_names import called, nameless, renaming, suffixes, unwrapped
from peftfn.formats.peft_old import flattened, modernised, named_today
from peftfn.formats.peft_read import PeftReader
from peftfn.formats.peft_write import documents
from peftfn.formats.tensor_files import Tensors, opened, unpickled
from peftfn.model.model import Model
from peftfn.net.net import Adapted

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


def is_mine(path: Path) -> bool:
    return (path / CONFIG).is_file()


def save(
    folder: Path,
    net: Adapted,
    adapter: Mapping[str, Any],
    *,
    split: bool = False,
    extra: Mapping[str, Any] | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    tasks: bool = False,
    compact: bool = False,
    beyond: Beyond | None = None,
) -> None:
    """Write one folder, or several, each with a model card (README.md), unless there is one.

    Args:
        split: write several folders below, one for each of PEFT's types, if the plan needs more than one.
        extra: further keys of the configuration: `task_type`, `alora_invocation_tokens`, …
        buffers: the model's buffers that belong to the adapter: of modules that are saved whole.
        tasks: the adapter is a stack: of multitask prompts, or of Poly's tasks, which share all but their weights.
        compact: leave out what a seed determines (VeRA, RandLoRA, PVeRA, UniLoRA), and of VB-LoRA's logits all but the
            top k. PEFT reads it; VB-LoRA's leaves are then as large as before, and −∞ where the file has nothing.
        beyond: what the model holds beyond its base.
    """
    more = {**peft_extra.about(net.model), **peft_extra.given(extra, net)}
    if peft_inputs.is_mine(net):
        if compact:
            raise ValueError("save: compact=True is for methods of constants that a seed determines, and for VBLoRA")
        more = {"task_type": peft_extra.task_of(net.model)} | more
        if more["task_type"] is None and any(isinstance(m, Tokens | Prefix) for m in net.plan.rules.values()):
            raise ValueError(
                f"save: PEFT uses virtual tokens by the file's task_type, and {type(net.model).__name__} "
                "tells none: give extra={'task_type': 'CAUSAL_LM'}, or another"
            )
        config, tensors = peft_inputs.document(net, adapter, more["task_type"], tasks, beyond)
        peft_extra.check_type(more, config["peft_type"])
        write(folder / TENSORS, tensors)
        write(folder / CONFIG, json.dumps(config | more, indent=2, sort_keys=True, ensure_ascii=False))
        write_card(folder, config | more, tensors, net.plan)
        return
    logits: dict[str, Tensor] = {}
    if tasks:
        adapter, logits = peft_poly.one_of(net, adapter)
    written = []
    for name, (config, tensors) in documents(
        net, adapter, split=split, task=more.get("task_type"), buffers=buffers, beyond=beyond
    ).items():
        peft_extra.check_type(more, config["peft_type"])
        if config["peft_type"] == "POLY" and logits:
            config, tensors = config | {peft_poly.COUNT: len(next(iter(logits.values())))}, tensors | logits
        if compact:
            config, tensors = compacted(net, config, tensors)
        written.append((folder / name, config, tensors))
    for where, config, tensors in written:
        write(where / TENSORS, tensors)
        write(where / CONFIG, json.dumps(config | more, indent=2, sort_keys=True, ensure_ascii=False))
        write_card(where, config | more, tensors, net.plan)


def load(folder: Path, model: Model, options: Options) -> Loaded:
    config, where = configs.read(folder / CONFIG), folder / TENSORS
    if not where.is_file() and (folder / PICKLE).is_file():
        if not options.pickled:
            raise FileNotFoundError(
                f"{where} is missing; {PICKLE} is a pickle: load(…, pickled=True) reads only its tensors"
            )
        return build(model, config, unpickled(folder / PICKLE), folder / CONFIG, options)
    with opened(where) as file:
        return build(model, config, file, folder / CONFIG, options)


def build(
    model: Model,
    config: dict[str, Any],
    file: Tensors,
    where: Path,
    options: Options,
) -> Loaded:
    """The adapter that PEFT's configuration and tensors describe. config: from `peft_config.checked`, read at where."""
    for key in options.ignore:
        if key == "peft_type" or configs.means(key, config["peft_type"]):
            raise ValueError(f"{where}: ignore has {key!r}, which this release reads, and which means something")
        config.pop(key, None)
    if config["peft_type"] in peft_inputs.TYPES:
        loaded = peft_inputs.load(config, file, model, where, options)
        return as_stored(loaded, file) if options.stored else loaded
    if config["peft_type"] == "XLORA":
        raise ValueError(
            f"{where}: X-LoRA weighs several adapters, so it is a mixture, and no adapter of a net: read it with "
            "mixture, a = peftfn.XLoRA.load(path, model)"
        )
    file = named_today(config, file)
    extra = peft_extra.taken(config, where)
    if spans := extra.get(peft_extra.REPLICATION):
        model = peft_extra.replicated(model, spans, where)
    known = PeftNames(model)
    ends = suffixes((*configs.candidates(config["peft_type"]), *configs.candidates("TRAINABLE_TOKENS")))
    bare = nameless(map(unwrapped, file.meta), ends, file.where)
    file = file.renamed(lambda key: bare(unwrapped(key)))
    modernised(config, file, where)
    rename = renaming(known, options.key_mapping, ends)
    pairs = {rename(key): key for key in file.meta}
    file = file.renamed(rename)
    known.called = called(known, pairs, rename, options.key_mapping is not None)
    if options.experts == "unsloth":
        ranked(config, file, known)
    stacked(config, file, known, where)
    flattened(config, file, known, where)
    whole = peft_poly.first_task(config, file, where)
    reader = PeftReader(where, config, file, known, options)
    loaded = reader.load()
    if whole is not None:
        loaded = peft_poly.all_tasks(loaded, whole, reader.found)
    if peft_extra.INVOCATION in extra:
        peft_extra.check_gated(loaded.net.plan, where)
    if options.stored:
        loaded = as_stored(loaded, file)
    return replace(loaded, extra=extra)
