"""Layers whose tensors a hook puts in place for each call: offloaded ones, and ones kept in a smaller dtype.

Between calls such a layer holds tensors without values (accelerate's offload to CPU or disk), or ones that it does not
compute with (layerwise casting, a whole model that waits on the CPU). The hooks are told by what they have, since their
libraries may not be installed; `Source` says what they would put in place, and is asked anew each time.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Spot = tuple[str, dict[str, Any], str]  # (a tensor's name inside of the hooked layer, the dict that holds it, key)
Place = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Source:
    """What a hook puts in place when its layer is called."""

    stored: Mapping[str, Tensor] | None  # where the values are; None: in the layer itself
    device: torch.device | None = None  # where the layer computes, and in which dtype; None: as it holds them
    dtype: torch.dtype | None = None
    deep: bool = True  # whether it does so for the layer's parts too
    buffers: bool = True  # and for buffers

    def spots(self, layer: nn.Module, buffers: bool = False) -> Iterator[Spot]:
        """The layer's parameters, or buffers, that the hook puts in place."""
        if buffers and not self.buffers:
            return
        for path, m in layer.named_modules(remove_duplicate=False) if self.deep else [("", layer)]:
            for k, t in (m._buffers if buffers else m._parameters).items():
                if t is not None and not (buffers and k in m._non_persistent_buffers_set):
                    yield (f"{path}.{k}" if path else k), m._buffers if buffers else m._parameters, k

    def dtype_of(self, held: Tensor) -> torch.dtype:
        """The dtype in a call of a tensor of the layer."""
        return self.dtype if self.dtype is not None and held.is_floating_point() else held.dtype

    def load(self, name: str, held: Tensor) -> Tensor:
        """The tensor of this name as it is in a call; held: as it is between calls. It may be the stored one itself."""
        t = held if self.stored is None else self.stored[name]
        return t.detach().to(self.device or t.device, self.dtype_of(held))

    def kept(self, name: str, held: Tensor) -> Tensor:
        """The tensor where it is between calls."""
        return held.detach() if self.stored is None else self.stored[name].detach().to(self.dtype_of(held))


def source_of(layer: nn.Module) -> Source | None:
    """What a hook puts in place when the layer is called; None if there is no such hook."""
    attributes = vars(layer)
    if "_hf_hook" not in attributes and "_diffusers_hook" not in attributes:
        return None
    return next((s for h in hooks(layer) if (s := _source(h)) is not None), None)


def hooks(layer: nn.Module) -> list[Any]:
    """accelerate's and diffusers' hooks of a layer."""
    one, registry = vars(layer).get("_hf_hook"), vars(layer).get("_diffusers_hook")
    theirs = [] if registry is None else list(registry.hooks.values())
    return [*([] if one is None else getattr(one, "hooks", [one])), *theirs]


def _source(hook: Any) -> Source | None:
    if getattr(hook, "offload", False) is True:
        return Source(
            hook.weights_map, _device(hook), deep=hook.place_submodules, buffers=hook.offload_buffers
        )  # accelerate's cpu_offload, disk_offload, and such parts of a device_map
    if hasattr(hook, "storage_dtype") and hasattr(hook, "compute_dtype"):
        return Source(None, dtype=hook.compute_dtype)  # layerwise casting, of accelerate or diffusers
    if type(hook).__name__ == "CpuOffload":
        return Source(None, _device(hook))  # accelerate's cpu_offload_with_hook, diffusers' enable_model_cpu_offload
    return None


def _device(hook: Any) -> torch.device | None:
    return None if hook.execution_device is None else torch.device(hook.execution_device)


def sources_in(modules: Mapping[str, nn.Module]) -> dict[str, tuple[Source, str]]:
    """Parameter → (what a hook puts there in a call, its name for the hook). Of two hooks the inner one counts.

    modules: every name of each module.
    """
    out = {}
    for prefix, module in modules.items():
        if (source := source_of(module)) is not None:
            for name, _, _ in source.spots(module):
                out[f"{prefix}.{name}" if prefix else name] = source, name
    return out


class Weights(Mapping[str, Any]):
    """Tensors by name, of which some are loaded when they are asked for, each time.

    held: what there is without loading. sources: of those to be loaded.
    """

    def __init__(self, held: Mapping[str, Any], sources: Mapping[str, tuple[Source, str]]):
        self.held, self.sources = held, sources

    def __getitem__(self, name: str) -> Any:
        held = self.held[name]
        if name not in self.sources:
            return held
        source, key = self.sources[name]
        return source.load(key, held)

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)

    def __contains__(self, name: object) -> bool:
        return name in self.held

    def __or__(self, other: Mapping[str, Any]) -> "Weights":
        return Weights({**self.held, **other}, {n: s for n, s in self.sources.items() if n not in other})

    def kept(self, name: str) -> Tensor:
        """The tensor where it is between calls."""
        source, key = self.sources[name]
        return source.kept(key, self.held[name])


def peek(weights: Mapping[str, Any], name: str) -> Any:
    """weights.get(name), to look at its shape alone: what is not there is not loaded."""
    return weights.held.get(name) if isinstance(weights, Weights) else weights.get(name)


class Loads:
    """In a copy of a layer, what stands for one of the layer's hooks; accelerate's wrapper of the forward calls it.

    load and unload put tensors into the copy and take them away. What else the hook does (inputs are moved to the
    layer's device, outputs back) a private copy of it does.
    """

    def __init__(self, hook: Any, load: Place, unload: Place):
        self.load, self.unload = load, unload
        self.rest = copy.copy(hook) if hasattr(hook, "offload") else None
        if self.rest is not None:
            self.rest.offload = False
        self.no_grad = getattr(hook, "no_grad", False)

    def pre_forward(self, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.load(layer)
        return (args, kwargs) if self.rest is None else self.rest.pre_forward(layer, *args, **kwargs)

    def post_forward(self, layer: nn.Module, output: Any) -> Any:
        self.unload(layer)
        return output if self.rest is None else self.rest.post_forward(layer, output)


def followed(hook: Any, load: Place, unload: Place) -> Any:
    """accelerate's hook as a copy of its layer has it."""
    made = copy.copy(hook)
    if hasattr(hook, "hooks"):
        made.hooks = tuple(followed(h, load, unload) for h in hook.hooks)
        return made
    return made if _source(hook) is None else Loads(hook, load, unload)


def run(load: Place, unload: Place, layer: nn.Module, forward: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a copy of a layer that had diffusers' hook around it."""
    load(layer)
    out = forward(layer, *args, **kwargs)
    unload(layer)
    return out


def follow_(layer: Any, load: Place, unload: Place) -> None:
    """Have a copy of a layer that diffusers hooked run its own forward: the hook's leads to the layer itself."""
    if vars(layer).pop("_diffusers_hook").hooks:
        vars(layer)["forward"] = partial(run, load, unload, layer, type(layer).forward)


def unhook_(layer: nn.Module) -> None:
    """Have a copy of a layer run without accelerate's hook."""
    if vars(layer).pop("_hf_hook", None) is not None:
        vars(layer)["forward"] = vars(layer).pop("_old_forward")


def unknown(layer: nn.Module) -> Any:
    """A hook of diffusers that a copy of the layer would not have; None if there is none."""
    registry: Any = vars(layer).get("_diffusers_hook")
    if registry is None or not registry.hooks:
        return None
    theirs = list(registry.hooks.values())
    if "_hf_hook" in vars(layer) or not _is_own(registry._fn_refs[0].forward, layer):
        return theirs[0]
    return next((h for h in theirs if not hasattr(h, "storage_dtype")), None)


def _is_own(forward: Any, layer: nn.Module) -> bool:
    """Whether it is the forward of the layer's class."""
    return getattr(forward, "__func__", None) is type(layer).forward
