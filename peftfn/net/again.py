"""A layer of a skeleton as a function of tensors that can run again, when its call may be over: rematerialisation."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from peftfn.model.names import matches, near
from peftfn.slots.call import Call
from peftfn.slots.slot import Slot
from peftfn.tensors.arguments import mapped, visit
from peftfn.tensors.remat import remat

_PLAIN = (
    Tensor,
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(None),
    torch.dtype,
    torch.device,
    nn.Module,
)


def rematerialised(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    slots_of: Callable[[nn.Module], Mapping[str, Any]],
    filled: Callable[[Mapping[str, Any]], AbstractContextManager[None]],
) -> Any:
    """run(*args, **kwargs), of which only the tensors that a transform is over are kept, for `run` to run again.

    They are found in the arguments and in the slots of the layer whose forward `run` is. Where it is that of none, an
    argument is an object that may hold tensors (a cache), or an adapter in it reads what other modules return, or has
    gates that are a function, it runs as it is: more memory, no wrong value.

    slots_of: a layer ↦ what its slots hold, by name. filled: a context in which they hold something else.
    """
    while isinstance(run, partial):
        given: Any = run
        run, args, kwargs = given.func, (*given.args, *args), {**given.keywords, **kwargs}
    layer = getattr(run, "__self__", args[0] if args else None)  # a method, or a function of the layer
    if not isinstance(layer, nn.Module) or not _transparent((args, kwargs)):
        return run(*args, **kwargs)
    slots = slots_of(layer)
    if not all(v.by_itself for v in slots.values() if isinstance(v, Slot | Call)):
        return run(*args, **kwargs)
    found: dict[int, Tensor] = {}

    def see(t: Tensor) -> Tensor:
        if _tracked(t):
            found[id(t)] = t
        return t

    _replaced(slots.values(), see)
    visit((args, kwargs), lambda v: see(v) if isinstance(v, Tensor) else None)

    def f(*tensors: Tensor) -> Any:
        new = dict(zip(found, tensors, strict=True))

        def swap(v: Any) -> Any:
            return new.get(id(v), v) if isinstance(v, Tensor) else v

        with filled(dict(zip(slots, _replaced(slots.values(), swap), strict=True))):
            return run(*mapped(args, swap), **mapped(kwargs, swap))

    return remat(f, *found.values())


def _replaced(values: Iterable[Any], f: Callable[[Tensor], Tensor]) -> list[Any]:
    """What slots hold, with f of each tensor in it. What several of them share stays shared."""
    made: dict[int, Any] = {}
    return [v.mapped(f, made) if isinstance(v, Slot | Call) else f(v) if isinstance(v, Tensor) else v for v in values]


def _transparent(arguments: Any) -> bool:
    """Whether every tensor in the arguments is in sight."""
    seen: list[bool] = []
    visit(arguments, lambda v: seen.append(isinstance(v, _PLAIN)))
    return all(seen)


def _tracked(t: Tensor) -> bool:
    """Whether a transform is over t, or autograd."""
    if t.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def layers_of(model: nn.Module, pattern: str) -> list[str]:
    """The outermost modules with a forward and parts of their own whose names match. ValueError if there is none."""
    names = [n for n, m in model.named_modules() if len(m._modules) and type(m).forward is not nn.Module.forward]
    found: list[str] = []
    for name in names:
        if matches(pattern, name) and not any(name.startswith(outer and f"{outer}.") for outer in found):
            found.append(name)
    if not found:
        raise ValueError(
            f"checkpointed: {pattern!r} matches no module that has parts, of {len(names)}{near(pattern, names)}"
        )
    return found
