"""GraLoRA: W + s·Δ, Δ a k × k grid of low-rank blocks, beside an optional LoRA of the whole."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import LARGEST, Positive, PositiveInt, Probability, divides
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class GraLoRA(Weight):
    """W + s·(Δ + B A): block (j, n) of Δ is B_j[n] A_n[j], of rank r/k; s = alpha/(rank + hybrid_rank).

    a [k, in/k, r] and b [k, r, out/k] hold all k² blocks; the hybrid A [hybrid_rank, in], B [out, hybrid_rank] is an
    ordinary LoRA. Jung et al., "GraLoRA: Granular Low-Rank Adaptation", 2025, arXiv:2505.20355.

    Trainable parameters per site: rank·(in + out). Use it for k times LoRA's rank at LoRA's cost, and for larger ranks
    that do not overfit.

    Args:
        rank: r, of the whole grid; k must divide it (where it does not, PEFT fails in its forward). Values
            above min(out, in) are allowed.
        alpha: numerator of the scale; None means rank + hybrid_rank, so s = 1.
        k: blocks a side; it must divide in and out.
        hybrid_rank: of the LoRA beside the grid; 0 for none.
        dropout: probability of dropping an input feature of the change in train mode; embeddings have no
            features to drop.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.GraLoRA(rank=4, k=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    scales_with = ("sb", "shb")
    cases = ({"rank": 4, "alpha": 6.0}, {"rank": 2, "k": 1}, {"rank": 2, "hybrid_rank": 1})

    peft = Peft(
        "GRALORA",
        {"a": "gralora_A", "b": "gralora_B", "ha": "gralora_A_general.weight", "hb": "gralora_B_general.weight"},
        {"rank": "r", "alpha": "alpha", "k": "gralora_k", "hybrid_rank": "hybrid_r", "dropout": "gralora_dropout"},
        writes=lambda m: {"alpha": m.scale * (m.rank + m.hybrid_rank)},
    )

    rank: PositiveInt = 32
    alpha: Positive | None = None
    k: PositiveInt = 2
    hybrid_rank: int = 0
    dropout: Probability = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        divides(self, "k", self.k, rank=self.rank)
        if not 0 <= self.hybrid_rank <= LARGEST:
            raise ValueError(
                f"GraLoRA.hybrid_rank is {self.hybrid_rank}; it is a rank: give 0 for none, or <= {LARGEST}"
            )

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / (self.rank + self.hybrid_rank)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), k, h = w.shape, self.k, self.hybrid_rank
        divides(self, "k", k, out=out, **{"in": in_})
        a = rng.uniform(k, in_ // k, self.rank, bound=(in_ // k) ** -0.5)
        leaf = {"a": a, "b": rng.zeros(k, self.rank, out // k)}
        return leaf | ({"ha": rng.kaiming(h, in_), "hb": rng.zeros(out, h)} if h else {})

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        ready = {"a": p["a"], "sb": self.scale * p["b"]}
        return ready | ({"ha": p["ha"], "shb": self.scale * p["hb"]} if "ha" in p else {})

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        a, b = p["a"].unflatten(2, (self.k, -1)), p["sb"].unflatten(1, (self.k, -1))
        d = torch.einsum("nijc,jnco->joni", a, b).flatten(2).flatten(0, 1)  # i, o: inside blocks n, j; c: rank
        return d + p["shb"] @ p["ha"] if "ha" in p else d

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        dropped = self.dropped(x)
        eye = torch.eye(self.k, dtype=w.dtype, device=w.device)
        rows = (p["a"].mT[:, :, None] * eye[:, None, :, None]).flatten(2).flatten(0, 1)  # [n·r, in], block-diagonal
        z = dot(dropped, rows)
        y = self._joined(p, dot(x, w), z.reshape(-1, self.k, self.rank))
        return y + F.linear(dot(dropped, p["ha"]), p["shb"]) if "ha" in p else y

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        dropped = self.dropped(x)
        z = dropped.reshape(-1, self.k, w.shape[1] // self.k).transpose(0, 1) @ p["a"]  # [n, rows, r]
        y = self._joined(p, F.linear(x, w), z.transpose(0, 1))
        return y + F.linear(F.linear(dropped, p["ha"]), p["shb"]) if "ha" in p else y

    def _joined(self, p: Leaf, y: Tensor, z: Tensor) -> Tensor:
        """y [..., out] and what comes of the blocks of x under A, z [rows, n, r]."""
        u = z.unflatten(-1, (self.k, -1)).permute(2, 0, 1, 3).flatten(2)  # [j, rows, n·c]
        blocks = y.unflatten(-1, (self.k, -1))
        return (blocks + (u @ p["sb"]).transpose(0, 1).reshape(blocks.shape)).flatten(-2)
