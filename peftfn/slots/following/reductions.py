"""Functions along dimensions, which join positions: these belong to one row."""

from typing import Any

import torch
from torch import Tensor

from peftfn.slots.following.pointwise import pointwise
from peftfn.slots.following.table import rule
from peftfn.slots.tags import Unfollowed, alone, full, small
from peftfn.slots.track import Seen, Tags


@rule("layer_norm rms_norm")
def _normed(seen: Seen, out: Any) -> Tags:
    x = seen.arg(0, "input")
    return alone(seen.must(x), range(x.dim() - len(seen.arg(1, "normalized_shape")), x.dim()))


_DIM = dict.fromkeys(
    [
        "sum",
        "mean",
        "prod",
        "amax",
        "amin",
        "max",
        "min",
        "argmax",
        "argmin",
        "std",
        "var",
        "any",
        "all",
        "logsumexp",
        "cumsum",
        "cumprod",
        "softmax",
        "log_softmax",
        "sort",
        "argsort",
        "count_nonzero",
        "median",
        "var_mean",
        "std_mean",
        "nanmean",
        "nansum",
        "softmin",
        "glu",
        "logcumsumexp",
        "cummax",
        "cummin",
    ],
    1,
) | dict.fromkeys(["norm", "vector_norm", "topk", "kthvalue", "normalize"], 2)
"""Function → where `dim` stands among its arguments."""
_USUAL = {"topk": -1, "sort": -1, "argsort": -1, "kthvalue": -1, "normalize": 1, "glu": -1}


@rule(" ".join(_DIM))
def _along(seen: Seen, out: Any) -> Tags:
    name = seen.name.removeprefix("linalg_")
    x, at = seen.arg(0, "input"), _DIM[name]
    if name in ("max", "min") and isinstance(seen.arg(1, "other"), Tensor):
        return pointwise(seen, out)
    dim = seen.kwargs.get("dim", seen.kwargs.get("axis", seen.args[at] if len(seen.args) > at else _USUAL.get(name)))
    if isinstance(dim, bool | torch.dtype):
        dim = None
    dims = [d % x.dim() for d in (range(x.dim()) if dim is None else dim if isinstance(dim, list | tuple) else [dim])]
    tag = small(seen.must(x))
    if name in ("topk", "sort") and tag.shape[dims[0]] != 1:
        return _sorted(x, tag, dims[0], out[1])
    tag = alone(tag, dims)
    first = out[0] if isinstance(out, tuple) else out
    if first.dim() == x.dim():
        return tag
    if first.dim() != x.dim() - len(dims):
        raise Unfollowed("its output has another number of dimensions")
    return tag.squeeze(dims)


def _sorted(x: Tensor, tag: Tensor, dim: int, index: Tensor) -> Tensor:
    """Positions that were moved by their values."""
    if any(n != 1 for n in tag.shape[dim + 1 :]):
        raise Unfollowed("it sorts positions of different rows")
    if any(n != 1 for n in x.shape[dim + 1 :]):
        raise Unfollowed("it sorts each feature by itself")
    return full(tag, x.shape, dim + 1).gather(dim, index)
