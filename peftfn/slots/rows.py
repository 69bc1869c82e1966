"""Rows of a batch sorted by adapter: what is computed together. The host-side twin of `kernels/segments`."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfn.tensors.arguments import picked


@dataclass(frozen=True, eq=False)
class Bucket:
    """Rows whose adapters occur equally often, sorted by adapter: one batched product."""

    adapters: slice | Tensor  # of the part
    number: int
    each: int  # rows of each

    @property
    def rows(self) -> int:
        return self.number * self.each


@dataclass(frozen=True)
class Share:
    """The rows of a batch that use the adapters of one part, in the order of their buckets."""

    rows: Tensor | None  # positions in the batch; None: all of them as they stand
    size: int
    buckets: list[Bucket]
    by_row: Bucket | None  # all rows of the batch as they stand, each with a copy of its adapter's factors

    def as_it_stands(self, tokens: int, rank: int) -> Bucket | None:
        """One bucket of all rows, if there is one or copying the factors costs less than moving the rows (measured on
        a CPU: from twice as many tokens a row as the rank)."""
        if self.rows is None and len(self.buckets) == 1:
            return self.buckets[0]
        return self.by_row if tokens >= 2 * rank else None

    def take(self, x: Tensor) -> Tensor:
        return x if self.rows is None else picked(x, self.rows)


def share(index: Sequence[int], start: int, size: int, device: torch.device) -> Share | None:
    """The rows whose adapters are start … start + size − 1, by adapter; None if there are none."""
    rows_of = defaultdict(list)
    for row, k in enumerate(index):
        if start <= k < start + size:
            rows_of[k - start].append(row)
    by_count = defaultdict(list)
    for k in sorted(rows_of):
        by_count[len(rows_of[k])].append(k)
    order = [row for ks in by_count.values() for k in ks for row in rows_of[k]]
    if not order:
        return None
    buckets = []
    for each, ks in by_count.items():
        run = ks[-1] - ks[0] + 1 == len(ks)
        chosen = slice(ks[0], ks[-1] + 1) if run else torch.tensor(ks, device=device)
        buckets.append(Bucket(chosen, len(ks), each))
    rows = None if order == list(range(len(index))) else torch.tensor(order, device=device)
    by_row = None
    if len(order) == len(index):
        by_row = Bucket(torch.tensor([k - start for k in index], device=device), len(index), 1)
    return Share(rows, len(order), buckets, by_row)
