"""Adapters on disk: one module a format, and `save` and `load` in front of them."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from peftfn.apply import Adapted
from peftfn.formats import native, peft
from peftfn.plan import Adapter

FORMATS: dict[str, Any] = {"native": native, "peft": peft}


def save(path: str | PathLike[str], net: Adapted, adapter: Mapping[str, Any], *, format: str = "native") -> None:
    """Write an adapter, and the plan it belongs to, into the folder `path`.

    Args:
        format: "native" (any method, bit-exact: adapter.safetensors and peftfn.json), or "peft" (what Hugging Face PEFT
            has a configuration for: adapter_model.safetensors and adapter_config.json).
    """
    if format not in FORMATS:
        raise ValueError(f"save: there is no format {format!r}; choose one of {sorted(FORMATS)}")
    net.plan.check(adapter)
    FORMATS[format].save(Path(path), net, adapter)


def load(path: str | PathLike[str], model: nn.Module) -> tuple[Adapted, Adapter]:
    """(net, adapter) from a folder that `save` or PEFT wrote, bound to `model`; each tensor on its site's device."""
    folder = Path(path)
    for module in FORMATS.values():
        if (folder / module.CONFIG).is_file():
            net, adapter = module.load(folder, model)
            return net, adapter
    known = ", ".join(f"{m.CONFIG} ({name})" for name, m in FORMATS.items())
    raise FileNotFoundError(f"{folder} holds no adapter: none of {known} is there")
