"""torch's recurrent layers in a mixed batch: all layers and time steps are one function, which has the rows in the
first dimension, or with the sequence first in the second."""

from typing import Any

import torch
from torch import Tensor

from peftfn.slots import batch
from peftfn.slots.part import Cut
from peftfn.slots.tags import alike, constant
from peftfn.tensors.arguments import mapped

RECURRENT = frozenset([torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu])


def recur(first: Any, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, ...]:
    """One of `RECURRENT`, of which `first` is one of the weights: each adapter on its own rows."""
    if kwargs or len(args) != 9 or not isinstance(args[2], list | tuple):
        raise first.lost(f"{func.__name__} has packed sequences")
    x, states, weights, *rest = args
    d = 0 if rest[-1] else 1  # batch_first
    t, rows = first.tracking(), first.rows
    tag = None if t is None else constant(first.tag(t, x), {0, 1, 2} - {d})
    if t is None:
        gates = rows.at(x.shape[0]) if d == 0 and rows.tokens is None else None
    else:
        gates = None if tag is None else rows.of_positions(tag.flatten().expand(x.shape[d]), t.call.gates.tokens)
    if gates is None:
        raise first.lost(f"{func.__name__} has an input of shape {list(x.shape)}")
    tags = None if tag is None else tag.view(1, -1, 1)  # of states [layers, rows, …]
    for s in states if isinstance(states, list | tuple) else (states,):
        own = None if t is None else t.get(s)
        if own is not None and not (isinstance(own, Tensor) and tags is not None and alike(own, tags)):
            raise first.lost(f"{func.__name__} has a state of other rows than its input")
    shapes: list[Any] = []

    def run(k: int, cut: Cut) -> Tensor:
        def of_rows(v: Tensor, dim: int) -> Tensor:
            return cut(v.movedim(dim, 0)).movedim(0, dim)

        own = mapped(weights, lambda w: w.value(k) if hasattr(w, "value") else w)
        outputs = func(of_rows(x, d), mapped(states, lambda s: of_rows(s, 1)), own, *rest)
        parts = [y.movedim(d if i == 0 else 1, 0) for i, y in enumerate(outputs)]
        shapes[:] = [p.shape[1:] for p in parts]
        return torch.cat([p.flatten(1) for p in parts], 1)

    flat = batch.each(gates, run)
    pieces = flat.split([s.numel() for s in shapes], 1)
    out = [
        p.unflatten(1, s).movedim(0, d if i == 0 else 1) for i, (p, s) in enumerate(zip(pieces, shapes, strict=True))
    ]
    if t is not None and tag is not None:
        for i, y in enumerate(out):
            t.put(y, tags if i or d else tag)
    return tuple(out)
