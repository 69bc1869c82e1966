"""Checks of what a method's functions return. They run when a plan or an adapter is made, not in calls."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import Tensor, nn

from peftfn.model.place import Place

NAME = re.compile(r"(\d+\.)*[^\W\d_]\w*")  # the numbers are those of a chain's methods
RESERVED = frozenset({"of", "scale", "tree", "adapted", "training"})
"""Words of the algebra's trees, and attributes of the module that holds a leaf in `as_module`'s modules."""


def check_tensors(what: str, made: Any) -> None:
    """Raise ValueError unless `made`, which `what` returned on meta, is a dict of well-named tensors on meta."""
    if not isinstance(made, Mapping) or not all(isinstance(t, Tensor) for t in made.values()):
        raise ValueError(f"{what} returns {made!r}; it must return a dict of name → tensor")
    for k in made:
        check_name(what, k)
    if astray := [k for k, t in made.items() if not t.is_meta]:
        raise ValueError(
            f"{what} makes {', '.join(astray)} on another device than the weight's: make it with rng, or on w.device"
        )


def check_name(what: str, name: Any) -> None:
    """Raise ValueError unless a tensor may have this name in leaves, files and modules."""
    short = name.rpartition(".")[2] if isinstance(name, str) else ""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{what} names a tensor {name!r}; a name must be an identifier that begins with a letter: choose another"
        )
    if short in RESERVED or hasattr(nn.Module, short):
        raise ValueError(
            f"{what} names a tensor {name!r}, a name that peftfn's own trees or torch.nn.Module use: choose another"
        )


def check_own(what: str, made: Mapping[str, Tensor], others: Iterable[tuple[str, Any]], alike: bool = False) -> None:
    """ValueError where a tensor that `what` returned shares memory with one of `others` (what it is → tensor), which
    training would then write; or, unless `alike`, with another that it returned."""
    held = {where: name for name, t in others if (where := memory(t)) is not None}
    for k, t in made.items():
        where = memory(t)
        if where in held:
            raise ValueError(
                f"{what} returns {k!r}, which shares memory with {held[where]}: training writes to it in place, which "
                f"would change both. Return a copy: {k}.clone()"
            )
        if where is not None and not alike:
            held[where] = f"{k!r}"


def held_at(w: Any, name: str = "w") -> list[tuple[str, Any]]:
    """(what it is, tensor) of all that the base has at a site: the weight, or what the module of a `Place` holds.

    name: what messages call the weight.
    """
    if not isinstance(w, Place):
        return [(f"the weight {name}", w)]
    held = chain(w.module.named_parameters(), w.module.named_buffers())
    return [(f"{k} of the module {w.label}", t) for k, t in held]


def memory(t: Any) -> int | None:
    """An identifier of a tensor's storage, also on the meta device; None for a tensor that has no storage to write."""
    return t.untyped_storage()._cdata if type(t) in (Tensor, nn.Parameter) and t.numel() else None


def called(
    method: Any,
    name: str,
    function: Callable[..., Any],
    *args: Any,
    p: Mapping[str, str] | None = None,
    names: Sequence[str] = (),
) -> Any:
    """function(*args), the function `name` of a method, on meta tensors; an error says which function it was in, and
    a ValueError says which of its arguments it wrote to. names: of the tensors among them, where they are no w or b."""
    what = f"{type(method).__name__}.{name}"
    given = [(f"p[{k!r}]", t) for a in args if isinstance(a, Mapping) for k, t in a.items()]
    tensors = [t for t in args if isinstance(t, Tensor)]
    labels = names or ["w" if t.dim() != 1 else "w or b" for t in tensors]
    given += zip(labels, tensors, strict=False)
    versions = [t._version for _, t in given]
    try:
        out = function(*args)
    except ValueError:
        raise
    except Exception as e:
        shown = (
            [f"{k} {list(t.shape)} of {type(method).__name__}.{p[k]}" for k, t in args[0].items() if k in p]
            if p
            else []
        )
        seen = f"; p holds {', '.join(shown)}" if shown else ""
        e.add_note(f"in {what}, which runs on the meta device first, where tensors have shapes and no values{seen}")
        raise
    for (label, t), version in zip(given, versions, strict=True):
        if t._version != version:
            raise ValueError(f"{what} writes to its argument {label} in place: return new tensors")
    return out
