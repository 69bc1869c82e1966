"""Matrices that torch's orthogonal parametrization keeps in another form."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

WEIGHT, BASE = "parametrizations.weight.original", "parametrizations.weight.0.base"


class _Holder(nn.Module):
    def __init__(self, shape: torch.Size):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(*shape))


def orthogonal(saved: Mapping[str, Tensor]) -> Tensor:
    """The matrix that `torch.nn.utils.parametrizations.orthogonal` makes of what is saved of it. ValueError for what it
    does not save."""
    if saved.keys() != {WEIGHT, BASE} or (kept := saved[WEIGHT]).dim() != 2:
        raise ValueError(f"an orthogonal parametrization has {WEIGHT} and {BASE}, and the file has {sorted(saved)}")
    if saved[BASE].shape != (max(kept.shape), max(kept.shape)):
        raise ValueError(f"{BASE} has shape {list(saved[BASE].shape)}, and {WEIGHT} {list(kept.shape)}")
    layer = nn.utils.parametrizations.orthogonal(_Holder(kept.shape))
    layer.load_state_dict(dict(saved))
    with torch.no_grad():
        return layer.weight.detach().clone()  # type: ignore[operator, union-attr, no-any-return]
