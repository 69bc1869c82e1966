"""Attention: an output belongs to its query."""

from typing import Any

from peftfn.slots.following.table import rule
from peftfn.slots.tags import Unfollowed, alone, constant, joined
from peftfn.slots.track import Seen, Tags


@rule("scaled_dot_product_attention")
def _attention(seen: Seen, out: Any) -> Tags:
    q, k, v = (seen.arg(i, n) for i, n in enumerate(("query", "key", "value")))
    tag = seen.rows(q)
    if tag is None:  # queries that are nobody's, such as learned ones, are of the row of their keys
        return alone(seen.must(k), [k.dim() - 2, k.dim() - 1])
    tag = alone(tag, [q.dim() - 1])
    mine = constant(tag, [q.dim() - 2])
    for other in (k, v):
        theirs = seen.maybe(other)
        theirs = None if theirs is None else constant(theirs, [other.dim() - 2, other.dim() - 1])
        if mine is not None and theirs is not None and joined(mine, theirs) is None:
            raise Unfollowed("queries and keys belong to different rows")
    return tag


@rule("multi_head_attention_forward")
def _heads(seen: Seen, out: Any) -> Tags:
    """[tokens, rows, d], and the scores [rows, …]."""
    q, k = seen.args[:2]
    tag = alone(seen.must(q if seen.rows(q) is not None else k), (0, 2))
    scores = out[1]
    return [tag, None if scores is None else tag.view(-1, *[1] * (scores.dim() - 1))]
