"""ms-swift's tuners of a whole model, to read: RESTUNING and LLAMAPRO.

RESTUNING's tensors are at the model's root: `restuning_default.bypass_blocks.0.lateral_tuner.tuner.ln1.weight`.
LLAMAPRO's new blocks are saved under the numbers that the model's blocks have with them: `model.layers.8.…`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peftfn.core.method import Method
from peftfn.formats.binding import exactly, planned
from peftfn.formats.files import Loaded, Options, mismatch
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.modules.llama_pro import DOT, LlamaPro
from peftfn.methods.modules.restuning import ResTuning
from peftfn.model.model import Model
from peftfn.net.net import Adapted

_TUNER = re.compile(
    r"restuning_(?P<name>[^.]+)\.bypass_blocks\.(?P<i>\d+)\.(?P<side>lateral|vertical)_tuner\.tuner\."
    r"(?P<rest>ln[12]\.(?:weight|bias))"
)
_PARTS = {"ln1.weight": "down", "ln1.bias": "c", "ln2.weight": "up", "ln2.bias": "b"}
_LAST = (("o_proj", "down_proj"), ("c_proj",), ("dense", "fc2"), ("out_proj", "fc2"), ("dense", "dense_4h_to_h"))
"""The last projections of a block's branches, which begin at 0: as models call them."""

Keys = dict[str, dict[str, str]]
"""Site → the leaf's name → the file's key."""


def restuning(config: Mapping[str, Any], file: Tensors, model: Model) -> tuple[dict[str, Method], Keys, list[str]]:
    """(the method by site, where its tensors are, keys that are none of its)."""
    for option, known in {"stem_modules_hook": ("output",), "use_upsample": (False, None)}.items():
        if config.get(option, known[0]) not in known:
            raise ValueError(f"{option} is {config[option]!r}; this release reads {known[0]!r}")
    if config.get("target_hidden_pos") not in (0, None):
        raise ValueError(f"target_hidden_pos is {config['target_hidden_pos']!r}; this release reads 0")
    if any(word in str(config.get("tuner_cfg")) for word in ("group", "zero", "adapter_weight", "tuple")):
        raise ValueError(
            f"tuner_cfg is {config['tuner_cfg']!r}; this release reads 'res_adapter', with its adapter_length"
        )
    stems = config.get("stem_modules")
    stems = _matching(model, str(stems), "stem_modules") if not isinstance(stems, list) else [str(n) for n in stems]
    (target,) = _matching(model, str(config.get("target_modules")), "target_modules")[-1:]
    root = _matching(model, str(config["root_modules"]), "root_modules")[0] if config.get("root_modules") else ""
    of: Any = config.get("root_modules_hook", "input") if root else "input"
    found: dict[str, str] = {}
    stray = []
    for key in file.meta:
        if (m := _TUNER.fullmatch(key)) is None or int(m["i"]) >= len(stems):
            stray.append(key)
        else:
            found[f"{m['side']}{int(m['i'])}_{_PARTS[m['rest']]}"] = key
    ranks = {file.meta[k].shape[0] for n, k in found.items() if n.endswith("_down")}
    sizes = {file.meta[k].shape[1] for n, k in found.items() if n.endswith("_down")}
    if len(ranks) != 1 or len(sizes) != 1:
        raise ValueError(
            f"its {len(found)} tensors have the ranks {sorted(ranks)} of {sorted(sizes)} features, not one"
        )
    hook: Any = config.get("target_modules_hook", "input")
    method = ResTuning(tuple(stems), ranks.pop(), root or stems[0], hook, sizes.pop(), of)
    return {target: method}, {target: found}, stray


def _matching(model: Model, pattern: str, option: str) -> list[str]:
    """The modules of the model that a pattern of theirs matches whole, in order."""
    try:
        found = [n for n in model.modules if re.fullmatch(pattern, n)]
    except re.error as e:
        raise ValueError(f"{option} is {pattern!r}, which is no regular expression: {e}") from e
    if not found:
        raise ValueError(f"{option} is {pattern!r}, which matches none of the model's {len(model.modules)} modules")
    return found


def llamapro(config: Mapping[str, Any], file: Tensors, model: Model) -> tuple[dict[str, Method], Keys, list[str]]:
    """As `restuning`. A new block stands behind the last of each group of blocks."""
    split = {k: re.fullmatch(r"(?P<at>(?:.+\.)?[A-Za-z_]+)\.(?P<i>\d+)\.(?P<rest>.+)", k) for k in file.meta}
    lists = {m["at"] for m in split.values() if m}
    if len(lists) != 1 or not isinstance(model.modules.get(at := lists.pop()), nn.ModuleList):
        raise ValueError("its keys are not those of blocks in one list of the model")
    blocks, groups = len(list(model.modules[at].children())), config.get("num_groups") or config.get("num_new_blocks")
    if not isinstance(groups, int) or not 0 < groups <= blocks or blocks % groups:
        raise ValueError(f"num_groups is {groups!r}, and the model has {blocks} blocks: give a model of the same depth")
    each = blocks // groups
    behind = {(g + 1) * each + g: f"{at}.{(g + 1) * each - 1}" for g in range(groups)}  # number ↦ the block before it
    keys: Keys = {n: {} for n in behind.values()}
    stray = []
    for key, m in split.items():
        if m is None or int(m["i"]) not in behind:
            stray.append(key)  # blocks of the base among them: 2 is in 20 to 29, as ms-swift compares
        else:
            keys[behind[int(m["i"])]][m["rest"].replace(".", DOT)] = key
    methods: dict[str, Method] = {n: LlamaPro(_zeroed(model.modules[n])) for n in behind.values()}
    return methods, keys, stray


def _zeroed(block: nn.Module) -> tuple[str, ...]:
    own = {part for name, _ in block.named_parameters() for part in name.split(".")}
    found = next((names for names in _LAST if own >= set(names)), None)
    if found is None:
        raise ValueError(f"a {type(block).__name__} has none of the last projections {_LAST}")
    return found


KINDS: dict[str, Callable[[Mapping[str, Any], Tensors, Model], tuple[dict[str, Method], Keys, list[str]]]] = {
    "RESTUNING": restuning,
    "LLAMAPRO": llamapro,
}
"""`swift_type` → how it is read."""
PROMPT = (
    "PROMPT puts its first prompt behind the embeddings, without positions and norms, and returns its states with the "
    "others: this release has no such form. Train pf.PromptTuning with pf.DeepPrompt instead"
)


def load(config: Mapping[str, Any], file: Tensors, model: Model, where: Path, options: Options) -> Loaded:
    """The adapter of one of `KINDS`. ValueError for what the model, or this release, has no form for."""
    options.only(where)
    try:
        methods, found, stray = KINDS[config["swift_type"]](config, file, model)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{where}: {e}") from e
    plan = planned(model, {exactly(n): m for n, m in methods.items()}, where)
    wanted = {n: e.spec for n, e in plan.items()}
    missing = [f"{at}: {k}" for at, spec in wanted.items() for k in spec if k not in found[at]]
    more = [key for at, keys in found.items() for k, key in keys.items() if k not in wanted[at]]
    if missing or ((stray or more) and options.strict):
        raise mismatch(file.where, missing, [*stray, *more])
    adapter: dict[str, Any] = {}
    for at, spec in wanted.items():
        for k, shape in spec.items():
            file.check(found[at][k], shape)
        adapter[at] = {k: file.tensor(found[at][k]) for k in spec}
    return Loaded(Adapted(model.root, plan), adapter, unexpected=(*stray, *more))
