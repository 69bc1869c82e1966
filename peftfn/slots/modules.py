"""What methods at modules do around a forward: `before`, `after` and `leave`, for one adapter or for each row's own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.model.place import Place
from peftfn.slots import batch
from peftfn.slots.gates import Gates, Index
from peftfn.slots.part import Cut, Stack, Use
from peftfn.slots.slot import Slot
from peftfn.slots.tags import constant
from peftfn.slots.track import Tracking, current
from peftfn.slots.unrowed import plain
from peftfn.tensors.cache import Shared, is_cache
from peftfn.tensors.precision import cast
from peftfn.tensors.states import states_in, states_out


def run(
    parts: Sequence[Any], gates: Gates | None, m: Place, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """The module's output with its adapters, the module's own forward running once."""
    befores, afters, leavers = ([q for q in parts if h in q.entry.hooks] for h in ("before", "after", "leave"))
    if befores:
        x, put = _in(m, args, kwargs)
        args, kwargs = put(_point(befores, gates, m, "before", x, (x,)))
    out = forward(*args, **kwargs)
    if afters:
        (x, _), (y, put_y) = _in(m, args, kwargs), _out(m, out)
        out = put_y(_point(afters, gates, m, "after", y, (x, y)))
    if leavers:
        out = _left(leavers, gates, m, args, kwargs, out)
    return out


def _in(m: Place, args: Any, kwargs: Any) -> Any:
    try:
        return states_in(args, kwargs)
    except ValueError as e:
        raise ValueError(f"{m.label}: {e}") from e


def _out(m: Place, out: Any) -> Any:
    try:
        return states_out(out)
    except ValueError as e:
        raise ValueError(f"{m.label}: {e}") from e


# `before` and `after`: functions of hidden states.


def _point(
    parts: Sequence[Any], gates: Gates | None, m: Place, hook: str, base: Tensor, xs: tuple[Tensor, ...]
) -> Tensor:
    """What the adapters make of the hidden states `base`, by one of the functions."""
    if not base.is_floating_point():
        raise ValueError(f"{m.label}: its hidden states are {base.dtype}: name a module that takes and returns floats")
    if gates is None:
        (part,) = parts
        return _use(part, m, hook, base.dtype)(part.p, *xs, *_seen(part, m))
    t, found, tag = located(m, base, gates)
    xs = tuple(plain(x) for x in xs)

    def uses(stack: Stack) -> batch.Uses:
        every = [*xs, *_seen(stack, m)]
        if odd := [t for t in every if t.shape[0] != base.shape[0]]:
            raise ValueError(lost(m, odd[0], gates))
        many, alone = _use(stack, m, hook, base.dtype), not stack.entry.method.per_row

        def one(k: int, *rows: Tensor) -> Tensor:
            with selected(m.module, stack.start + k) if alone else nullcontext():
                return many(stack.tensors(k), *rows)

        return batch.Uses(every, one, None if alone else many)

    with nullcontext() if t is None else t.aside():
        y = batch.around(found, parts, m.label, plain(base), uses)
    return y if t is None else t.put(y, tag)  # type: ignore[no-any-return]


def located(m: Place, x: Tensor, gates: Gates) -> tuple[Tracking | None, Gates, Tensor | None]:
    """(what follows rows here, the gates of x's first dimension, x's tag). ValueError where that has no rows."""
    t = current()
    if t is None or t.call is not gates.call or gates.size is None:
        found = gates.at(x.shape[0]) if x.dim() else None
        if found is None:
            raise ValueError(lost(m, x, gates))
        return None, found, None
    tag = t.get(x)
    one = constant(tag, range(1, x.dim())) if isinstance(tag, Tensor) and t.call.gates.tokens is None else None
    if one is None:
        raise ValueError(lost(m, x, gates))
    return t, gates.of_positions(one.flatten().expand(x.shape[0]), None), one


def _use(part: Any, m: Place, hook: str, dtype: Any) -> Use:
    """(tensors of one adapter, hidden states …) ↦ what the method makes of the last of those it is a function of."""
    method, function, last = part.entry.method, getattr(part.method, hook), 1 if hook == "after" else 0

    def use(p: dict[str, Any], *xs: Tensor) -> Tensor:
        base = xs[last]
        try:
            new: Any = function(cast(p, dtype), m, *xs)
        except RuntimeError as e:
            known = getattr(method, "dim", 0) or m.sizes[last]
            if base.shape[-1] == known:
                raise
            raise ValueError(
                f"{m.label}: {type(method).__name__}.{hook} gets hidden states {list(base.shape)}, and was made for "
                f"{known} features, as the module's weights have: give dim={base.shape[-1]}, if the method has this "
                f"field, or name another module ({e})"
            ) from e
        if new.shape != base.shape:
            raise ValueError(
                f"{m.label}: {type(method).__name__}.{hook} returns {list(new.shape)} for hidden states "
                f"{list(base.shape)}"
            )
        return new if new.dtype is dtype else new.to(dtype)

    return use


def _seen(part: Any, m: Place) -> list[Tensor]:
    """What the method's companions found at other modules."""
    found = []
    for c in part.entry.companions:
        if c.key not in part.seen:
            raise ValueError(
                f"{m.label}: {part.entry.method} needs what {c.at or 'the model'} gives, which has not run before this "
                "module in this call"
            )
        found.append(plain(part.seen[c.key]))
    return found


def lost(m: Place, t: Tensor, gates: Gates) -> str:
    """What to say where hidden states do not have the rows of the batch."""
    return (
        f"{m.label}: its hidden states have shape {list(t.shape)}, and a mixed batch of {gates.size} rows needs its "
        "rows in the first dimension. Call net.apply for one adapter at a time, or leave this site out of the rules."
    )


# `leave`: a function of everything.


def _left(parts: Sequence[Any], gates: Gates | None, m: Place, args: Any, kwargs: Any, out: Any) -> Any:
    if gates is None:
        (part,) = parts
        return part.method.leave(part.p, m, args, kwargs, out)
    y, put = _out(m, out)
    y = plain(y)
    t, found, tag = located(m, y, gates)
    found = found.here(plain(_in(m, args, kwargs)[0]), m.label)
    apart = not isinstance(found, Index) or found.known is None
    caches = [Shared(v, y.shape[0], apart) for v in (*args, *kwargs.values()) if is_cache(v)]

    def one(k: int, cut: Cut) -> Tensor:
        part = next((q for q in parts if q.has(k)), None)
        if part is None:
            return cut(y)

        mine = cut(torch.arange(y.shape[0], device=y.device))

        def rows(v: Any) -> Any:
            if (shared := next((c for c in caches if c.cache is v), None)) is not None:
                return shared.of(k, mine)
            has = isinstance(v, Tensor) and v.dim() and v.shape[0] == y.shape[0] and not found.owned(v)
            return cut(plain(v)) if has else v

        with selected(m.module, k):
            p = part.tensors(k - part.start)
            new = part.method.leave(p, m, _each(args, rows), _each(kwargs, rows), _each(out, rows))
        return states_out(new)[0].to(y.dtype)

    with nullcontext() if t is None else t.aside():
        new = batch.each(found, one)
    for shared in caches:
        shared.close()
    return put(new if t is None else t.put(new, tag))


def _each(tree: Any, f: Callable[[Any], Any]) -> Any:
    """f of every value in nested arguments or outputs, whose classes are kept."""
    if isinstance(tree, Mapping):
        new = {k: _each(v, f) for k, v in tree.items()}
        return new if type(tree) is dict else type(tree)(**new)
    if type(tree) in (list, tuple):
        return type(tree)(_each(v, f) for v in tree)
    return f(tree)


@contextmanager
def selected(module: nn.Module, k: int) -> Iterator[None]:
    """While it lasts, the weights and parts of a private module are those of adapter k of the batch, for all rows."""
    held: list[tuple[Any, str, Any]] = []
    for layer in module.modules():
        forward = vars(layer).get("forward")
        if isinstance(getattr(forward, "__self__", None), Slot):  # the fast lane
            held.append((vars(layer), "forward", forward))
        for d in (layer._parameters, getattr(forward, "slots", {})):
            held += [(d, name, v) for name, v in d.items() if hasattr(type(v), "chosen")]
    try:
        for where, name, v in held:
            if name == "forward":
                del where[name]
            else:
                where[name] = v.chosen(k)
        yield
    finally:
        for where, name, v in held:
            where[name] = v
