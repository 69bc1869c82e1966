"""Copies of a model's Python structure that share its tensors: what calls run on, and what `as_module` builds on."""

import copy
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _WrappedHook

from peftfn.model.model import modules_of
from peftfn.model.written import written_by
from peftfn.tensors import loaded
from peftfn.tensors.quantised import held, share

STANDARD = frozenset(vars(nn.Module())) - {"training", "_is_full_backward_hook"} | {"_compiled_call_impl"}

MOVES = frozenset(["to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron"])
"""What accelerate sets on a model that it dispatched, to warn who moves it; a copy has the class's own."""


def is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def reachable(named: Mapping[str, nn.Module]) -> tuple[list[nn.Module], list[nn.Parameter]]:
    """(every module, every parameter outside of a slot) that the model's attributes lead to, in lists and dicts too.

    named: the model's modules by name.

    Raises TypeError for an attribute that is a function over one of the modules, or a weak reference to one: a copy
    would run the original.
    """
    modules = dict.fromkeys(named.values())
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
        elif isinstance(value, functools.partial):
            look([value.func, value.args, value.keywords], where, key)
        elif isinstance(value, types.FunctionType | weakref.ReferenceType):
            functions.append((where, key, value))

    def scan(module: nn.Module) -> None:
        _refuse(module, named)
        skipped = _hooked(module)
        for key, value in vars(module).items():
            if value.__class__ not in _SIMPLE and key not in STANDARD and key not in skipped:
                look(_plain_method(value) or value, module, key)

    for module in list(modules):
        scan(module)
    for where, key, function in functions:
        for reached in _led_to(function, set()):
            if isinstance(reached, nn.Module) and reached in modules:
                what = "a weak reference to" if isinstance(function, weakref.ReferenceType) else "a function that holds"
                raise TypeError(
                    f"{type(where).__name__}.{key} is {what} a {type(reached).__name__} of the model; "
                    "calls run on a copy of the model's structure, and this would lead back to the model. Make it a "
                    "method, or pass the module as an argument."
                )
    return list(modules), list(loose)


def _refuse(module: nn.Module, named: Mapping[str, nn.Module]) -> None:
    """Raise for a module whose copy would not do what it does: one of compiled code, or without weights of its own."""
    if type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        raise TypeError(
            f"torch.compile made a wrapper around a {type(module._orig_mod).__name__} of the model, and calls run "
            "on a copy of the model's structure, which the compiled code does not follow. Adapt the model without "
            "it (model._orig_mod; a layer can be compiled in place, layer.compile()), and compile the call: "
            "torch.compile(net.apply), or torch.compile(peftfn.as_module(net, a))"
        )
    if (hook := loaded.unknown(module)) is not None:
        name = next((n for n, m in named.items() if m is module), type(module).__name__)
        raise ValueError(
            f"{name}: diffusers put a {type(hook).__name__} around this module's forward, which leads back to the "
            "model, and calls run on a copy of the model's structure. Load the model without it; of diffusers' hooks "
            "layerwise casting alone is followed"
        )


def _led_to(value: Any, seen: set[int]) -> Iterator[Any]:
    """All that a function or a weak reference leads to; a copy of the model would share it with the model."""
    if id(value) in seen:
        return
    seen.add(id(value))
    yield value
    inside: list[Any] = []
    if isinstance(value, types.FunctionType):
        cells = [c for c in value.__closure__ or () if c != _EMPTY]
        inside = [c.cell_contents for c in cells]
        inside += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    elif isinstance(value, types.MethodType):
        inside = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        inside = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, weakref.ReferenceType):
        inside = [value()]
    elif isinstance(value, list | tuple | set):
        inside = list(value)
    elif isinstance(value, dict):
        inside = list(value.values())
    for v in inside:
        yield from _led_to(v, seen)


_EMPTY = types.CellType()  # of a name that has no value yet


def _nothing(layer: nn.Module) -> None: ...


def _hooked(module: nn.Module) -> frozenset[str]:
    """The attributes that accelerate's and diffusers' hooks are, and what they set beside them."""
    attributes = vars(module)
    keys = MOVES | {"_hf_hook"} if "_hf_hook" in attributes else frozenset()
    if "_diffusers_hook" in attributes:
        keys |= {"_diffusers_hook", "forward"} if attributes["_diffusers_hook"].hooks else {"_diffusers_hook"}
    return keys


def _plain_method(value: Any) -> types.MethodType | None:
    """The method that torch.compile made this function of: `self.f = torch.compile(self.f)` (GPTQModel's layers)."""
    method = getattr(value, "_torchdynamo_orig_callable", None) if isinstance(value, types.FunctionType) else None
    return method if isinstance(method, types.MethodType) else None


def _plain_(module: nn.Module, copies: Mapping[int, Any]) -> None:
    """Let a copy's compiled methods be the copy's own, as they are: a compiled one would run on the original."""
    for key, value in list(vars(module).items()):
        method = _plain_method(value)
        if method is None or id(method.__self__) not in copies:
            continue
        own = copies[id(method.__self__)]
        if own is module and getattr(type(own), key, None) is method.__func__:
            del vars(module)[key]  # the class's own
        else:
            vars(module)[key] = types.MethodType(method.__func__, own)


def copy_structure(
    model: nn.Module,
    modules: list[nn.Module],
    aliases: dict[int, Any],
    loads: tuple[Callable[[nn.Module], None], Callable[[nn.Module], None]] = (_nothing, _nothing),
) -> tuple[nn.Module, list[nn.Module]]:
    """A copy of the structure, and the copy of each of `modules`. Tensors and settings are not copied.

    The copy has the model's hooks in dictionaries of its own: a forward may install hooks (transformers does when it
    is first asked for hidden states), and these must not come to stand in the model.

    aliases: id of an object → what takes its place in the copy. loads: what hooks that put a layer's tensors in place
    for each call do instead, to the copy of the layer: before the layer's forward, and after.
    """
    keep: list[Any] = []
    for module in modules:
        keep += [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        keep += [v for v in vars(module).values() if is_plain(v) or is_setting(v)]
        keep += held(module)
    own = {id(hooks): hooks.copy() for module in modules for hooks in hooks_of(module)}
    theirs = {id(h): loaded.followed(h, *loads) for m in modules if (h := vars(m).get("_hf_hook")) is not None}
    memo = {id(value): value for value in keep} | own | theirs | aliases
    try:
        root = copy.deepcopy(model, memo)
        copies = [copy.deepcopy(m, memo) for m in modules]
        for module, copied in zip(modules, copies, strict=True):
            for key in _hooked(module) & vars(copied).keys() & MOVES:
                del vars(copied)[key]
            if "_diffusers_hook" in vars(module):
                loaded.follow_(copied, *loads)
            _plain_(copied, memo)
        for hooks in own.values():
            now = followed(hooks, memo)
            hooks.clear()
            hooks.update(now)
        return root, copies
    except Exception as e:
        raise _uncopied(model, keep, e) from e


def check_copy(model: nn.Module) -> None:
    """Raise what `copy_structure` would raise, without making the copy."""
    modules, _ = reachable(modules_of(model))
    keep = [t for m in modules for t in (m, *m._parameters.values(), *m._buffers.values(), *held(m))]
    memo = {id(v): v for v in keep}
    for module in modules:
        skipped = _hooked(module)
        for key, value in vars(module).items():
            if value.__class__ in _SIMPLE or key in STANDARD or key in skipped or is_plain(value) or is_setting(value):
                continue
            try:
                copy.deepcopy(value, memo)
            except Exception as e:
                raise _uncopied(model, keep, e) from e


_SIMPLE = frozenset({bool, int, float, str, type(None)})


def _uncopied(model: nn.Module, keep: list[Any], e: Exception) -> TypeError:
    return TypeError(
        f"the model cannot be copied, and calls run on a copy of its structure: {_culprit(model, keep)} raises "
        f"{type(e).__name__}: {e}. Keep such objects out of the module, or give their class a __deepcopy__."
    )


def lasting_copy(model: nn.Module, copy_base: bool = False, hooked: bool = False) -> nn.Module:
    """A copy of the structure to be kept and changed: it shares the storage of the parameters, which do not require
    gradients in it, and nothing else. Buffers, hooks and settings are its own, and so is a parameter that the model's
    own forward writes to; tied parameters stay tied.

    copy_base: whether all parameters have storage of their own. hooked: whether layers may lack weights, which a hook
    puts in place for each call; the copy has no such hooks.

    Raises ValueError for a layer whose weights a hook puts in place for each call: there are none to share.
    """
    named = modules_of(model)
    for name, module in named.items():
        if not hooked and loaded.source_of(module) is not None:
            raise ValueError(
                f"{name or 'the model'}: a hook of accelerate or diffusers puts this layer's weights in place for each "
                "call (offload, layerwise casting), so no module can share them. Use the net, whose apply, mixed, init "
                "and merge follow the hook; or take it off, accelerate.hooks.remove_hook_from_submodules(model)"
            )
    modules, loose = reachable(named)
    tensors = [t for m in modules for t in m._parameters.values() if t is not None] + loose
    aliases: dict[int, Any] = {id(p): share(p) for p in tensors}
    written = [m._parameters[k] for m in modules for k in written_by(m)]
    for p in {id(p): p for p in (tensors if copy_base else written)}.values():
        aliases[id(p)] = share(copy.deepcopy(p))
    for module in modules:
        for t in module._buffers.values():
            if t is not None and id(t) not in aliases:
                aliases[id(t)] = t.detach().clone()
        for value in vars(module).values():
            if id(value) in aliases:
                continue
            if is_plain(value):
                aliases[id(value)] = value.detach().clone()
            elif is_setting(value):
                aliases[id(value)] = copy.deepcopy(value)
    root, copies = copy_structure(model, modules, aliases)
    for copied in copies if hooked else ():
        loaded.unhook_(copied)
    return root


def lasting_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The model's own persistent buffers by name, which a checkpoint of it has."""
    return {
        f"{path}.{k}" if path else k: t
        for path, m in model.named_modules()
        for k, t in m._buffers.items()
        if t is not None and k not in m._non_persistent_buffers_set
    }


HOOKS = tuple(k for k in STANDARD if k.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")))


def hooks_of(module: nn.Module) -> list[dict[int, Any]]:
    """The module's dictionaries of hooks, in one order for all modules."""
    attributes = vars(module)
    return [attributes[k] for k in HOOKS if k in attributes]


_NEEDLESS = frozenset(["make_inputs_require_grads", "make_inputs_require_grad"])
"""Hooks of transformers and PEFT that make the embeddings' output require a gradient, for reentrant checkpoints of
layers with frozen weights. A call has no use for them, and torch.func does not allow what they do."""


def followed(hooks: Mapping[int, Any], copies: dict[int, Any]) -> dict[int, Any]:
    """A module's hooks as a copy of the model has them."""
    return {k: follow(hook, copies) for k, hook in hooks.items() if getattr(hook, "__name__", "") not in _NEEDLESS}


def follow(hook: Any, copies: dict[int, Any]) -> Any:
    """The hook as a copy of the model has it: a module that it is bound to is the copied one. Other objects that it
    reaches are the owner's, who may look there for what the hook wrote.

    copies: id of a module → its copy.
    """
    if isinstance(hook, types.MethodType):
        return types.MethodType(hook.__func__, copies.get(id(hook.__self__), hook.__self__))
    if isinstance(hook, functools.partial):
        args = (copies.get(id(v), v) for v in hook.args)
        keywords = {k: copies.get(id(v), v) for k, v in hook.keywords.items()}
        return functools.partial(follow(hook.func, copies), *args, **keywords)
    if isinstance(hook, _WrappedHook) and hook.with_module:  # keeps a weak reference to its module
        return _WrappedHook(hook.hook, copies.get(id(hook.module()), hook.module()))
    return hook


def is_setting(value: Any) -> bool:
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
