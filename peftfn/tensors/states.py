"""Where a module's hidden states are among its arguments, and in what it returns."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

NAMES = ("hidden_states", "input", "x", "inputs_embeds")
"""Keyword arguments that are hidden states, if there are others of tensors too."""


def states_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Callable[[Tensor], tuple[Any, Any]]]:
    """(the hidden states among the arguments of a forward, other ones ↦ the arguments with them in their place).

    They are the first positional argument, if that is a tensor; else the keyword argument of one of `NAMES`, or the
    first that is a tensor. ValueError if there is none.
    """
    if args and isinstance(args[0], Tensor):
        return args[0], lambda x: ((x, *args[1:]), kwargs)
    named = [k for k in NAMES if isinstance(kwargs.get(k), Tensor)]
    k = next((k for k in [*named, *kwargs] if isinstance(kwargs[k], Tensor)), None)
    if k is None:
        raise ValueError("its arguments have no hidden states: none of them is a tensor")
    return kwargs[k], lambda x: (args, {**kwargs, k: x})


def states_out(out: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """(the hidden states in what a forward returned, other ones ↦ the output with them in their place).

    They are the output itself, the first element of a tuple or list, or the first tensor of a mapping (transformers'
    `ModelOutput`). ValueError if there are none.
    """
    if isinstance(out, Tensor):
        return out, lambda y: y
    if isinstance(out, tuple | list) and out and isinstance(out[0], Tensor):
        return out[0], lambda y: _of(out, (y, *out[1:]))
    if isinstance(out, Mapping):
        k = next((k for k, v in out.items() if isinstance(v, Tensor)), None)
        if k is not None:
            return out[k], lambda y: type(out)(**{**out, k: y})
    raise ValueError(f"it returns a {type(out).__name__}, in which there are no hidden states")


def _of(out: Any, values: tuple[Any, ...]) -> Any:
    """A tuple or list of the class of `out`; named tuples take their values one by one."""
    return type(out)(*values) if hasattr(out, "_fields") else type(out)(values)
