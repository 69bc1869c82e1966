"""PEFT's tensors without a configuration: a method says what they mean, and their shapes say the ranks."""

import re
from pathlib import Path
from typing import Any

from peftfn.core.method import Method
from peftfn.formats import peft
from peftfn.formats.files import Loaded, Options
from peftfn.formats.peft_config import checked, declared
from peftfn.formats.peft_keys import clean
from peftfn.formats.peft_names import unwrapped
from peftfn.formats.tensor_files import Tensors, opened
from peftfn.model.model import Model

_RANKED = re.compile(r"(?P<module>.+)\.(lora_A|lora_embedding_A|hira_A|hada_w1_b)(\.[^.]+)?(\.weight)?")
"""Tensors whose first size is the rank."""


def load(path: Path, model: Model, method: Any, options: Options) -> Loaded:
    """The adapter in a file of PEFT's tensors, or in its folder. ValueError where a configuration is there."""
    if path.is_dir() and (path / peft.CONFIG).is_file():
        raise ValueError(
            f"load: method= is for tensors without a configuration, and {path} has {peft.CONFIG}: leave it out"
        )
    where = path / peft.TENSORS if path.is_dir() else path
    with opened(where) as file:
        return peft.build(model, configuration(method, file), file, where, options)


def configuration(method: Any, file: Tensors) -> dict[str, Any]:
    """What PEFT's configuration says of the method, with the file's ranks. An alpha that is not given is the rank."""
    if not isinstance(method, Method):
        raise TypeError(f"load: method is a {type(method).__name__}; give a method, peftfn.LoRA(alpha=16) for one")
    if method.peft is None or not declared(type(method)):  # type: ignore[arg-type]
        raise ValueError(f"load: PEFT has no {method}, so none of its files has its tensors")
    config: dict[str, Any] = {"peft_type": method.peft.type, **method.peft.written(method)}
    config = {k: v for k, v in config.items() if v is not ...}
    if "feedforward_modules" in config:  # names of layers, and here all are of one kind
        config["feedforward_modules"] = ".*" if config["feedforward_modules"] else None
    found = {
        m["module"]: t.shape[0]
        for k, t in file.meta.items()
        if t.dim() and (m := _RANKED.fullmatch(clean(unwrapped(k))))
    }
    if not found:
        return checked(config, file.where)
    config["r"] = max(found.values())
    config["rank_pattern"] = {f"^{re.escape(m)}": r for m, r in found.items() if r != config["r"]}
    if getattr(method, "alpha", 0) is None:
        alpha = "lora_alpha" if "lora_alpha" in config else "alpha"
        config |= {alpha: config["r"], "alpha_pattern": config["rank_pattern"]}
    return checked(config, file.where)
