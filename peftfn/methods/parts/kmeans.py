"""k-means as scikit-learn runs it, so that what PEFT clusters with it is clustered alike here."""

import torch
from torch import Tensor


def kmeans(x: Tensor, k: int, steps: int = 10) -> Tensor:
    """The cluster of each row of x: Lloyd's algorithm from k of its rows, as scikit-learn draws and runs it."""
    import numpy

    x = x - x.mean(0)
    draw = numpy.random.RandomState(123456789)
    centers = x[torch.as_tensor(draw.choice(len(x), size=k, replace=False, p=numpy.full(len(x), 1 / len(x), "f4")))]
    cluster = torch.cdist(x, centers).argmin(1)
    for _ in range(steps):
        onehot = torch.nn.functional.one_hot(cluster, k).to(x.dtype)  # [n, k]
        empty = onehot.sum(0) == 0
        far = (x - centers[cluster]).square().sum(1).argsort(descending=True)[: int(empty.sum())]
        onehot[far] = 0
        onehot[far, empty.nonzero()[:, 0]] = 1  # an empty cluster gets the row that lies worst
        old, centers = centers, (onehot.mT @ x) / onehot.sum(0).clamp(min=1)[:, None]
        before, cluster = cluster, torch.cdist(x, centers).argmin(1)
        if torch.equal(before, cluster) or (centers - old).square().sum() <= 1e-4 * x.var(0, correction=0).mean():
            break
    return cluster
