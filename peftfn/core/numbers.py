"""Checks of the numbers that a public function is given: against its own signature, and of their range."""

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
    """Decorate a function so that it raises for an argument that must be a number by its signature, and is not one.

    An `int` takes integers, NumPy's too, and no bool; a `float` takes real numbers. Other types that the signature
    names (None, a tensor, a function) pass. The function itself checks what its numbers may be.

    Raises:
        TypeError: a value of another type; it names the function, the parameter and the value.
    """
    may = [(i, name, _kinds(p.annotation)) for i, (name, p) in enumerate(inspect.signature(f).parameters.items())]
    checked = [(i, name, kinds) for i, name, kinds in may if kinds & {int, float} and bool not in kinds]

    @wraps(f)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            for i, name, kinds in checked:
                if i < len(args):
                    _check(f.__name__, name, args[i], kinds)
                elif name in kwargs:
                    _check(f.__name__, name, kwargs[name], kinds)
        return f(*args, **kwargs)

    return call


def above_zero(where: str, **values: float) -> None:
    """Raise ValueError unless every value is a finite number above 0."""
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{where}: {name} is {value!r}; it must be a finite number above 0")


def at_least_zero(where: str, **values: float) -> None:
    """Raise ValueError unless every value is a finite number of at least 0."""
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{where}: {name} is {value!r}; give a finite {name} >= 0")


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
