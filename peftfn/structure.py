"""Copies of a model's Python structure that share its tensors: what calls run on, and what `as_module` builds on."""

import copy
import types
from typing import Any

from torch import Tensor, nn

from peftfn.quantised import held, share

STANDARD = frozenset(vars(nn.Module())) - {"training", "_is_full_backward_hook"}


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def reachable(model: nn.Module) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """(every module, every parameter outside of a slot) that the model's attributes lead to, in lists and dicts too.

    Raises TypeError for an attribute that is a function over one of the modules: a copy of it would run the original.
    """
    modules = dict.fromkeys(model.modules())
    loose: dict[nn.Parameter, None] = {}
    functions: list[tuple[nn.Module, str, Any]] = []

    def look(value: Any, where: nn.Module, key: str) -> None:
        if isinstance(value, nn.Module):
            fresh = [m for m in value.modules() if m not in modules]
            modules.update(dict.fromkeys(fresh))
            for m in fresh:
                scan(m)
        elif isinstance(value, nn.Parameter):
            loose[value] = None
        elif isinstance(value, list | tuple | set):
            for v in value:
                look(v, where, key)
        elif isinstance(value, dict):
            for v in value.values():
                look(v, where, key)
        elif isinstance(value, types.FunctionType) and value.__closure__:
            functions.append((where, key, value))

    def scan(module: nn.Module) -> None:
        for key, value in vars(module).items():
            if key not in STANDARD:
                look(value, module, key)

    for module in list(modules):
        scan(module)
    for where, key, function in functions:
        for cell in function.__closure__ or ():
            held = getattr(cell.cell_contents, "__self__", cell.cell_contents)
            if isinstance(held, nn.Module) and held in modules:
                raise TypeError(
                    f"{type(where).__name__}.{key} is a function that holds a {type(held).__name__} of the model; "
                    "calls run on a copy of the model's structure, and this would lead back to the model. Make it a "
                    "method, or pass the module as an argument."
                )
    return list(modules), list(loose)


def copy_structure(
    model: nn.Module, modules: list[nn.Module], aliases: dict[int, Any]
) -> tuple[nn.Module, list[nn.Module]]:
    """A copy of the structure, and the copy of each of `modules`. Tensors, hooks and settings are not copied.

    aliases: id of an object → what takes its place in the copy.
    """
    keep: list[Any] = []
    for module in modules:
        keep += [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        keep += [v for k, v in vars(module).items() if is_plain(v) or k.endswith(_HOOKS) or _is_setting(v)]
        keep += held(module)
    memo = {id(value): value for value in keep} | aliases
    try:
        root = copy.deepcopy(model, memo)
        return root, [copy.deepcopy(m, memo) for m in modules]
    except Exception as e:
        raise TypeError(
            f"the model cannot be copied, and calls run on a copy of its structure: {_culprit(model, keep)} raises "
            f"{type(e).__name__}: {e}. Keep such objects out of the module, or give their class a __deepcopy__."
        ) from e


def lasting_copy(model: nn.Module) -> nn.Module:
    """A copy of the structure to be kept and changed: it shares the storage of the parameters, which do not require
    gradients in it, and nothing else. Buffers, hooks and settings are its own; tied parameters stay tied.
    """
    modules, loose = reachable(model)
    tensors = [t for m in modules for t in m._parameters.values() if t is not None] + loose
    aliases: dict[int, Any] = {id(p): share(p) for p in tensors}
    for module in modules:
        for t in module._buffers.values():
            if t is not None and id(t) not in aliases:
                aliases[id(t)] = t.detach().clone()
        for key, value in vars(module).items():
            if id(value) in aliases:
                continue
            if is_plain(value):
                aliases[id(value)] = value.detach().clone()
            elif key.endswith(_HOOKS):
                aliases[id(value)] = copy.copy(value)
            elif _is_setting(value):
                aliases[id(value)] = copy.deepcopy(value)
    return copy_structure(model, modules, aliases)[0]


_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")


def _is_setting(value: Any) -> bool:
    return type(value).__name__.endswith("Config")


def _culprit(model: nn.Module, keep: list[Any]) -> str:
    """The attribute that cannot be copied."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value, {id(v): v for v in [*keep, *model.modules()]})
            except Exception:
                return f"{name}.{key}" if name else key
    return type(model).__name__
