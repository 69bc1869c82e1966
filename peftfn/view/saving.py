"""save_pretrained of a view, which Trainer writes its checkpoints with: the adapters, and the state that is resumed.

transformers would write what looks like a whole model, and read it back as one with random weights. So a view writes
its adapters as `peftfn.save` does, and its state without the frozen base.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.plan import Plan
from peftfn.net.net import Adapted
from peftfn.view.held import bank_tensors, grown
from peftfn.view.loading import refuse_empty
from peftfn.view.module import buffers_of
from peftfn.view.view import constants_of, leaf_at, leaves_of

STATE, CONFIG = "model.safetensors", "config.json"
"""Trainer resumes from the first; transformers takes a folder with the second for a model."""
_IDLE = frozenset({"max_shard_size", "safe_serialization", "save_function", "save_original_format", "token", "variant"})
"""Options of transformers' method that say how a large model is written."""

Named = Mapping[str, tuple[Adapted, Mapping[str, Any]]]
Writer = Callable[[Path, Named, Mapping[str, Tensor], str, Mapping[str, Tensor]], None]
"""(folder, {name: (net, adapter)}, changed buffers, a file's name, its tensors): how `save_pretrained` writes."""


def save_pretrained(
    view: Any,
    folder: str | PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Any] | None = None,
    push_to_hub: bool = False,
    *,
    write: Writer,
    **options: Any,
) -> None:
    """Write the view's adapters, and its state without the frozen base. write: how files are written.

    state_dict: the view's, where a trainer has gathered it.
    """
    refuse_empty(view, "save_pretrained")
    if push_to_hub:
        raise ValueError("save_pretrained: push_to_hub is for models; save, and pass the folder to upload_folder")
    if odd := sorted(options.keys() - _IDLE):
        raise TypeError(f"save_pretrained: a module that as_module made has no option {odd[0]!r}")
    held = dict(view.state_dict() if state_dict is None else state_dict)
    if not is_main_process:
        return
    nets = {name: (_net(view, name), _adapter(view, name, held)) for name in view._peftfn.plans}
    write(Path(folder), nets, buffers_of(view), STATE, dict(_state(view, held)))
    if (Path(folder) / "adapter_config.json").is_file() and getattr(view, "name_or_path", None):
        (Path(folder) / CONFIG).unlink(missing_ok=True)  # from_pretrained follows the base's name in PEFT's
    else:
        view.config.save_pretrained(folder)


def _state(view: Any, held: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What resuming needs, and an empty tensor for a frozen parameter: transformers, which would fill a whole model
    with random weights, refuses its shape, and `load_state_dict` of a view leaves it out."""
    ours = {id(p) for leaf in leaves_of(view) for p in leaf._own().values()} | {id(p) for p in _banks(view).values()}
    named = dict(view.named_parameters(remove_duplicate=False))
    frozen = {k: p for k, p in named.items() if not p.requires_grad and id(p) not in ours}
    kept = named.keys() - frozen.keys() | {k for k, _ in view.named_buffers(remove_duplicate=False)}
    # what is neither is what a quantised layer writes beside its weight, or a module's own state
    yield from ((k, t) for k, t in held.items() if k in kept or k.endswith("_extra_state"))
    plain = (k for k in frozen if ".parametrizations." not in f".{k}")
    yield next(plain, next(iter(next(iter(view._peftfn.plans.values()))))), torch.empty(0)


def _banks(view: Any) -> dict[str, Tensor]:
    """The tensors of the adapters that several sites share, by their names in the view."""
    banks = (paths for of in view._peftfn.banks.values() for paths in of.values())
    return {name: t for paths in banks for name, t in bank_tensors(view, paths).items()}


def _adapter(view: Any, name: str, held: Mapping[str, Tensor]) -> dict[str, Any]:
    """The adapter in a state of the view."""
    out: dict[str, Any] = {}
    tensors = (*view.named_parameters(remove_duplicate=False), *view.named_buffers(remove_duplicate=False))
    names = {id(p): k for k, p in tensors}
    for site in view._peftfn.plans[name]:
        leaf = leaf_at(view, site, name)
        own = {k: held.get(names[id(p)], p).detach() for k, p in leaf._own().items()}
        out[site] = grown(leaf._paths, own)
    for bank, paths in view._peftfn.banks[name].items():
        out[bank] = grown(paths, {k: held.get(k, t).detach() for k, t in bank_tensors(view, paths).items()})
    return out


def _net(view: Any, name: str) -> Adapted:
    """The net of one of the view's adapters, on a copy of the base in the view, with the constants in it."""
    plan: Plan = view._peftfn.plans[name]
    entries = {}
    for site, e in plan.items():
        entries[site] = replace(e, frozen=constants_of(view, leaf_at(view, site, name)))
    return Adapted(_bare(view), Plan(entries, plan.rules, plan.banks))


def _bare(view: Any) -> nn.Module:
    """The base in the view: modules without adapters, to be read and not to be called. They share all tensors."""
    drop = {*_banks(view), *(name for leaf in leaves_of(view) for name in leaf._shared.values())}
    made: dict[nn.Module, nn.Module] = {}

    def bare(module: Any) -> nn.Module:
        if module in made:
            return made[module]
        cls: Any = getattr(module, "_adapted_class", type(module))
        copy = made[module] = cls.__new__(cls)
        slots: Any = module._modules.get("parametrizations", {}) if hasattr(module, "_adapted_class") else {}
        params = {k: None if getattr(v[0], "missing", False) else v._parameters["original"] for k, v in slots.items()}
        params |= {k: p for k, p in module._parameters.items() if module is not view or k not in drop}
        vars(copy).update({k: v for k, v in vars(module).items() if k not in ("forward", "_peftfn")})
        vars(copy)["_parameters"] = params
        vars(copy)["_buffers"] = {k: b for k, b in module._buffers.items() if module is not view or k not in drop}
        children = {k: m for k, m in module._modules.items() if m is not slots}
        vars(copy)["_modules"] = {k: m if m is None else bare(m) for k, m in children.items()}
        return copy

    return bare(view)
