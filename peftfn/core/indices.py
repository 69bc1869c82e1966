"""What may stand in a method's integer constants: what a file says of them is checked before anything reads through
them, since an index that is wrong may read or write another place without an error."""

from typing import NamedTuple

import torch
from torch import Tensor


class Index(NamedTuple):
    """Integers from `least` to below `below`; a tuple: below that of each row, along the axis before the last.

    distinct: whether no integer, or no column of a tuple's, occurs twice.
    """

    below: int | tuple[int, ...]
    least: int = 0
    distinct: bool = False

    def wrong(self, t: Tensor) -> str:
        """What is wrong with t; "" for nothing."""
        sizes = self.below if isinstance(self.below, tuple) else (self.below,)
        rows = t.unbind(-2) if isinstance(self.below, tuple) else (t,)
        if len(rows) != len(sizes):
            return f"has {len(rows)} rows, and needs {len(sizes)}"
        for row, size in zip(rows, sizes, strict=True):
            if row.numel() and not self.least <= (worst := _extreme(row, self.least)) < size:
                return f"has {worst}; it must be from {self.least} to {size - 1}"
        flat = rows[0].long()
        for row, size in zip(rows[1:], sizes[1:], strict=True):
            flat = flat * size + row
        return "has one place twice" if self.distinct and _repeats(flat) else ""


def _extreme(t: Tensor, least: int) -> int:
    """The smallest integer of t if it is below `least`, else the largest."""
    low, high = torch.stack(t.aminmax()).tolist()
    return int(low if low < least else high)


def _repeats(t: Tensor) -> bool:
    """Whether a vector (of a matrix, any row) has an integer twice; those of a file that are in order need no sort."""
    if t.shape[-1:].numel() < 2 or bool((t[..., 1:] > t[..., :-1]).all()):
        return False
    ordered = t.sort(-1).values
    return bool((ordered[..., 1:] == ordered[..., :-1]).any())
