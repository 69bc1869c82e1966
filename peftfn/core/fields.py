"""Types of hyper-parameters that check themselves, and checks for what a type cannot say.

A field of a method says by its type what values it may have; making the method checks them:

    rank: PositiveInt = 8
    dropout: Probability = 0.0
    init_weights: Start = "default"

A plain bool, int, float or str is checked for being that, and finite.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


def _is_number(value: Any) -> bool:
    """Whether it is a float, or an integer that torch can hold."""
    return isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


LARGEST = 2**29
"""Of a rank, a size or a count: the bytes of a square matrix of a larger one overflow torch's own numbers."""


MOST_ROUNDS = 1000
"""Of a loop in a method, which a file may ask for: none needs as many."""


def positive_int(method: Any, **values: Any) -> None:
    """Raise ValueError unless every value is an integer from 1 to `LARGEST`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            cure = f"give {name} <= {LARGEST}" if _is_number(value) and value > LARGEST else f"give {name} >= 1"
            raise ValueError(f"{type(method).__name__}.{name} is {value!r}; it must be a positive integer: {cure}")


def rounds(method: Any, **values: Any) -> None:
    """Raise ValueError unless every value is an integer from 0 to `MOST_ROUNDS`."""
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_ROUNDS:
            raise ValueError(
                f"{type(method).__name__}.{name} is {value!r}; it must be an integer: give 0 <= {name} <= {MOST_ROUNDS}"
            )


def positive(method: Any, **values: Any) -> None:
    """Raise ValueError unless every value is a finite number > 0, and an integer if the field is an int."""
    types = {f.name: f.type for f in dataclasses.fields(method)}
    for name, value in values.items():
        if types.get(name) in (int, "int"):
            positive_int(method, **{name: value})
            continue
        if not _is_number(value) or not 0 < value < math.inf:
            raise ValueError(
                f"{type(method).__name__}.{name} is {value!r}; it must be a finite number above 0: give {name} > 0"
            )


def probability(method: Any, **values: Any) -> None:
    """Raise ValueError unless every value is in [0, 1)."""
    for name, value in values.items():
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise ValueError(
                f"{type(method).__name__}.{name} is {value!r}; it must be a probability: give 0 <= {name} < 1"
            )


def choice(method: Any, name: str, options: tuple[Any, ...]) -> None:
    """Raise ValueError unless the field `name` is one of the options."""
    value = getattr(method, name)
    if value not in options:
        raise ValueError(f"{type(method).__name__}.{name} is {value!r}; choose one of {list(options)}")


def divides(method: Any, name: str, block: int, **sizes: int) -> None:
    """Raise ValueError unless `block` (the field `name`) divides every size."""
    for size_name, size in sizes.items():
        if size % block:
            near = [k for d in range(1, math.isqrt(size) + 1) if size % d == 0 for k in {d, size // d}]
            raise ValueError(
                f"{type(method).__name__}.{name} is {block}, which does not divide {size_name}={size}: "
                f"choose one of {sorted(near, key=lambda d: abs(d - block))[:5]}"
            )


PLAIN = {bool: "True or False", int: "an integer of 64 bits", float: "a finite number", str: "a string"}
"""Types of fields that any value of the type fits, and what that is."""


def plain(method: Any, name: str, kind: type, optional: bool = False) -> None:
    """Raise ValueError unless the field `name` is of a type in `PLAIN`: a NaN in it, or a string, would reach y."""
    value = getattr(method, name)
    if kind in (bool, str):
        fits = isinstance(value, kind)
    else:
        fits = _is_number(value) and math.isfinite(value) and (kind is float or isinstance(value, int))
    if not fits and not (optional and value is None):
        raise ValueError(
            f"{type(method).__name__}.{name} is {value!r}; give {PLAIN[kind]}{', or None' if optional else ''}"
        )


def at_most(method: Any, name: str, **sizes: int) -> None:
    """Raise ValueError if the field `name` is above one of the sizes."""
    value, (size_name, size) = getattr(method, name), min(sizes.items(), key=lambda item: item[1])
    if value > size:
        raise ValueError(f"{type(method).__name__}.{name} is {value}, above {size_name}={size}: give {name} <= {size}")


PositiveInt = Annotated[int, positive_int]
"""Type of a field that is a positive integer: a rank, a size, a count."""
Rounds = Annotated[int, rounds]
"""Type of a field that counts the rounds of a loop: the terms of a series, the steps of an iteration."""
Positive = Annotated[float, positive]
"""Type of a field that is a finite number above 0."""
Probability = Annotated[float, probability]
"""Type of a field that is a probability."""


@cache
def checks_of(cls: Any) -> list[tuple[str, Callable[[Any], None]]]:
    """The checks that the types of a method's fields ask for: `PositiveInt` and its like, `Literal`s, and `PLAIN`."""
    hints = get_type_hints(cls, include_extras=True)

    def checks(name: str) -> Iterator[Callable[[Any], None]]:
        hint, optional = hints[name], False
        if get_origin(hint) in (Union, UnionType):
            some = [h for h in get_args(hint) if h is not type(None)]
            hint, optional = some[0] if len(some) == 1 else Any, type(None) in get_args(hint)
            if set(some) == {int, float}:
                hint = float
        if get_origin(hint) is Literal:
            yield lambda m: choice(m, name, (*get_args(hint), *([None] if optional else [])))
        if hint in PLAIN:
            yield lambda m: plain(m, name, hint, optional)
        for check in getattr(hint, "__metadata__", ()):
            yield lambda m, check=check: (  # type: ignore[misc]
                None if optional and getattr(m, name) is None else check(m, **{name: getattr(m, name)})
            )

    return [(f.name, check) for f in dataclasses.fields(cls) for check in checks(f.name)]


Start = Literal["default", "random"]
"""Type of `init_weights`: how a fresh leaf starts; "random" is not the identity."""
STARTS = (("default", True), ("random", False))
"""`init_weights` here and PEFT's flag."""
