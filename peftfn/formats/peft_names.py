"""Names in a PEFT file that are others than the model's: what wrappers and adapters' names put into keys, modules that
have been renamed since, and how the file itself calls each of the model's modules."""

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peftfn.core.method import Method
from peftfn.formats import peft_keys as keys

_STEMS = ("module", "text_model", "vision_model")
"""What DDP puts before a name, and what CLIP's and SigLIP's models had there in transformers 4."""
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
_ENDS = frozenset({"weight", "bias"})
Rename = Callable[[str], str]


def suffixes(classes: Iterable[type[Method]]) -> list[str]:
    """Every end of a key that these methods write, the longest first."""
    written = {k for c in classes if c.peft for k in (*c.peft.keys.values(), *c.peft.shared.values())}
    return sorted(written | {v for k in written for v in keys.variants(k)}, key=len, reverse=True)


def unwrapped(key: str) -> str:
    """A file's key without what torch.compile, FSDP, checkpointing and DDP put into it."""
    key = _WRAPPERS.sub("", key).removeprefix(".")
    return key.removeprefix("module.") if key.startswith("module.base_model.") else key


def nameless(found: Iterable[str], ends: Iterable[str], where: Path) -> Rename:
    """key ↦ the key without the adapter's name, which a state that was saved by hand has: `lora_A.default.weight`,
    `ia3_l.default`, `modules_to_save.default.weight`. ValueError where the file has two adapters.

    ends: the keys of the methods in the file, as `suffixes` returns them.
    """
    groups = [end.removesuffix("{}") for end in ends if end.endswith(".{}")]  # those have a group's name there
    ends = [end for end in ends if "{}" not in end]
    stems: dict[str, list[re.Pattern[str]]] = {}
    for end in ends:
        stem, _, rest = end.partition(".")
        stems.setdefault(stem, []).append(re.compile(re.escape(rest).replace(r"\*", r"\d+")))

    def parts(key: str) -> tuple[str, str, str] | None:
        """(what stands before the adapter's name, the name, what follows)."""
        if keys.split(key, ends):
            return None
        words = key.split(".")
        for i in range(len(words) - 2, -1, -1):
            if words[i] not in stems:
                continue
            head, name, rest = ".".join(words[: i + 1]), words[i + 1], ".".join(words[i + 2 :])
            vector = any(not p.pattern for p in stems[words[i]])
            if name.isdigit() and not rest:  # one of a list
                continue
            if name not in _ENDS and any(p.fullmatch(rest) for p in stems[words[i]]):
                return head, name, rest
            if vector and rest in ("", "weight"):  # also as a module's weight
                return head, "" if name == "weight" and not rest else name, ""
            if vector and rest.isdigit() and not name.isdigit():  # a list of them
                return head, name, rest
        return None

    split = {key: parts(key) for key in found}
    named = {p[1]: key for key, p in split.items() if p and p[1]}
    if len(named) > 1:
        several = " and ".join(map(repr, list(named.values())[:2]))
        raise ValueError(
            f"{where}: {several} belong to two adapters: {', '.join(map(repr, named))}. Save each in its own file"
        )
    copies = {k.rpartition(".ln_tuning_layers.")[2].partition(".")[0] for k in split if ".ln_tuning_layers." in k}
    name = next(iter(named), next(iter(copies - _ENDS), "default") if len(copies) == 1 else "default")
    inside = re.compile(rf"\.(modules_to_save|ln_tuning_layers)\.{re.escape(name)}(?=\.)")

    def rename(key: str) -> str:
        if (p := split.get(key) or parts(key)) is not None:
            return f"{p[0]}.{p[2]}" if p[2] else p[0]
        if any(key.startswith(f"base_model.{group}") for group in groups):
            return key.removesuffix(f".{name}")
        return inside.sub(lambda m: "" if m[1] == "modules_to_save" else f".{m[1]}", key)

    return rename


def renaming(model: keys.PeftNames, mapping: Mapping[str, str] | None, ends: Iterable[str]) -> Rename:
    """The file's key → the key in this model. ends: the keys of the methods in the file.

    With a mapping, as PEFT has it: the first regular expression that is found in a key (behind `base_model.model.`) is
    replaced. Without, a key whose module the model does not have goes through the model's own table of old names.
    """
    old = table(model.model) if mapping is None else None

    far = sys.maxsize

    def rest(bare: str, root: bool = True) -> int:
        """How many parts of a key stand behind the longest module's name in it: the fewer, the better it fits.

        root: whether the name may have no dot: a whole layer's, for any module has some part of another's name.
        """
        head = next((h for h in keys.heads(bare) if "." in h and model.plain(h)[0] in model.modules), None)
        layer = keys.split(bare, ends) if root and head is None else None
        if layer and layer[0] and model.plain(layer[0])[0] in model.modules:
            head = layer[0]
        elif head is None and root and model.whole_site(bare) is not None:
            head = bare.rpartition(".")[0]
        return far if head is None else bare.removeprefix(head).count(".")

    def rename(key: str) -> str:
        head = next((h for h in (keys.PREFIX, "base_model.") if key.startswith(h)), "")
        bare = key.removeprefix(head)
        for expression, new in (mapping or {}).items():
            renamed, count = re.subn(expression, new, bare)
            if count:
                return head + renamed
        stem = getattr(model.model, "base_model_prefix", None) or "module"
        # trained with a head that this model has not, or without the one that it has
        less = [bare.removeprefix(f"{s}.") for s in dict.fromkeys((*_STEMS, stem))]
        tried = {bare: rest(bare)} if bare not in model.sites else {bare: 0}
        if tried[bare] > 2:  # not the tensor of one layer
            tried |= {other: rest(other) for other in (*([old(bare)] if old else ()), *less) if other not in tried}
            tried |= {f"{stem}.{bare}": rest(f"{stem}.{bare}", root=False)}
        return head + min(tried, key=tried.__getitem__)

    return rename


def called(model: keys.PeftNames, pairs: Mapping[str, str], rename: Rename, mapped: bool) -> dict[str, str]:
    """{module: its name in the file}: a configuration's patterns and names are about these.

    A module that has tensors in the file is called as their keys say. For any other, the name is one from which
    `rename` makes its own; where there is none, the file's model had no such module, and it is left out.

    pairs: a key in this model → the file's. mapped: whether the user gave a mapping.
    """
    found: dict[str, str] = {}
    heads: dict[str, str] = {}  # what stands before the common rest of a name: here → in the file
    for new, old in pairs.items():
        new, old = (k.removeprefix(keys.PREFIX).removeprefix("base_model.") for k in (new, old))
        head = next((h for h in keys.heads(new) if model.plain(h)[0] in model.modules), None)
        if head is None or not old.endswith(tail := new.removeprefix(head)):
            continue
        module, file_s = model.plain(head)[0], old.removesuffix(tail)
        file_s = file_s if head == module else keys.without_wrappers(file_s)
        found.setdefault(module, file_s)
        if module != file_s:
            a, b = module.split("."), file_s.split(".")
            while a and b and a[-1] == b[-1]:
                a, b = a[:-1], b[:-1]
            heads.setdefault(".".join(a), ".".join(b))
    if not heads and not mapped:
        return {m: m for m in model.modules if m}
    order = sorted(heads.items(), key=lambda pair: -len(pair[0]))

    def name(module: str) -> str | None:
        inside = (_moved(module, new, old) for new, old in order if not new or f"{module}.".startswith(f"{new}."))
        probe = f"{keys.PREFIX}{module}.weight"
        return next((n for n in (*inside, module) if n and rename(f"{keys.PREFIX}{n}.weight") == probe), None)

    names = {m: found.get(m) or name(m) for m in model.modules if m}
    return {m: n for m, n in names.items() if n is not None}


def _moved(module: str, new: str, old: str) -> str:
    """The name with the head `new` replaced by `old`; either may be empty."""
    return f"{old}.{module.removeprefix(new).removeprefix('.')}".strip(".")


def cure(model: keys.PeftNames, key: str) -> str:
    """A hint for a key whose module stands elsewhere in this model: the key_mappings that lead there."""
    words = unwrapped(key).removeprefix(keys.PREFIX).split(".")
    for i in range(len(words)):  # the longest part of the name that this model has, layers' numbers and all
        for n in range(len(words), i + 2, -1):
            tail = ".".join(words[i:n])
            hits = [m for m in model.modules if m.endswith(f".{tail}") or m == tail]
            if i == 0 and tail in hits:
                return ""
            if hits:
                there = re.escape(".".join(words[:i]) + "." * bool(i))
                maps = " or ".join(f"key_mapping={{r'^{there}': {m.removesuffix(tail)!r}}}" for m in hits[:3])
                return f"; this model has {' and '.join(hits[:3])}: for a file of its other half, give {maps}"
    return ""


def table(model: nn.Module) -> Callable[[str], str] | None:
    """Old name → new name of a tensor of the model, where the model has such a table."""
    mapping = getattr(model, "_checkpoint_conversion_mapping", None)
    if isinstance(mapping, dict) and mapping:
        pairs = list(mapping.items())

        def first(key: str) -> str:
            for expression, new in pairs:
                renamed, count = re.subn(expression, new, key)
                if count:
                    return renamed
            return key

        return first
    transformers: Any = sys.modules.get("transformers")  # a model of its classes means that it is there
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # an older release, which has no such table
        return None
    steps = [s for s in get_model_conversion_mapping(model) if type(s) is WeightRenaming]

    def all_of(key: str) -> str:
        for step in steps:
            key = step.rename_source_key(key)[0]
        return key

    return all_of if steps else None
