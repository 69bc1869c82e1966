"""What goes along the blocks of a backbone: a state that begins before the first, and that each block changes.

Between two blocks the state of a call is one tensor [rows, tokens, size]. Each is kept by its number until the call is
over, so that a block that is rematerialised inside of it finds the one that it had.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from peftfn.core.modules import ALONG, Along, Companion
from peftfn.model.place import Place
from peftfn.slots import batch
from peftfn.slots.gates import Gates, Index
from peftfn.slots.modules import located, lost
from peftfn.slots.part import Stack
from peftfn.slots.unrowed import plain
from peftfn.slots.virtual import named
from peftfn.tensors.cache import OwnLayers, cache_in, prefix_in
from peftfn.tensors.states import states_in, states_out

NAMES = ("inputs_embeds", "input_ids", "attention_mask", "position_ids")


def run(
    parts: Sequence[Any], gates: Gates | None, m: Place, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """The backbone's output. The first state is made of its arguments, for the blocks."""
    given = named(m, args, kwargs)
    if isinstance(mask := given.get("attention_mask"), dict) or (isinstance(mask, Tensor) and mask.dim() != 2):
        raise ValueError(f"{m.label}: {parts[0].method} needs an attention mask [rows, tokens]")
    if "inputs_embeds" not in given:
        given["inputs_embeds"] = m.embedding()(given["input_ids"])
    xs = {k: plain(given[k]) for k in NAMES if isinstance(given.get(k), Tensor)}
    xs = {k: x.expand(len(xs["inputs_embeds"]), *x.shape[1:]) for k, x in xs.items()}  # positions may be [1, tokens]
    cache = cache_in(given)
    _without_prefix(xs, cache)
    own = OwnLayers(m.label, cache, len(xs["inputs_embeds"]))
    parts[0].seen[_key(0, m.name)] = _started(parts, gates, m, xs, own)
    own.close()
    return forward(*args, **kwargs)


def _without_prefix(xs: dict[str, Tensor], cache: Any) -> None:
    """What counts positions, for a network that has no prefix: it is in the model's own layers alone."""
    size, shift = prefix_in(cache)
    if size and "attention_mask" in xs:
        xs["attention_mask"] = xs["attention_mask"][:, size:]
    if size and (x := xs.get("position_ids")) is not None:
        xs["position_ids"] = xs["position_ids"] - (shift.to(x.device) if isinstance(shift, Tensor) else shift)


def _started(parts: Sequence[Any], gates: Gates | None, m: Place, xs: Mapping[str, Tensor], own: OwnLayers) -> Tensor:
    """The first state of all rows."""
    x = xs["inputs_embeds"]

    def start(part: Any, p: Mapping[str, Tensor], rows: Tensor | None, *some: Tensor) -> Tensor:
        given = dict(zip(xs, some, strict=True))
        state: Tensor = part.method.start(_cast(part, p, x.dtype), m, given, own.of(rows))
        return state.to(x.dtype)

    if gates is None:
        (part,) = parts
        return start(part, part.p, None, *xs.values())
    found = gates.at(len(x))
    if found is None:
        raise ValueError(lost(m, x, gates))
    if own.cache is not None and (not isinstance(found, Index) or found.known is None):
        raise ValueError(
            f"{m.label}: the cache holds what one adapter has seen of each row, and these gates may name several: use "
            "net.mixed with an index, or give use_cache=False"
        )
    alike = {(part.method.size(m), part.entry.companions) for part in parts}
    if len(alike) > 1:
        raise ValueError(f"{m.label}: the adapters of a batch have states of other sizes, or along other blocks")
    ((size, _),) = alike
    every = [torch.arange(len(x), device=x.device), *xs.values()]

    def uses(stack: Stack) -> batch.Uses:
        return batch.Uses(every, lambda k, *some: start(stack, stack.tensors(k), *some), None)

    return batch.around(found, parts, m.label, x.new_zeros(*x.shape[:2], size), uses)


def _cast(part: Any, p: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """p for hidden states of this dtype; constants (the angles of positions) keep theirs."""
    return {k: t if k in part.entry.frozen or not t.is_floating_point() else t.to(dtype) for k, t in p.items()}


def _key(i: int, backbone: str) -> str:
    """Under which name a call has the state before block i."""
    return f"state {i} of {backbone}"


def block(call: Any, name: str, m: Place, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """At a block: what the state of `call`, that of the backbone, makes of its input, and its output of the state."""
    parts = [part for part in call.parts if part.entry.family is Along]
    entry = parts[0].entry
    i = entry.companions.index(Companion(name, ALONG))
    if (state := call.seen.get(_key(i, entry.site.name))) is None:
        raise ValueError(
            f"{m.label}: it runs after the call is over, or before one that comes earlier: the state "
            "that goes along the blocks is not there. Without gradient checkpointing of the model, or with "
            "net.checkpointed, it is"
        )
    x, put = states_in(args, kwargs)
    args, kwargs = put(_each(parts, call.gates, m, i, "into", x, (x, state)))
    out = forward(*args, **kwargs)
    y = states_out(out)[0]
    call.seen[_key(i + 1, entry.site.name)] = _each(parts, call.gates, m, i, "onward", state, (y, state))
    return out


def _each(
    parts: Sequence[Any], gates: Gates | None, m: Place, i: int, hook: str, base: Tensor, xs: tuple[Tensor, ...]
) -> Tensor:
    """What each row's adapter makes of `base` by one of its functions of a block."""

    def made(part: Any, p: Mapping[str, Tensor], *some: Tensor) -> Tensor:
        new: Tensor = getattr(part.method, hook)(_cast(part, p, base.dtype), i, *some)
        return new.to(base.dtype)

    if gates is None:
        (part,) = parts
        return made(part, part.p, *xs)
    t, found, tag = located(m, base, gates)
    every = [plain(x) for x in xs]

    def uses(stack: Stack) -> batch.Uses:
        return batch.Uses(every, lambda k, *some: made(stack, stack.tensors(k), *some), None)

    with nullcontext() if t is None else t.aside():
        y = batch.around(found, parts, m.label, plain(base), uses)
    return y if t is None else t.put(y, tag)  # type: ignore[no-any-return]
