"""Parameters of the base as a call sees them: to read as they are, and to write to without the base's knowing."""

import dis
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
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


def _writers() -> None:
    def make(method: Any) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: _own(self, method, *args, **kwargs)

    names = [k for k in dir(Tensor) if k.endswith("_") and not k.startswith("_") and k != "requires_grad_"]
    operators = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
    names += ["detach", "numpy", "__setitem__", *(f"__i{k}__" for k in operators)]
    for name in names:
        setattr(Lent, name, make(getattr(Tensor, name)))


_writers()


def written_by(module: nn.Module) -> set[str]:
    """The names of the parameters that the module's own forward writes to, by the look of its code.

    Needed where no `Lent` can stand in the slot: in a module that `as_module` makes, whose parameters are real ones,
    and in compiled code. Like any look at code it may miss what an odd forward does.
    """
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return {"weight"}
    names = {k for k, p in module._parameters.items() if p is not None}
    cls: Any = type(module)
    return names & _written(cls) if names else names


@cache
def _written(cls: Any) -> frozenset[str]:
    """Attributes that the forward of a class writes to in place or through `.data`."""
    found: set[str] = set()
    for code in _codes(cls):
        steps = [i for i in dis.get_instructions(code) if i.opname not in _CALLS]
        loads = [i.argval if i.opname in ("LOAD_ATTR", "LOAD_METHOD") else None for i in steps]
        loosely = any(i.argval == "data" and i.opname.endswith("_ATTR") for i in steps)
        loosely |= any(i.opname == "KW_NAMES" and "out" in code.co_consts[i.arg or 0] for i in steps)
        for k, name in enumerate(loads):
            if name is not None and (loosely or _is_written(steps[k - 2 : k - 1], steps[k + 1 : k + 4])):
                found.add(name)
    return frozenset(found)


_CALLS = frozenset(["PRECALL", "CALL", "CACHE", "PUSH_NULL"])


def _is_written(before: list[dis.Instruction], after: list[dis.Instruction]) -> bool:
    """Whether an attribute is written to, by the steps around the one that loads it: `self.w.add_(…)`,
    `self.w.detach().add_(…)`, `self.w[i].add_(…)`, `self.w[i] = …`, `init.zeros_(self.w)`.
    """
    if [i.opname for i in after[1:2]] == ["STORE_SUBSCR"]:
        return True
    if [i.opname for i in after[1:2]] == ["BINARY_SUBSCR"]:
        after = after[2:]
    elif [i.argval for i in after[:1]] == ["detach"]:
        after = after[1:]
    return any(i.opname in ("LOAD_ATTR", "LOAD_METHOD") and _writes(i.argval) for i in [*before, *after[:1]])


def _codes(cls: type) -> Iterator[CodeType]:
    """The code of a class's forward, and of the methods of its own that this names; torch's own classes are known."""
    todo, seen = ["forward"], {"forward"}
    while todo:
        name = todo.pop()
        for owner in cls.__mro__:
            function = inspect.unwrap(vars(owner)[name]) if callable(vars(owner).get(name)) else None
            if owner.__module__.partition(".")[0] == "torch" or not inspect.isfunction(function):
                continue
            yield function.__code__
            fresh = [k for k in function.__code__.co_names if k not in seen and hasattr(cls, k)]
            seen.update(fresh)
            todo += fresh


class Computed(Tensor):
    """An adapted weight's value, given to a forward that asks for `.data` or `.detach()`: whoever writes to it, or to a
    view of it, would lose the write, and is told so before.
    """

    site: str

    @classmethod
    def of(cls, value: Tensor, site: str) -> Tensor:
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(value):
            return value
        out = value.detach().as_subclass(cls)
        out.site = site
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        for t in (args[0] if args else None, kwargs.get("out")):
            if isinstance(t, Computed) and (t is kwargs.get("out") or _writes(name)):
                raise RuntimeError(LOST.format(name=t.site))
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        source = args[0] if args else None
        if isinstance(source, Computed) and isinstance(out, Tensor) and _share(source, out):
            return cls.of(out, source.site)
        return out


LOST = (
    "{name}: the model's forward writes to this weight, which is adapted and so computed anew each time it is read: "
    "the write would be lost. Leave this site out of the rules, merge the adapter and call the model on what `merge` "
    "returns, or have the forward compute a changed weight instead of writing it"
)
REPLACED = (
    "{name}: the model's forward puts another tensor in this weight's place (it ties weights by assignment, say), so "
    "its adapter would not be used. Adapt the weight that is put there, or tie the weights when the model is made"
)


def _share(a: Tensor, b: Tensor) -> bool:
    with torch._C.DisableTorchFunctionSubclass():
        return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _writes(name: str) -> bool:
    operator = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return name in ("__setitem__", "__set__") or operator or (name.endswith("_") and not name.endswith("__"))
