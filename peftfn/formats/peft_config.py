"""adapter_config.json: reading it as untrusted input, PEFT's defaults, and what the configuration is at one module."""

import math
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from peftfn.core.fields import MOST_ROUNDS
from peftfn.core.method import Weight, registry
from peftfn.core.peft import is_
from peftfn.formats.files import read_json
from peftfn.formats.peft_table import (
    BONE,
    COUNTS,
    DEFAULTS,
    IGNORED,
    LEGACY,
    PATTERNS,
    SEARCHED,
    STARTS,
    UNPATTERNED,
)
from peftfn.formats.regex import Pattern


class Config(dict[str, Any]):
    """A configuration that remembers which keys were asked for."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)


def read(path: Path) -> dict[str, Any]:
    """The configuration in a file, checked."""
    return checked(read_json(path), path)


def checked(config: Any, path: Path) -> dict[str, Any]:
    """The configuration with PEFT's defaults filled in. ValueError for anything that is none."""
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"{path}: not a PEFT configuration: it must be an object with a string under 'peft_type'")
    if kind == BONE:  # what MiSS was called up to PEFT 0.17; its tensors are renamed where they are read
        kind, config = "MISS", {**config, "peft_type": "MISS"}
    defaults = DEFAULTS.get(kind, {})
    for key, want in defaults.items():
        have = config.get(key, want)
        fits = {bool: (bool,), int: (int, float), float: (int, float), str: (str,)}.get(type(want), (object,))
        if key.startswith("init_") and isinstance(want, bool | str) and isinstance(have, bool | str | None):
            continue  # such keys take either
        wrong = not isinstance(have, fits) or (isinstance(have, bool) and bool not in fits)
        if wrong and object not in fits:
            raise ValueError(f"{path}: {key} is {have!r}, and PEFT's {kind} has a {type(want).__name__} there")
        if key in COUNTS and have > MOST_ROUNDS:
            raise ValueError(f"{path}: {key} is {have}; at most {MOST_ROUNDS} are read from files")
        if isinstance(have, float) and not math.isfinite(have):
            raise ValueError(f"{path}: {key} is {have}, which is not finite")
    for key in (*PATTERNS, "trainable_token_indices"):
        names = config.get(key)
        if names and not (isinstance(names, dict) or (key not in PATTERNS and isinstance(names, list))):
            raise ValueError(f"{path}: {key} is {str(names)[:80]}; it must be an object of name → value")
    for key in (
        "target_parameters",
        "modules_to_save",
        "target_modules",
        "exclude_modules",
        "layers_pattern",
        "feedforward_modules",
    ):
        if not all(isinstance(n, str) for n in listed(config.get(key))):
            raise ValueError(f"{path}: {key} is {str(config[key])[:80]}; it must be a list of names")
    if not all(type(n) is int for n in listed(config.get("layers_to_transform"))):
        raise ValueError(f"{path}: layers_to_transform is {str(config['layers_to_transform'])[:80]}; give integers")
    starts = {k: v.lower() for k, v in config.items() if k.startswith("init_") and isinstance(v, str)}
    config = config | {k: v for k, v in starts.items() if v in STARTS}  # PEFT takes them in capitals too
    if kind == "OFT" and "oft_block_size" not in config:
        raise ValueError(
            f"{path}: it has no oft_block_size, so it is of PEFT 0.13 or older, whose OFT was another method"
        )
    return {**defaults, **config}


def listed(value: Any) -> list[Any]:
    """A configuration's list of names: a list, one name, or nothing."""
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def at(config: dict[str, Any], module: str, kind: str, where: Path) -> Config:
    """The configuration as it holds for one module: patterns resolved, `feedforward_modules` a truth value; with
    the last part of the `module`'s name and the `kind` of its site."""
    here = Config({**config, "module": module.rpartition(".")[2], "kind": kind})
    for pattern, keys in PATTERNS.items():
        rules: dict[str, Any] = {} if config["peft_type"] in UNPATTERNED else config.get(pattern) or {}
        for key in keys:
            if key in config and rules:
                found = (v for k, v in rules.items() if finder(k, config["peft_type"], where)(module))
                here[key] = next(found, config[key])
    if kind == "embedding" and isinstance(config.get("init_lora_weights"), str):
        here["init_lora_weights"] = True  # at embeddings PEFT knows no other start, and subtracts nothing
    if "feedforward_modules" in config:
        names = config["feedforward_modules"]
        if isinstance(names, str):
            here["feedforward_modules"] = expression(names, where)(module)
        else:
            here["feedforward_modules"] = any(module.endswith(n) for n in listed(names))
    return here


def method(config: dict[str, Any], module: str, kind: str, where: Path) -> Weight:
    """The method that the configuration describes at a module. ValueError for what no method of ours can mean."""
    here = at(config, module, kind, where)
    classes = candidates(config["peft_type"])
    fits = [c for c in classes if c.peft and all(is_(dict.get(here, k), v) for k, v in c.peft.fixed.items())]
    if not fits:
        raise ValueError(f"{where}: peftfn has no method for PEFT's {config['peft_type']} with these options")
    cls = max(fits, key=lambda c: len(c.peft.fixed) if c.peft else 0)
    try:
        assert cls.peft is not None
        found = cls(**cls.peft.read(here))
        hash(found)  # fields are plain values
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise ValueError(f"{where}: at {module}: {cls.__name__} does not accept the values in the file: {e}") from e
    defaults = DEFAULTS.get(config["peft_type"], {})
    here.read |= {*cls.peft.fields.values(), *cls.peft.fixed}
    for key, value in ((k, v) for k, v in here.items() if k in config):
        if key in here.read or key in IGNORED or key.endswith("dropout") or value == defaults.get(key):
            continue
        if key.startswith("init_") and (isinstance(value, bool | float | int) or str(value) in STARTS):
            continue
        if value is None or value is False or value in ("", 0, [], {}):
            continue
        cure = (
            "; save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
            if key == "init_lora_weights"
            else ". If it is known to make no difference, delete it from the file"
        )
        raise ValueError(
            f"{where}: {key} is {value!r}, which {cls.__name__} does not have: the outputs may differ{cure}"
        )
    return found


def family(targets: Any, module: str) -> str:
    """The name in target_modules that matches a module: a regular expression is one for all that it finds."""
    if isinstance(targets, str) and targets.lower() != "all-linear":
        return targets
    return max((n for n in listed(targets) if module.endswith(n)), key=len, default=module.rpartition(".")[2])


def candidates(kind: str) -> list[type[Weight]]:
    """The registered methods that PEFT writes under this type."""
    return [
        c
        for c in registry.values()
        if issubclass(c, Weight) and declared(c) and c.peft is not None and c.peft.type == kind
    ]


def means(key: str, kind: str) -> bool:
    """Whether this release knows a key of the configuration of one of PEFT's types."""
    return (
        key in DEFAULTS.get(kind, ()) or key in IGNORED or any(key in c.peft.fixed for c in candidates(kind) if c.peft)
    )


def declared(cls: type[Weight]) -> bool:
    """Whether PEFT has this very method, and not only the one it is derived from."""
    return vars(cls).get("peft") is not None


def finder(key: Any, kind: str, where: Path) -> Callable[[str], bool]:
    """Whether a module's name matches a key of a pattern, by the rule of PEFT's type."""
    return searcher(key, where) if kind in SEARCHED else matcher(key, where, kind in LEGACY)


def matcher(key: Any, where: Path, legacy: bool = False) -> Callable[[str], bool]:
    """Whether a module's name matches a key of a pattern, by PEFT's rule: the whole name, or its end after a dot.

    legacy: the older rule, an end after a dot or the name itself.
    """
    if re.fullmatch(r"\^?[\w-]+", key):  # by far the most frequent, and quick
        name = key.removeprefix("^")
        return lambda m: m == name or (not key.startswith("^") and m.endswith(f".{name}"))
    fits = expression(key, where)
    if legacy:
        return lambda m: m == key or any(fits(m, i + 1) for i, c in enumerate(m) if c == ".")
    return lambda m: any(fits(m, i) for i in range(len(m)) if i == 0 or m[i - 1] == ".")


def searcher(key: Any, where: Path) -> Callable[[str], bool]:
    """Whether a key of a pattern is found anywhere in a module's name."""
    fits, starts = expression(f"(?:{key.removeprefix('^')}).*", where), key.startswith("^")
    return lambda m: any(fits(m, i) for i in range(1 if starts else len(m)))


@lru_cache
def expression(source: str, where: Path) -> Callable[..., bool]:
    """(name, start) ↦ whether a regular expression from a file matches the name's rest, in bounded time."""
    try:
        pattern = Pattern(source)
        pattern.matches("layers.0.self_attn.q_proj")
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e

    def matches(name: str, start: int = 0) -> bool:
        try:
            return pattern.matches(name, start)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e

    return matches


def chosen(config: dict[str, Any], where: Path) -> tuple[Any, Any, tuple[Any, list[str]]]:
    """(modules, exclude, (layers, layers_pattern)) as `choice.matched` takes them; modules None where no key says."""

    def modules(key: str) -> Any:
        names = config.get(key) or None
        return expression(names, where) if isinstance(names, str) and names.lower() != "all-linear" else names

    lists = [n for n in listed(config.get("layers_pattern")) if n]
    if not all(re.fullmatch(r"[\w.]+", n) for n in lists):
        raise ValueError(f"{where}: layers_pattern is {str(lists)[:80]}; it must be names of lists of layers")
    wanted, layers = modules("target_modules"), config.get("layers_to_transform")
    if layers is not None and wanted is not None and not isinstance(wanted, list):
        raise ValueError(
            f"{where}: layers_to_transform goes with a list of target_modules, and here target_modules is a pattern"
        )
    return wanted, modules("exclude_modules"), (layers, lists)
