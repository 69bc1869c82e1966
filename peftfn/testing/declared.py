"""Laws of a method as a class: it keeps nothing but its fields, and reads each of them."""

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from peftfn.core import fields as fields_
from peftfn.core.method import Weight
from peftfn.testing import at as at_
from peftfn.testing.case import Case


def keeps(c: Case) -> None:
    """A method is a dataclass of its fields: it keeps no other value, and no tensor, on itself or on its class."""
    m, cls = c.method, type(c.method)
    named = {f.name for f in fields(m)}  # type: ignore[arg-type]
    c.net.apply(c.net.init(c.seed), c.x)
    if odd := sorted(vars(m).keys() - named):
        raise AssertionError(
            f"{cls.__name__} keeps {', '.join(odd)} beside its fields, so that methods with other values compare equal "
            "and files lose it: decorate the class with @dataclass(frozen=True), declare its hyper-parameters as "
            "fields, and keep nothing else"
        )
    for k, v in [(k, v) for owner in cls.__mro__[: cls.__mro__.index(cls.family)] for k, v in vars(owner).items()]:
        found = list(v.values()) if isinstance(v, Mapping) else list(v) if isinstance(v, list | tuple | set) else [v]
        assert not any(isinstance(t, Tensor) for t in found), (
            f"{cls.__name__} keeps a tensor in its class attribute {k}, which is then the same for every seed, site "
            "and adapter: make it in frozen (a constant of the site) or shared, with rng"
        )


def with_field(method: Any, field: str, value: Any) -> Any:
    """The method with another value of a field; None where it has no such field, or refuses the value."""
    if all(f.name != field for f in fields(method)):  # type: ignore[arg-type]
        return None
    try:
        return replace(method, **{field: value})
    except ValueError:
        return None


def _variants(method: Any) -> list[Any]:
    """The method with dropout, and with each of its switches turned."""
    switches = [f.name for f in fields(method) if isinstance(getattr(method, f.name), bool)]  # type: ignore[arg-type]
    turned = [with_field(method, name, not getattr(method, name)) for name in switches]
    return [m for m in (with_field(method, "dropout", 0.5), *turned) if m is not None]


def every_field(c: Case) -> None:
    """Every field is read by one of the method's functions, in one of the class's `cases` at least."""
    cls, m = type(c.method), c.method
    own = {f.name for f in fields(m)} - cls.outside  # type: ignore[arg-type]
    ours = "dataclasses", fields_.__name__, at_.__name__, __name__
    read: set[str] = set()

    def get(self: Any, name: str) -> Any:
        if name in own:
            frame = sys._getframe(1)
            aside = frame.f_code.co_name in ("__post_init__", "__eq__", "__hash__", "__str__", "__repr__", "eval")
            if not aside and frame.f_globals.get("__name__") not in ours:
                read.add(name)
        return object.__getattribute__(self, name)

    spy = type(f"_{cls.__name__}", (cls,), {"__getattribute__": get})
    given = {f.name: getattr(m, f.name) for f in fields(m)}  # type: ignore[arg-type]
    bases = [spy(**case) for case in (given, *cls.cases)]
    for method in [*bases, *(v for base in bases for v in _variants(base))]:
        case = replace(c, method=method)
        try:
            case.net  # noqa: B018
        except ValueError:
            if method is bases[0]:
                raise
            continue  # a size does not fit with a switch turned, or the case is for another model
        case.net.apply(case.net.init(), case.x)
        case.model.train()
        case.net.apply(case.net.init(), case.x)
        for at in at_.places(case):
            if isinstance(method, Weight):
                method.low_rank(at.prepared())
                method.acts_on(torch.arange(3)[None])
            for _, function in at.uses():
                function(at.prepared())
    assert not own - read, (
        f"{cls.__name__} has the field {', '.join(sorted(own - read))}, which none of init, frozen, shared, bank, "
        "prepare and the family's own functions (delta, linear, product, bias, low_rank, acts_on; before, after, "
        "leave) reads: it changes nothing. Use it, or take it out"
    )
