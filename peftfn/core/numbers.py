"""Numbers that a public function is given are checked against its own signature, before any work."""

import inspect
import numbers
import types
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar, Union, get_args, get_origin

import torch

P = ParamSpec("P")
R = TypeVar("R")


def checks_numbers(f: Callable[P, R]) -> Callable[P, R]:
    """Let a function raise for an argument that its signature says is a number, and that is none.

    An `int` takes integers, NumPy's too, and no bool; a `float` takes real numbers, and no NaN. What else the signature
    names (None, a tensor, a function) is taken as it is. What a number may be beside that, the function itself says.

    Raises:
        TypeError: a value of another type; it names the function, the parameter and the value.
        ValueError: NaN.
    """
    signature = inspect.signature(f)
    may = {name: _kinds(p.annotation) for name, p in signature.parameters.items()}
    checked = {name: kinds for name, kinds in may.items() if kinds & {int, float} and bool not in kinds}

    @wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:  # f's own words for it are Python's
                return f(*args, **kwargs)
            for name, kinds in checked.items():
                if name in given:
                    _check(f.__name__, name, given[name], kinds)
        return f(*args, **kwargs)

    return call


def _kinds(annotation: Any) -> frozenset[Any]:
    """The types that a parameter may have."""
    if get_origin(annotation) in (Union, types.UnionType):
        return frozenset().union(*(_kinds(a) for a in get_args(annotation)))
    return frozenset({get_origin(annotation) or annotation})


def _check(where: str, name: str, value: Any, kinds: frozenset[Any]) -> None:
    if isinstance(value, Mapping) or any(isinstance(value, k) for k in kinds - {int, float} if isinstance(k, type)):
        return  # an adapter in a number's place: the function says in what order it takes things
    number = numbers.Real if float in kinds else numbers.Integral
    if isinstance(value, bool) or not isinstance(value, number):
        what = "a number" if float in kinds else "an integer"
        raise TypeError(f"{where}: {name} is {value!r}; give {what}{' or None' if types.NoneType in kinds else ''}")
    if value != value:
        raise ValueError(f"{where}: {name} is {value!r}; give a number")
