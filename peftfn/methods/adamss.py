"""AdaMSS: W + Δ, row o of Δ being B[o] A_c P, with c the cluster of row o and P leading right singular vectors of W."""

from dataclasses import dataclass

import torch
from torch import Tensor

from peftfn.fields import Start, Whole
from peftfn.method import Leaf
from peftfn.methods.lowrank import _LowRank
from peftfn.rng import Rng


@dataclass(frozen=True)
class AdaMSS(_LowRank):
    """W + Δ with Δ[o] = B[o] A[c(o)] P: W's rows are clustered by their left singular vectors, and each cluster has a
    low-rank change of its own inside the span of W's leading right singular vectors P [r, in], r = min(space, out, in).

    Zheng et al., "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", 2025, NeurIPS.
    Trained: A [clusters, rank, r], which starts as the right singular vectors of each cluster's rows, and B
    [out, rank]. Frozen: P and c [out], from a randomised SVD and ten steps of k-means. Rows of A beyond a cluster's own
    rank start at zero, and with the zeros of B stay there. PEFT's change of the bias is not part of it.

    Trains clusters·rank·space + rank·out numbers. For: very few numbers, in directions taken from the weight.

    Args:
        space: how many singular vectors (PEFT's r).
        clusters: number of them, at most out (PEFT's num_subspaces).
        rank: of each cluster's change, at most the cluster's size (PEFT's subspace_rank).
        threshold: if given, a cluster's rank counts only squared singular values above threshold times its largest.
        seed: of the randomised SVD (PEFT's random_seed).
        init_weights: "default" (B is zero), or "random" (B ~ N(0, 0.01²): not the identity).
    """

    cases = (
        {"space": 4, "clusters": 2, "rank": 2},
        {"space": 6, "clusters": 3, "threshold": 0.2, "init_weights": "random"},
    )

    space: Whole = 100
    clusters: Whole = 5
    rank: Whole = 1
    threshold: float | None = None
    seed: int = 0
    init_weights: Start = "default"

    def _parts(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(U [out, r], P [r, in], cluster of every row [out]), computed on the CPU."""
        r = min(self.space, *w.shape)
        if w.is_meta:
            return w.new_empty(w.shape[0], r), w.new_empty(r, w.shape[1]), w.new_empty(w.shape[0], dtype=torch.int64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            u, _, v = torch.svd_lowrank(w.detach().cpu().float(), q=r, niter=2)
        return u, v.mT.contiguous(), _kmeans(u, min(self.clusters, len(u)))

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        _, p, cluster = self._parts(w)
        return {"P": p.to(rng.device), "c": cluster.to(rng.device)}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        u, _, cluster = self._parts(w)
        a = torch.zeros(min(self.clusters, len(u)), self.rank, u.shape[1])
        for i in () if w.is_meta else range(len(a)):
            _, s, vh = torch.linalg.svd(u[cluster == i], full_matrices=False)
            keep = s.square() > (0 if self.threshold is None else self.threshold) * s[:1].square()
            own = (vh * keep[:, None])[: self.rank]
            a[i, : len(own)] = own
        b = rng.zeros(len(u), self.rank) if self.identity else rng.normal(len(u), self.rank, std=0.01)
        return {"a": a.to(rng.device, rng.dtype), "b": b}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        clusters = torch.arange(p["a"].shape[0], device=p["c"].device)
        mine = (p["c"][:, None] == clusters)[:, :, None]  # [out, clusters, 1]
        return {"down": p["a"].flatten(0, 1) @ p["P"], "up": torch.where(mine, p["b"][:, None], 0.0).flatten(1)}


def _kmeans(x: Tensor, k: int, steps: int = 10) -> Tensor:
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
