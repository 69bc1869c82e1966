"""Which rows of a batch share an adapter: the metadata of a mixed batch, made once and used by every layer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from peftfn.kernels.launch import cdiv


class Segments(NamedTuple):
    """Rows by adapter, in blocks of at most `block` rows. Every tensor has a size that the batch's shape decides alone.

    So the tensors can be made inside a captured CUDA graph, and a replay follows another index.
    """

    order: Tensor  # [t] int32: the rows, those of one adapter together, in their own order
    first: Tensor  # [capacity] int32: where in `order` a block starts
    size: Tensor  # [capacity] int32: its rows
    slot: Tensor  # [capacity] int32: its adapter; −1: nothing to do
    starts: Tensor  # [slots] int32: where in `order` an adapter's rows start …
    stops: Tensor  # [slots] int32: … and stop
    of: Tensor  # [t] int64: the adapter of each row; −1 is the base
    block: int
    slots: int


def segments(index: Tensor, slots: int, *, block: int | None = None) -> Segments:
    """Segments of the rows whose adapters are index [t], integers in [−1, slots). Nothing waits for the device.

    block: rows in a block, a power of two from 16; by default as many as an adapter has on average, at most 64.
    Up to 8 rows, each is a block of its own, and nothing is sorted.
    """
    t, device = index.shape[0], index.device
    index = index.to(torch.int64)
    counts = torch.zeros(slots + 1, dtype=torch.int64, device=device)
    stops = counts.scatter_add_(0, index + 1, torch.ones_like(index)).cumsum(0)
    starts, stops = stops[:-1], stops[1:]  # of each adapter; rows of the base are first
    order = index.argsort(stable=True)
    if t <= 8:
        rows = torch.arange(t, device=device)
        # the gradients go through `order`'s first half, the blocks through its second
        return _made(torch.cat([order, rows]), rows + t, torch.ones_like(rows), index, starts, stops, index, 16, slots)
    if block is None:
        block = 16 if t < 32 * slots else 32 if t < 64 * slots else 64
    blocks = (stops - starts + block - 1) // block
    ends = blocks.cumsum(0)
    at = torch.arange(cdiv(t, block) + min(slots, t), device=device)
    slot = torch.searchsorted(ends, at, right=True)
    used, slot = slot < slots, slot.clamp(max=slots - 1)
    first = starts[slot] + (at - (ends - blocks)[slot]) * block
    size = (stops[slot] - first).clamp(max=block)
    first, size, slot = first.where(used, 0), size.where(used, 0), slot.where(used, -1)
    return _made(order, first, size, slot, starts, stops, index, block, slots)


def _made(
    order: Tensor, first: Tensor, size: Tensor, slot: Tensor, starts: Tensor, stops: Tensor, *more: Any
) -> Segments:
    order, first, size, slot, starts, stops = (t.to(torch.int32) for t in (order, first, size, slot, starts, stops))
    return Segments(order, first, size, slot, starts, stops, *more)
