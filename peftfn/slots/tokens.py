"""What virtual tokens do around a backbone's forward: they stand in front of the embedded tokens, and what comes out is
cut to the real ones, so that heads, labels, losses and poolers above keep their places."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftfn.model.place import Place, is_causal, is_encoder_of_two
from peftfn.slots.gates import Gates
from peftfn.slots.virtual import Virtual, counted, gathered, moved, named, past
from peftfn.tensors.cache import cache_in


def run(
    parts: Sequence[Any], gates: Gates | None, m: Place, forward: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """The backbone's output for its own tokens, with the virtual tokens of each row in front of them.

    A cache that is not empty holds the virtual tokens already: later steps change nothing but what counts tokens.
    """
    given = named(m, args, kwargs)
    before, causal = past(m, cache_in(given)), is_causal(m.module)
    embedded, ids = given.pop("inputs_embeds", None), given.pop("input_ids", None)
    if embedded is None:
        embedded = m.embedding()(ids)
    rows, tokens = embedded.shape[:2]
    values, virtual = gathered(parts, gates, rows, ["tokens"], m, causal)
    first = not before
    if first:
        embedded = virtual.joined(values["tokens"].to(embedded.dtype), embedded)
    counted(given, m, virtual, rows, tokens, before, first)
    out = forward(inputs_embeds=embedded, **given)
    if (
        not first
        or is_encoder_of_two(m.module, m.config)
        or (gates is None and getattr(parts[0].method, "keep", False))
    ):
        return out
    return _cut(out, virtual, rows, tokens, None if causal else _pooled(parts, gates, rows))


def _pooled(parts: Sequence[Any], gates: Gates | None, rows: int) -> Tensor | None:
    """bool [rows or 1]: which rows have the first virtual token's state at position 0; None if none has."""
    wanted = [part for part in parts if getattr(part.method, "pooled", "") == "virtual"]
    if not wanted or gates is None:
        return torch.ones(1, dtype=torch.bool) if wanted else None
    index: Tensor = gates.at(rows).index  # type: ignore[union-attr]  # `gathered` has seen that it is one
    return torch.stack([(index >= part.start) & (index < part.start + part.size) for part in wanted]).any(0)


def _cut(out: Any, virtual: Virtual, rows: int, tokens: int, pooled: Tensor | None) -> Any:
    """An output without the states of virtual tokens: any [rows, size + tokens, …] in it, and what experts' routers
    return, [rows·(size + tokens), experts]."""
    every = virtual.size + tokens
    keep = None
    if virtual.counts is not None and not virtual.causal:
        keep = virtual.counts[:, None] + torch.arange(tokens, device=virtual.counts.device)

    def cut(v: Any, first: bool = False) -> Any:
        if isinstance(v, Tensor):
            if v.dim() == 2 and v.shape[0] == rows * every:
                return cut(v.view(rows, every, -1)).flatten(0, 1)
            if v.dim() != 3 or v.shape[1] != every:
                return v
            own = v[:, virtual.size :] if keep is None else moved(v, keep.to(v.device))
            if not first or pooled is None:
                return own
            return torch.cat([torch.where(pooled.to(v.device)[:, None, None], v[:, :1], own[:, :1]), own[:, 1:]], 1)
        if isinstance(v, Mapping):  # transformers' ModelOutput
            return type(v)(**{k: cut(t, i == 0) for i, (k, t) in enumerate(v.items())})
        return type(v)(cut(t, i == 0) for i, t in enumerate(v)) if type(v) in (tuple, list) else v

    return cut(out, True)


def crossed(call: Any, name: str, m: Place, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """At a decoder: the mask of the encoder's states, which have the virtual tokens of `call` in front."""
    given = named(m, args, kwargs)
    states, mask = given.get("encoder_hidden_states"), given.get("encoder_attention_mask")
    if states is not None:
        _, virtual = gathered(call.parts, call.gates, states.shape[0], ["tokens"], m, False)
        if mask is not None or virtual.counts is not None:
            own = (states.shape[0], states.shape[1] - virtual.size)
            mask = torch.ones(own, dtype=torch.long, device=states.device) if mask is None else mask
            given["encoder_attention_mask"] = virtual.joined(virtual.mine(mask.device).to(mask.dtype), mask)
    return forward(**given)
