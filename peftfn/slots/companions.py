"""What a method puts at other modules than its own, for the length of a call: it reads there, or changes arguments."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peftfn.core.modules import ALONG, CROSSED, INPUT, MASK, OUTPUT, Companion
from peftfn.model.place import Place
from peftfn.slots.along import block
from peftfn.slots.call import Call, Step
from peftfn.slots.gates import Gates
from peftfn.slots.tokens import crossed
from peftfn.tensors.cache import cache_in
from peftfn.tensors.states import states_in, states_out
from peftfn.tensors.transform import moment


def _output(call: Call, name: str, m: Place, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Keep what the module returns, its own adapters included."""
    out = forward(*args, **kwargs)
    call.seen[name] = states_out(out)[0]
    return out


def _input(call: Call, name: str, m: Place, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Keep the hidden states that go into the module, before its own adapters change them."""
    try:
        call.seen[Companion(name, INPUT).key] = states_in(args, kwargs)[0]
    except ValueError as e:
        raise ValueError(f"{m.label}: {e}") from e
    return forward(*args, **kwargs)


def _mask(call: Call, name: str, m: Place, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Keep the mask of the backbone's tokens, virtual ones included and a prefix not: bool [rows, past + tokens]."""
    given = {**dict(zip(m.arguments, args, strict=False)), **kwargs}
    mask, cache = given.get("attention_mask"), cache_in(given)
    if mask is None:
        x = next(t for k in ("inputs_embeds", "input_ids") if (t := given.get(k)) is not None)
        past = 0 if cache is None else cache.get_seq_length()
        mask = torch.ones(x.shape[0], past + x.shape[1], dtype=torch.bool, device=x.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            f"{m.label}: an adapter reads the attention mask, which is "
            f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__} here: give one of [rows, tokens]"
        )
    call.seen[MASK] = mask.bool()
    return forward(*args, **kwargs)


COMPANIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    OUTPUT: (0, _output),
    INPUT: (0, _input),
    CROSSED: (3, crossed),
    ALONG: (4, block),
    MASK: (7, _mask),  # inside of virtual tokens, which are tokens; outside of a prefix, which is none of them
}
"""Kind of companion → (its place in the order of what happens around a forward, the lowest outermost; what it does:
(call of the method's own module, name of the other, place, forward, args, kwargs) ↦ the output)."""


def accompany(
    wanted: Mapping[str, Iterable[Companion]], made: dict[str, Any], slot: Callable[[str], Any], gates: Gates | None
) -> None:
    """Put companions into `made`, slot → value: at each module those that the calls at the sites of `wanted` need."""
    for site, companions in wanted.items():
        if site not in made:  # no row uses it
            continue
        for at, kind in companions:
            if at not in made:
                made[at] = Call((), slot(at), gates, moment()[0])
            order, step = companion(kind, made[site], at)
            made[at].add(order, step)


def companion(kind: str, call: Call, at: str) -> tuple[int, Step]:
    """(order, step) of one companion of a call."""
    order, run = COMPANIONS[kind]
    return order, partial(run, call, at)
