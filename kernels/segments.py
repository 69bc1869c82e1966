"""Which rows of a batch share an adapter: the metadata of a mixed batch, made once and used by every layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from peftfn.kernels.launch import cdiv


class Segments(NamedTuple):
    """Rows by adapter, in blocks of at most `block` rows. Every tensor has a size that the batch's shape decides alone.

    So the tensors can be made inside a captured CUDA graph, and a replay follows another index.
    """

    rows: Tensor  # [capacity, block] int32: the rows of a block; −1: none
    slot: Tensor  # [capacity] int32: its adapter; −1: nothing to do
    order: Tensor  # [t] int32: the rows, those of one adapter together, in their own order
    starts: Tensor  # [slots] int32: where in `order` an adapter's rows start …
    stops: Tensor  # [slots] int32: … and stop
    of: Tensor  # [t] int64: the adapter of each row; −1 is the base
    block: int
    slots: int


def segments(index: Tensor, slots: int, *, block: int | None = None) -> Segments:
    """Segments of the rows whose adapters are index [t], integers in [−1, slots). Nothing waits for the device.

    block: rows in a block: 1, or a power of two from 16; by default by the rows that an adapter has on average. Where
    these are few, each row is a block of its own: a tile of 16 would be read for each of them.
    """
    t, device = index.shape[0], index.device
    index = index.to(torch.int64)
    counts = torch.zeros(slots + 1, dtype=torch.int64, device=device)
    stops = counts.scatter_add_(0, index + 1, torch.ones_like(index)).cumsum(0)
    starts, stops = stops[:-1], stops[1:]  # of each adapter; rows of the base are first
    order = index.argsort(stable=True)
    if block is None:
        block = 1 if t <= 8 or t < 2 * slots else 16 if t < 32 * slots else 32 if t < 64 * slots else 64
    if block == 1:
        rows, slot = torch.arange(t, device=device)[:, None], index
    else:
        blocks = (stops - starts + block - 1) // block
        ends = blocks.cumsum(0)
        at = torch.arange(cdiv(t, block) + min(slots, t), device=device)
        slot = torch.searchsorted(ends, at, right=True)
        used, slot = slot < slots, slot.clamp(max=slots - 1)
        first = starts[slot] + (at - (ends - blocks)[slot]) * block
        inside = first[:, None] + torch.arange(block, device=device)
        mine = used[:, None] & (inside < stops[slot][:, None])
        rows, slot = order[inside.clamp(max=t - 1)].where(mine, -1), slot.where(used, -1)
    rows, slot, order, starts, stops = (v.to(torch.int32) for v in (rows, slot, order, starts, stops))
    return Segments(rows, slot, order, starts, stops, index, block, slots)
