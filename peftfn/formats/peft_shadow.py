"""PEFT's files of ShadowPEFT, both ways, of a shadow model of the backbone's own class ("mirror").

A file has one module for each block, and the leaf one tensor for all of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.core.fields import MOST_ROUNDS
from peftfn.core.plan import Entry
from peftfn.formats import peft_config as configs
from peftfn.formats.binding import exactly, planned, whole
from peftfn.formats.files import Loaded, mismatch
from peftfn.formats.tensor_files import Tensors as File
from peftfn.methods.modules.shadow import DOT, LISTS, MIRROR, Shadow
from peftfn.methods.weights.full import Full
from peftfn.model.choice import matched
from peftfn.model.model import Model
from peftfn.net.net import Adapted

TYPE, HEAD = "SHADOW", "base_model.model."
_MIRROR, _PROJECTION = "base_model.shadow_backbone.default.", "base_model.shadow_projection.default.weight"
FIELDS = {
    "r": "rank",
    "shadow_alpha": "alpha",
    "shadow_dropout": "dropout",
    "update_hidden_size": "update",
    "shadow_num_hidden_layers": "depth",
    "shadow_hidden_size": "hidden",
    "shadow_intermediate_size": "intermediate",
    "shadow_num_attention_heads": "heads",
    "share_embeddings": "shares",
}
"""PEFT's key → our field."""
DEFAULTS = {"r": 8, "shadow_alpha": 0.1, "shadow_dropout": 0.2, "shadow_num_hidden_layers": 1, "share_embeddings": True}
_OF_BLOCK = {"down": "shadow_down.default.weight", "up": "shadow_up.default.weight"} | {
    f"{net}_{ours}": f"shadow_update_{net}.default.{theirs}"
    for net in ("transform", "gate")
    for ours, theirs in {"0": "0.weight", "b0": "0.bias", "1": "2.weight", "b1": "2.bias"}.items()
}
"""Our tensor → the end of PEFT's key at each block."""
_WORDS = (
    "auto_mapping base_model_name_or_path inference_mode modules_to_save peft_type peft_version revision task_type "
    "target_modules exclude_modules layers_to_transform layers_pattern init_weights shadow_model auxiliary_loss_weight"
)
KNOWN = frozenset(_WORDS.split())
"""What has no effect here: the file's keys say which blocks there are."""


def load(config: Mapping[str, Any], file: File, model: Model, where: Path) -> tuple[Loaded, set[str]]:
    """(the adapter, keys that have no place). What the file saves whole is in `Full` rules."""
    if config.get("shadow_model", "mirror") != "mirror":
        raise ValueError(
            f"{where}: shadow_model is {config['shadow_model']!r}, a model of its own; this release reads 'mirror'"
        )
    known = KNOWN | FIELDS.keys()
    odd = next((k for k, v in config.items() if k not in known and v not in (None, False, [], {})), None)
    if odd is not None:
        raise ValueError(f"{where}: {odd} is {config[odd]!r}, which peftfn does not know for SHADOW")
    ends = tuple(f".{end}" for end in _OF_BLOCK.values())
    paths = {k.removeprefix(HEAD).removesuffix(e) for k in file.meta for e in ends if k.endswith(e)}
    site, blocks = _backbone(paths, model, where)
    _check_targets(config, paths, model, where)
    if any(t.is_meta for t in model.modules[site].buffers()):
        raise ValueError(f"{where}: its mirror takes the buffers of {site}, without values here: load its weights")
    values = {f: config.get(k, DEFAULTS.get(k)) for k, f in FIELDS.items()}
    largest = max((n for t in file.meta.values() for n in t.shape), default=0)
    for k, f in FIELDS.items():  # before a mirror of that size is made
        if type(n := values[f]) is int and n > (limit := MOST_ROUNDS if f == "depth" else largest):
            raise ValueError(f"{where}: {k} is {n}, and the file's tensors allow at most {limit}")
    try:
        method = Shadow(**{f: v for f, v in values.items() if v is not None}, blocks_at=blocks)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{where}: Shadow does not accept the values in the file: {e}") from e
    heads = {model.named[n].name: k for k in file.meta if (n := k.removeprefix(HEAD)) != k and n in model.named}
    plan = planned(model, {exactly(site): method, **{exactly(n): Full() for n in heads}}, where)
    keys = {k: _keys(k, site, plan[site]) for k in plan[site].spec}
    unused = _unread(model, site, plan[site])
    missing = [key for some in keys.values() for key in some if key not in file.meta]
    if missing:
        raise mismatch(file.where, missing, ())
    leaf = {}
    for k, some in keys.items():
        shape = plan[site].spec[k]
        for key in some:
            file.check(key, shape[1:] if k in _OF_BLOCK else shape)
        read = [file.tensor(key) for key in some]
        leaf[k] = torch.stack(read) if k in _OF_BLOCK else read[0]
    stray = file.meta.keys() - {key for some in keys.values() for key in some} - unused - {*heads.values()}
    return Loaded(Adapted(model.root, plan), {site: leaf, **whole(file, heads, model)}), set(stray)


def _backbone(paths: set[str], model: Model, where: Path) -> tuple[str, tuple[int, ...]]:
    """(the site, the numbers of its blocks) of the blocks at these paths; () for all of them."""
    lists = {p.rpartition(".")[0] for p in paths}
    (held,) = lists if len(lists) == 1 else ("",)
    site, _, name = held.rpartition(".")
    if name not in LISTS or site not in model.backbones or not paths <= model.modules.keys():
        raise ValueError(f"{where}: its tensors are at {sorted(paths)[:3]}, which are no blocks of one backbone here")
    numbers = tuple(sorted(int(p.rpartition(".")[2]) for p in paths))
    return site, () if numbers == tuple(range(len(model.modules[held]))) else numbers  # type: ignore[arg-type]


def _check_targets(config: Mapping[str, Any], paths: set[str], model: Model, where: Path) -> None:
    """ValueError where the configuration chooses other blocks than the file has tensors of."""
    wanted, exclude, layers = configs.chosen(dict(config), where)
    held = next(iter(paths)).rpartition(".")[0]
    if wanted is not None:
        taken = {n for n in matched(model, wanted, exclude, *layers) if n.rpartition(".")[0] == held}
        if odd := sorted(taken ^ paths):
            raise ValueError(
                f"{where}: target_modules {'names' if odd[0] in taken else 'leaves out'} {odd[0]}, of which the file "
                f"has {'no ' if odd[0] in taken else ''}tensors"
            )


def _keys(name: str, site: str, entry: Entry) -> list[str]:
    """PEFT's keys of one of our tensors."""
    if name in _OF_BLOCK:
        return [f"{HEAD}{c.at}.{_OF_BLOCK[name]}" for c in entry.companions]
    if name == "projection":
        return [_PROJECTION]
    return [_MIRROR + name.removeprefix(MIRROR).replace(DOT, ".")]


def _unread(model: Model, site: str, entry: Entry) -> set[str]:
    """Keys of embeddings that PEFT saves of some mirrors and never reads, since they share the base's."""
    embedding = model.modules[site].get_input_embeddings()  # type: ignore[operator]
    path = next(n for n, part in model.modules[site].named_modules() if part is embedding)
    return {f"{_MIRROR}{path}.weight"} - {k for name in entry.spec for k in _keys(name, site, entry)}


def document(
    site: str, entry: Entry, leaf: Mapping[str, Tensor], model: Model
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors). ValueError where PEFT's blocks would be others."""
    method: Any = entry.method
    at = method.blocks_at
    if at and list(at) != list(range(at[0], at[-1] + 1)):
        raise ValueError(f"{site}: PEFT's shadow goes along neighbouring blocks, and blocks_at is {at}")
    tensors: dict[str, Tensor] = {}
    for name, t in leaf.items():
        keys = _keys(name, site, entry)
        tensors |= dict(zip(keys, t if name in _OF_BLOCK else [t], strict=True))
    for key in _unread(model, site, entry):
        if not key.endswith(".embed_tokens.weight"):  # by this name PEFT leaves them out, and it asks for others
            embedding: Any = model.modules[site].get_input_embeddings()  # type: ignore[operator]
            tensors[key] = embedding.weight
    config = {k: getattr(method, f) for k, f in FIELDS.items()}
    more = {"peft_type": TYPE, "shadow_model": "mirror", "target_modules": [c.at for c in entry.companions]}
    return {**config, **more}, tensors
