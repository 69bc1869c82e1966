"""Principal components of data that comes in batches, as a pure function of a state."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pca:
    """The k largest principal components of the rows seen so far: Ross et al., "Incremental Learning for Robust Visual
    Tracking", 2008.

    components [k, in], values [k] (singular values), mean [in], total: Σ (x − mean)² over all rows and features.
    """

    components: Tensor
    values: Tensor
    mean: Tensor
    total: float
    count: int

    @staticmethod
    def start(k: int, like: Tensor) -> "Pca":
        """Before the first batch of rows like these."""
        n = like.shape[-1]
        return Pca(like.new_zeros(k, n), like.new_zeros(k), like.new_zeros(n), 0.0, 0)

    def update(self, x: Tensor) -> "Pca":
        """With the rows x [rows, in] too: a decomposition of k + rows + 1 rows."""
        n, m, k = self.count, len(x), len(self.values)
        if not m:
            return self
        mean = x.mean(0)
        between = (n * m / (n + m)) ** 0.5 * (self.mean - mean)
        rows = torch.cat([self.values[:, None] * self.components, x - mean, between[None]])
        _, s, vh = torch.linalg.svd(rows, full_matrices=False)
        total = self.total + float((x - mean).square().sum() + between.square().sum())
        s, vh = s[:k], vh[:k]
        if len(s) < k:
            s = torch.cat([s, s.new_zeros(k - len(s))])
            vh = torch.cat([vh, vh.new_zeros(k - len(vh), vh.shape[1])])
        return Pca(vh, s, (n * self.mean + m * mean) / (n + m), total, n + m)

    def ratios(self) -> Tensor:
        """The share of the variance that each component explains."""
        return self.values.square() / max(self.total, torch.finfo(self.values.dtype).tiny)
