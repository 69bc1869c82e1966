"""torch's attention in a mixed batch: `nn.MultiheadAttention` gives its function [tokens, rows, d], in any layout."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.slots import batch
from peftfn.slots.part import Cut
from peftfn.slots.slot import Slot
from peftfn.slots.tags import constant

_SEQUENCES = ("query", "key", "value", "static_k", "static_v")


def attend(weight: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """F.multi_head_attention_forward, of which `weight` is one of the weights: each adapter on its own rows."""
    q, heads = args[0], args[4]
    t = weight.tracking()
    if q.dim() != 3 or (t is None and (weight.rows.tokens is not None or weight.rows.at(q.shape[1]) is None)):
        raise weight.lost(f"multi_head_attention_forward has inputs of shape {list(q.shape)}")
    n = q.shape[1]
    shapes: list[Any] = []
    gates, tag = weight.rows.at(n), None
    if t is not None and weight.rows.size is not None:
        known = q if t.get(q) is not None else args[1]  # queries that are nobody's are of the rows of their keys
        tag = constant(weight.tag(t, known), (0, 2))
        if tag is None:
            raise weight.lost(
                f"multi_head_attention_forward: the tokens of its input {list(q.shape)} are of several rows"
            )
        gates = weight.rows.of_positions(tag.expand(1, n, 1).flatten(), t.call.gates.tokens)

    def run(k: int, cut: Cut) -> Tensor:
        def swap(v: Any, name: str) -> Any:
            if isinstance(v, Slot):
                return v.value(k)  # type: ignore[attr-defined]
            if not isinstance(v, Tensor):
                return v
            if name in _SEQUENCES and v.dim() == 3:
                return cut(v.transpose(0, 1)).transpose(0, 1)
            if name == "key_padding_mask" and v.dim() == 2:
                return cut(v)
            if name == "attn_mask" and v.dim() == 3:
                return cut(v.unflatten(0, (n, heads))).flatten(0, 1)
            return v

        given = [swap(v, _SEQUENCES[i] if i < 3 else "") for i, v in enumerate(args)]
        y, w = F.multi_head_attention_forward(*given, **{name: swap(v, name) for name, v in kwargs.items()})
        y = y.transpose(0, 1).flatten(1)
        shapes[:] = [None if w is None else w.shape[1:]]
        return y if w is None else torch.cat([y, w.flatten(1)], 1)

    y = batch.each(gates, run)
    size = q.shape[0] * q.shape[2]
    out = y[:, :size].unflatten(1, (q.shape[0], q.shape[2])).transpose(0, 1)
    scores = None if shapes[0] is None else y[:, size:].unflatten(1, shapes[0])
    if t is not None and tag is not None:
        t.put(out, tag)
        t.put(scores, tag.view(n, *[1] * (0 if scores is None else scores.dim() - 1)))
    return out, scores
