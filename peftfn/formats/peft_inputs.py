"""PEFT's files of methods that change no weight, both ways: prompts, prefixes, LLaMA-Adapter and ShadowPEFT.

A prompt's file has what it comes to, the tokens or the keys and values, and not what they were made of (P-tuning's
encoder): `load` returns a prepared adapter then, which runs, trains and saves as it is. A file of multitask prompts
has several tasks: `load` returns a stack with an adapter for each, for `net.mixed(tasks, task_ids, …)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfn.core.method import Method
from peftfn.core.modules import OfModule, Prefix, Tokens
from peftfn.core.plan import Entry
from peftfn.formats import peft_adaption, peft_extra, peft_multitask, peft_shadow
from peftfn.formats.beyond import Beyond
from peftfn.formats.binding import exactly, planned, whole
from peftfn.formats.files import Loaded, Options, mismatch
from peftfn.formats.peft_prompt_common import ALWAYS, HEAD, PROMPT, heads_in, sizes, used
from peftfn.formats.peft_table import CLASSIFIERS, VERSION
from peftfn.formats.tensor_files import Tensors as File
from peftfn.methods.inputs.cartridge import Cartridge
from peftfn.methods.inputs.cpt import CPT
from peftfn.methods.inputs.multitask import MultitaskPrompt
from peftfn.methods.inputs.prefix import PrefixTuning, together
from peftfn.methods.inputs.prompt import PromptTuning
from peftfn.methods.inputs.ptuning import PTuning
from peftfn.methods.modules.llama_adapter import LlamaAdapter
from peftfn.methods.modules.shadow import Shadow
from peftfn.methods.weights.full import Full
from peftfn.model.model import Model
from peftfn.model.place import is_causal
from peftfn.net.net import Adapted
from peftfn.tensors.precision import wide


class Kind(NamedTuple):
    """One of PEFT's types: how a configuration is read and written, and which of its keys have no effect."""

    cls: type[Method]
    read: Callable[[Mapping[str, Any]], dict[str, Any]]  # configuration ↦ our fields, but for n
    write: Callable[[Any], dict[str, Any]]  # method ↦ PEFT's keys
    idle: str = ""


def _mlp(c: Mapping[str, Any]) -> dict[str, Any]:
    kind = c.get("encoder_reparameterization_type", "MLP")
    found: dict[str, Any] = {"encoder": kind, "hidden": c.get("encoder_hidden_size")}
    return found | ({"layers": c.get("encoder_num_layers", 2)} if kind == "LSTM" else {})


_START = "prompt_tuning_init prompt_tuning_init_text"
KINDS: dict[str, Kind] = {
    "PROMPT_TUNING": Kind(PromptTuning, lambda c: {}, lambda m: {"prompt_tuning_init": "RANDOM"}, _START),
    "P_TUNING": Kind(
        PTuning,
        _mlp,
        lambda m: {
            "encoder_reparameterization_type": m.encoder,
            "encoder_hidden_size": m.hidden,
            "encoder_num_layers": m.layers,
            "encoder_dropout": 0.0,
        },
        "encoder_dropout encoder_num_layers",
    ),
    "MULTITASK_PROMPT_TUNING": Kind(
        MultitaskPrompt,
        lambda c: {"rank": c.get("num_ranks", 1)},
        lambda m: {"num_ranks": m.rank, "prompt_tuning_init": "RANDOM"},
        f"{_START} num_tasks prompt_tuning_init_task prompt_tuning_init_state_dict_path",
    ),
    "CPT": Kind(
        CPT,
        lambda c: {
            "ids": tuple(c["cpt_token_ids"]),
            "types": tuple(c["cpt_tokens_type_mask"]),
            "epsilon": c.get("opt_projection_epsilon", 0.1),
            "format_epsilon": c.get("opt_projection_format_epsilon", 0.1),
        },
        lambda m: {
            "cpt_token_ids": list(m.ids),
            "cpt_mask": [1] * len(m.ids),
            "cpt_tokens_type_mask": list(m.types or [2] * len(m.ids)),
            "opt_projection_epsilon": m.epsilon,
            "opt_projection_format_epsilon": m.format_epsilon,
        },
        "opt_weighted_loss_type opt_loss_decay_factor cpt_mask",
    ),
    "PREFIX_TUNING": Kind(
        PrefixTuning,
        lambda c: {"hidden": c.get("encoder_hidden_size") if c.get("prefix_projection") else None},
        lambda m: {"prefix_projection": m.hidden is not None, "encoder_hidden_size": m.hidden},
        "encoder_hidden_size init_weights",
    ),
    "CARTRIDGE": Kind(
        Cartridge, lambda c: {"still": c.get("num_frozen_tokens", 1)}, lambda m: {"num_frozen_tokens": m.still}
    ),
}
TYPES = frozenset({*KINDS, peft_adaption.TYPE, peft_shadow.TYPE})


def load(config: dict[str, Any], file: File, model: Model, where: Path, options: Options) -> Loaded:
    """The adapter of one of `TYPES`. ValueError for what would not mean here what it means to PEFT."""
    options.only(where, "ignore", "stored")
    if config["peft_type"] == peft_adaption.TYPE:
        return peft_adaption.load(config, file, model, where, options.strict)
    if config["peft_type"] == peft_shadow.TYPE:
        loaded, odd = peft_shadow.load(config, file, model, where)
        if odd and options.strict:
            raise mismatch(file.where, (), odd)
        return replace(loaded, unexpected=tuple(sorted(odd)), extra=peft_extra.told(config, where))
    kind = KINDS[config["peft_type"]]
    n = config.get("num_virtual_tokens")
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"{where}: num_virtual_tokens is {n!r}; it must be a positive integer")
    if config["peft_type"] == "CPT" and 0 in (config.get("cpt_mask") or []):
        raise ValueError(f"{where}: cpt_mask hides tokens of the context, which has no meaning here: leave them out")
    sites, causal = _sites(kind.cls, model, where, config.get("num_transformer_submodules") != 1)
    try:
        fields = kind.read(config)
        pooled = config.get("task_type") == "SEQ_CLS" and not causal and issubclass(kind.cls, Tokens)
        fields |= {"pooled": "virtual"} if pooled else {}  # PEFT's heads see the virtual tokens
        method = kind.cls(**fields, **({} if kind.cls is CPT else {"n": n}))
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{where}: {kind.cls.__name__} does not accept the values in the file: {e}") from e
    used(config, {*ALWAYS.split(), *kind.idle.split(), *kind.write(method)}, where)
    own = peft_multitask.KEYS if kind.cls is MultitaskPrompt else (PROMPT,)
    heads, stray = heads_in(file, model, {*own})
    missing = [k for k in own if k not in file.meta]
    if missing or (options.strict and stray):
        raise mismatch(file.where, missing, stray)
    rules: dict[str, Method] = {exactly(*sites): method, **{exactly(name): Full() for name in heads}}
    net = Adapted(model.root, planned(model, rules, where))
    adapter: dict[str, Any] = whole(file, heads, model)
    if kind.cls is MultitaskPrompt:
        leaves = peft_multitask.leaves(file, {site: net.plan[site] for site in sites})
        tasks = len(leaves[sites[0]]["cols"])
        adapter = {h: {"diff": t["diff"].expand(tasks, *t["diff"].shape)} for h, t in adapter.items()} | leaves
    else:
        adapter[sites[0]] = _leaf(kind, config, file, net.plan[sites[0]], n)
    return Loaded(net, adapter, unexpected=tuple(stray), extra=peft_extra.told(config, where))


def _sites(cls: type[Method], model: Model, where: Path, both: bool) -> tuple[list[str], bool]:
    """(the backbones that PEFT's inputs go to, whether the only one is causal). both: multitask prompts are at the
    encoder and the decoder of a model that has them."""
    two = getattr(getattr(model.root, "config", None), "is_encoder_decoder", False)
    if two and both and issubclass(cls, MultitaskPrompt) and len(model.backbones) == 2:
        return peft_multitask.sites(model), False
    decoder = issubclass(cls, Prefix)
    found = [name for name in model.backbones if not two or decoder == is_causal(model.modules[name])]
    if len(found) != 1:
        has = f"has {len(found)}: {found}" if found else "has none: no module takes inputs_embeds and attention_mask"
        raise ValueError(f"{where}: a prompt goes to one backbone, and the model {has}")
    return found, is_causal(model.modules[found[0]])


def _leaf(kind: Kind, config: Mapping[str, Any], file: File, entry: Entry, n: int) -> dict[str, Tensor]:
    """What the file has at the site, prepared."""
    shape = file.meta[PROMPT].shape
    width = entry.site.shape[0] if issubclass(kind.cls, Tokens) else None
    two = config.get("num_transformer_submodules") == 2
    if len(shape) != 2 or shape[0] != (2 * n if two and width else n) or (width and shape[1] != width):
        want = [n, width or "layers·2·heads·size"]
        raise ValueError(f"{file.where}: {PROMPT} has shape {list(shape)}, and the model needs {want}")
    t = file.tensor(PROMPT)
    if width:
        return {"tokens": t[:n].clone()}  # PEFT uses the second half of an encoder–decoder's table for no prompt
    layers, heads, head, _ = entry.frozen["sizes"].shape
    if t.shape[1] != layers * 2 * heads * head:
        raise ValueError(
            f"{file.where}: {PROMPT} has {t.shape[1]} columns, and the backbone's cache takes {layers} layers · 2 · "
            f"{heads} heads · {head}"
        )
    pairs = t.unflatten(-1, (layers, 2, heads, head))
    if two:  # PEFT doubles the table and cuts it into four a layer, of which the decoder's attention uses the first two
        pairs = pairs[:, [2 * layer % layers for layer in range(layers)]]
    keys, values = pairs.permute(2, 1, 3, 0, 4)
    return {"keys": keys.contiguous(), "values": values.contiguous()}


# Writing.


def is_mine(net: Adapted) -> bool:
    """Whether the net has methods that are written here."""
    return any(isinstance(e.method, OfModule) for e in net.plan.values())


def document(
    net: Adapted, adapter: Mapping[str, Any], task: str | None, tasks: bool = False, beyond: Beyond | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of a net with methods at modules or on inputs; ValueError where PEFT has no form."""
    model = Model.of(net.model)
    mine = {n: e for n, e in net.plan.items() if isinstance(e.method, OfModule)}
    rest = {n: e for n, e in net.plan.items() if n not in mine}
    other = next((n for n, e in rest.items() if not isinstance(e.method, Full)), None)
    if other is not None:
        raise ValueError(
            f"{other}: PEFT has one type a file, and this net has {net.plan[other].method} beside "
            f"{next(iter(mine.values())).method}: save it in the native format"
        )
    methods = {e.method for e in mine.values()}
    method = next(iter(methods))
    if tasks and (not isinstance(method, MultitaskPrompt) or rest):
        raise ValueError("save: tasks=True is for multitask prompts alone; save the adapters of a stack one by one")
    if len(methods) == 1 and isinstance(method, LlamaAdapter):
        config, tensors = peft_adaption.document(net, mine, adapter)
    elif len(mine) == 1 and isinstance(method, Shadow):
        ((site, entry),) = mine.items()
        config, tensors = peft_shadow.document(site, entry, adapter[site], model)
    elif len(methods) == 1 and isinstance(method, MultitaskPrompt) and all("cols" in adapter[n] for n in mine):
        config, tensors = peft_multitask.document(mine, adapter, model)
        config = {"peft_type": "MULTITASK_PROMPT_TUNING", **KINDS["MULTITASK_PROMPT_TUNING"].write(method), **config}
    elif len(mine) == 1 and any(isinstance(method, k.cls) for k in KINDS.values()):
        ((site, entry),) = mine.items()
        config, tensors = _prompt(net, site, entry, adapter, model)
    else:
        names = ", ".join(sorted({type(m).__name__ for m in methods}))
        raise ValueError(
            f"{next(iter(mine))}: PEFT has no form for {names} at {len(mine)} sites: save in the native format"
        )
    more = beyond.values(net.model) if beyond else {}
    if methods and not isinstance(method, LlamaAdapter):  # which PEFT puts into the model, as it does with weights
        more = {**_head(model, task), **more}
    if rest or more:
        config["modules_to_save"] = _roots({**rest, **more}, model)
        for name in {**rest, **more}:
            w = model.weights[name]
            if name in rest:
                w = wide(w) + wide(rest[name].site.original(adapter[name]["diff"]))
            head = peft_shadow.HEAD if isinstance(method, Shadow) else HEAD
            tensors[f"{head}{name}"] = w
    shared = {"inference_mode": True, "peft_version": VERSION, "task_type": task}
    return {**shared, **config}, {k: t.detach().contiguous() for k, t in tensors.items()}


def _head(model: Model, task: str | None) -> dict[str, Any]:
    """The parameters of the head that PEFT looks for in a file of this task, trained or not."""
    names = CLASSIFIERS.get(task or "", ())
    heads = tuple(f"{m}." for m in model.modules if m.rpartition(".")[2] in names)
    return {n: model.weights[n] for n in model.sites if heads and n.startswith(heads)}


def _roots(whole: Mapping[str, Any], model: Model) -> list[str]:
    """The last names of the largest modules all of whose parameters are saved whole. ValueError where PEFT would save
    others by these names too."""
    roots = {}
    for name in whole:
        parts = name.split(".")[:-1]
        above = (".".join(parts[: i + 1]) for i in range(len(parts)))
        root = next((m for m in above if all(n in whole for n in model.sites if n.startswith(f"{m}."))), None)
        if root is None:
            raise ValueError(f"{name}: PEFT saves whole modules, and other parameters of its module are in no rule")
        roots[root] = root.rpartition(".")[2]
    for root, last in roots.items():
        more = next((m for m in model.modules if f".{m}".endswith(f".{last}") and m not in roots), None)
        if more is not None:
            raise ValueError(f"{root}: PEFT saves modules by name, and {more} has the same: train it too")
    return sorted(set(roots.values()))


def _prompt(
    net: Adapted, site: str, entry: Entry, adapter: Mapping[str, Any], model: Model
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    method: Any = entry.method
    name, kind = next((n, k) for n, k in KINDS.items() if isinstance(method, k.cls))
    config = {"peft_type": name, "num_transformer_submodules": 1, **kind.write(method)}
    if getattr(model.root.config if hasattr(model.root, "config") else None, "is_encoder_decoder", False):
        if isinstance(method, Prefix):
            raise ValueError(
                f"{site}: PEFT's prefix of an encoder–decoder repeats half of its table over the layers, which cannot "
                "express this one: save it in the native format"
            )
        config["num_transformer_submodules"] = 2
    ready: Any = net.prepare({n: adapter[n] for n in net.plan} | {b: adapter[b] for b in net.plan.banks})[site]
    if isinstance(method, Tokens):
        t = ready["tokens"]
        t = torch.cat([t, t]) if config["num_transformer_submodules"] == 2 else t
        n, more = ready["tokens"].shape[0], {"token_dim": t.shape[1], **sizes(model, site)}
    else:
        t, n = together(ready["keys"], ready["values"]), ready["keys"].shape[2]
        layers, heads, _, size = ready["keys"].shape
        more = {"token_dim": heads * size, "num_layers": layers, "num_attention_heads": heads}
    return {**config, "num_virtual_tokens": n, **more}, {PROMPT: t}
