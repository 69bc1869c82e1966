"""AdaMSS: W + Δ, row o of Δ being B[o] A_c P, with c the cluster of row o and P leading right singular vectors of W."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, Probability, Start
from peftfn.core.method import Index, Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.kmeans import kmeans
from peftfn.methods.parts.lowrank import Factored


def _leaf_to(m: "AdaMSS", p: Leaf) -> Leaf:
    m.check_clusters(len(p["c"]), len(p["P"]))
    out = {"adamss_newB": p["P"]}
    for i, a in enumerate(p["a"]):
        b = p["b"][p["c"] == i]
        out |= {f"adamss_A.{i}": a[: len(b)], f"adamss_B.{i}": b[:, : len(b)]}
    return out


def _leaf_from(m: "AdaMSS", t: Leaf, w: Tensor, bias: Tensor | None) -> Leaf:
    u, p, cluster = m.parts(w, bias)
    m.check_clusters(*u.shape)
    p = t["adamss_newB"].view_as(p)
    a, b = p.new_zeros(min(m.clusters, len(u)), rank := min(m.rank, len(u)), len(p)), p.new_zeros(len(u), rank)
    for i in range(len(a)):
        rows, down, up = (cluster == i).nonzero()[:, 0], t[f"adamss_A.{i}"], t[f"adamss_B.{i}"]
        n = min(len(down), len(rows), rank)
        if down.shape != (n, len(p)) or up.shape != (len(rows), n):
            raise ValueError(f"adamss_A.{i} and adamss_B.{i} do not fit {len(rows)} rows: load their base model")
        a[i, :n], b[rows, :n] = down, up
    return {"a": a, "b": b, "P": p, "c": cluster.to(p.device)}


@dataclass(frozen=True)
class AdaMSS(Factored):
    """W + Δ with Δ[o] = B[o] A[c(o)] P: W's rows are clustered by their left singular vectors, and each cluster has a
    low-rank change of its own inside the span of W's leading right singular vectors P [r, in], r = min(space, out, in).

    Zheng et al., "AdaMSS: Adaptive Multi-Subspace Approach for Parameter-Efficient Fine-Tuning", 2025, NeurIPS.
    Where the layer has a bias it is one more column of W, so P is [r, in + 1] and the bias changes too. Trained:
    A [clusters, rank, r], which starts as the right singular vectors of each cluster's rows, and B [out, rank].
    Frozen: P and c [out], from a randomised SVD and ten steps of k-means. A cluster of fewer rows than rank uses as
    many rows of its A. Rows beyond a cluster's own rank start at zero, and with the zeros of B stay there.

    Trainable parameters per site: clusters·rank·space + rank·out. Use it where very few parameters must do, in
    directions taken from the weight.

    Args:
        space: how many singular vectors (PEFT's r); above min(out, in) it is that, as in PEFT.
        clusters: number of them, at most out (PEFT's num_subspaces).
        rank: of each cluster's change (PEFT's subspace_rank); values above a cluster's rows are allowed but have no
            effect on expressiveness, and a rank above out is out.
        threshold: a cluster's rank counts only squared singular values above threshold times its largest (PEFT's
            svd_threshold, if above 0 with use_dynamic_rank).
        seed: of the randomised SVD (PEFT's random_seed).
        init_weights: "default" (B is zero), or "random" (B ~ N(0, 0.01²): not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.AdaMSS(space=4, clusters=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"space": 4, "clusters": 2, "rank": 2},
        {"space": 5, "clusters": 3, "threshold": 0.2, "init_weights": "random"},
    )

    peft = Peft(
        "ADAMSS",
        {
            "a": "adamss_A",
            "b": "adamss_B",
            "P": "adamss_newB",
        },  # A and B once for each cluster, as adamss_A.0, adamss_A.1, …
        {
            "space": "r",
            "clusters": "num_subspaces",
            "rank": "subspace_rank",
            "seed": "random_seed",
            "init_weights": "init_weights",
        },
        {"init_weights": (("default", "orthogonal"), ("random", None))},
        reads=lambda fields, config: (
            fields | {"threshold": config["svd_threshold"] if config["use_dynamic_rank"] else 0.0}
        ),
        writes=lambda m: {"use_dynamic_rank": m.threshold > 0, "svd_threshold": m.threshold},
        leaf_to=_leaf_to,
        leaf_from=_leaf_from,
    )

    space: PositiveInt = 100
    clusters: PositiveInt = 5
    rank: PositiveInt = 1
    threshold: Probability = 0.0
    seed: int = 0
    init_weights: Start = "default"

    def parts(self, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(U [out, r], P [r, in (+ 1)], cluster of every row [out]), computed on the CPU."""
        w = w if bias is None else torch.cat([w, bias[:, None].to(w.dtype)], 1)
        r = min(self.space, *w.shape)
        if w.is_meta:
            return w.new_empty(w.shape[0], r), w.new_empty(r, w.shape[1]), w.new_empty(w.shape[0], dtype=torch.int64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            u, _, v = torch.svd_lowrank(w.detach().cpu().float(), q=r, niter=2)
        return u, v.mT.contiguous(), kmeans(u, min(self.clusters, len(u)))

    def frozen(self, rng: Rng, w: Tensor) -> Leaf:
        _, p, cluster = self.parts(w, rng.bias)
        return {"P": p.to(rng.device), "c": cluster.to(rng.device)}

    def indices(self, p: Leaf, w: Tensor) -> Mapping[str, Index]:
        return {"c": Index(p["a"].shape[-3])}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        u, _, cluster = self.parts(w, rng.bias)
        a = u.new_zeros(min(self.clusters, len(u)), rank := min(self.rank, len(u)), u.shape[1])
        for i in () if w.is_meta else range(len(a)):
            _, s, vh = torch.linalg.svd(u[cluster == i], full_matrices=False)
            own = (vh * (s.square() > self.threshold * s[:1].square())[:, None])[: self.rank]
            a[i, : len(own)] = own
        b = rng.zeros(len(u), rank) if self.identity else rng.normal(len(u), rank, std=0.01)
        return {"a": a.to(rng.device, rng.dtype), "b": b}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        clusters, rank = (torch.arange(n, device=p["c"].device) for n in p["a"].shape[:2])
        mine = (p["c"][:, None] == clusters)[:, :, None]  # [out, clusters, 1]
        up = torch.where(mine & (rank < mine.sum(0)), p["b"][:, None], 0.0).flatten(1)
        down = (p["a"].flatten(0, 1) @ p["P"]).tensor_split([w.shape[1]], 1)
        return {"down": down[0], "up": up, "end": down[1]}

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        return b if b is None or not p["end"].shape[-1] else b + (p["up"] @ p["end"])[:, 0]

    def summed(self, ps: list[Leaf]) -> Leaf:
        return self.side_by_side(ps) | {"end": torch.cat([p["end"] for p in ps], -2)}

    def check_clusters(self, rows: int, space: int) -> None:
        """ValueError where PEFT, which makes the clusters again on loading, has no reason for them."""
        if rows <= space and self.clusters > 1:
            raise ValueError(
                f"AdaMSS.space is {self.space} and the weight has {rows} rows: PEFT's clusters are rounding errors "
                f"then, and are not in its files. Choose space < {rows} before training"
            )
