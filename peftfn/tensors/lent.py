"""Parameters of the base as a call sees them: to read as they are, and to write to without the base's knowing."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from peftfn.tensors.transform import lasting, under_transform


class Lent(Tensor):
    """A parameter of the base in a slot: an alias, until it is written to.

    A forward may keep its weights in bounds: `self.weight.data.clamp_(min=0)`, `self.weight.data = renorm(…)`. What
    can write (`.data`, `.detach()`, methods whose names end in `_`) first gives the alias storage of its own, so that
    the write stays in the call. torch's functions take it for a plain tensor, at no cost; a write through a view
    (`weight[0].zero_()`) is caught by the tensor's version, after it happened.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl
    own: Tensor | None = None  # what holds the alias's storage once it is not the base's
    _is_param = True  # isinstance(…, nn.Parameter), so that a forward may assign it to another parameter's name

    @classmethod
    def of(cls, p: Tensor) -> Tensor:
        alias: Tensor = lend(cls, p)
        return alias

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return _own(self, _get_data)

    @data.setter
    def data(self, value: Tensor) -> None:
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise RuntimeError(
                f"the model's forward sets the .data of a parameter of shape {list(self.shape)} inside a torch.func "
                "transform, which torch does not allow; call the net outside of the transform, or use .backward()"
            )
        _set_data(self, value)
        self.own = None


lend: Any = Tensor._make_subclass
_get_data: Any = Tensor.data.__get__  # type: ignore[attr-defined]
_set_data: Any = Tensor.data.__set__  # type: ignore[attr-defined]


def _own(alias: Lent, then: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """then(alias, …), where the alias has storage of its own: that of a tensor which also counts its own versions, so
    that no write is counted as one to the base."""
    if alias.own is None:
        with beneath(), lasting(), torch.no_grad():
            own = Tensor.clone(alias).as_subclass(Tensor)
            _set_data(alias, own)
        alias.own = own
    out = then(alias.own, *args, **kwargs)
    return alias if out is alias.own else out


def beneath() -> AbstractContextManager[Any]:
    """Outside of every torch.func transform: what is made inside is a plain tensor, as the base's are."""
    return temporarily_clear_interpreter_stack() if under_transform() else nullcontext()


OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")


def _writers() -> None:
    def make(method: Any) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: _own(self, method, *args, **kwargs)

    names = [k for k in dir(Tensor) if k.endswith("_") and not k.startswith("_") and k != "requires_grad_"]
    names += ["detach", "numpy", "__setitem__", *(f"__i{k}__" for k in OPERATORS)]
    for name in names:
        setattr(Lent, name, make(getattr(Tensor, name)))


_writers()


class Computed(Tensor):
    """An adapted weight's value, given to a forward that asks for `.data` or `.detach()`: whoever writes to it, or to a
    view of it, would lose the write, and is told so before. The compiler traces this too.
    """

    site: str
    value: Tensor  # the same as a plain tensor, which the compiler takes everywhere

    @classmethod
    def of(cls, value: Tensor, site: str) -> Tensor:
        if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(value):
            return value
        value = value.detach()
        out = value.as_subclass(cls)
        out.site, out.value = site, value
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first, into = args[0] if args else None, (kwargs or {}).get("out")
        for t in (into, first if _writes(func) else None):
            if isinstance(t, Computed):
                raise RuntimeError(LOST.format(name=t.site))
        if func in _DETACHED:  # as it is already; and inside of vmap the compiler has no `.data`
            return first
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*(t.value if isinstance(t, Computed) else t for t in args), **(kwargs or {}))
        if isinstance(first, Computed) and isinstance(out, Tensor) and _is_view(func, args, out):
            return cls.of(out, first.site)
        return out


def _writes(func: Any) -> bool:
    """Whether it writes to its first argument."""
    if torch.compiler.is_compiling():
        return func in _WRITERS
    return writes(getattr(func, "__name__", ""))


def writes(name: str) -> bool:
    """Whether a function of torch of this name writes to its first argument."""
    operator = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return name in ("__setitem__", "__set__") or operator or (name.endswith("_") and not name.endswith("__"))


# The compiler knows functions of tensors, but not what they are called, nor where a tensor's memory is.
_IN_PLACE = [k for k in dir(Tensor) if k.endswith("_") and not k.startswith("_")]
_WRITERS = {getattr(Tensor, k) for k in (*_IN_PLACE, "__setitem__", *(f"__i{k}__" for k in OPERATORS))}
_DETACHED = {Tensor.detach, Tensor.data.__get__}  # type: ignore[attr-defined]
_NAMES = "expand movedim narrow permute reshape select squeeze t transpose unflatten unsqueeze view view_as"
_VIEWS = {getattr(Tensor, k) for k in _NAMES.split()} | {getattr(Tensor, k).__get__ for k in ("T", "mT", "H", "mH")}


def _is_view(func: Any, args: Any, out: Tensor) -> bool:
    """Whether `out`, which func(*args) gave, has the memory of the first argument."""
    if not torch.compiler.is_compiling():
        with torch._C.DisableTorchFunctionSubclass():
            return args[0].untyped_storage().data_ptr() == out.untyped_storage().data_ptr()  # type: ignore[no-any-return]
    if func is Tensor.__getitem__:  # a tensor of indices makes a copy
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return not any(isinstance(i, Tensor | list) for i in index)
    return func in _VIEWS


LOST = (
    "{name}: the model's forward writes to this weight, which is adapted and so computed anew each time it is read: "
    "the write would be lost. Leave this site out of the rules, merge the adapter and call the model on what `merge` "
    "returns, or have the forward compute a changed weight instead of writing it"
)
REPLACED = (
    "{name}: the model's forward puts another tensor in this weight's place (it ties weights by assignment, say), so "
    "its adapter would not be used. Adapt the weight that is put there, or tie the weights when the model is made"
)
