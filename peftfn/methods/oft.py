"""OFT: W Rᵀ with R block-diagonal and orthogonal, so that x is rotated before it meets W."""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.method import Leaf, Method, Peft, Product, choice, divides, positive
from peftfn.rng import Rng


@dataclass(frozen=True)
class OFT(Method):
    """W Rᵀ: block i of x becomes x_i R_i, with R_i the Cayley transform of a skew-symmetric Q_i = U_i − U_iᵀ.

    Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023, arXiv:2306.07280, in the
    input-centric form of arXiv:2506.19847. Trained: the upper triangles q [blocks, h(h−1)/2], row by row.

    exact: R = (I − Q)(I + Q)⁻¹. Otherwise PEFT's series, which approximates the inverse of that (so a checkpoint
    belongs to one of the two): R = I + 2Q + 2Q² + … with `terms` terms, the last one counted once.

    Args:
        block_size: h, size of a block; it must divide the rotated side.
        share: one rotation for all blocks.
        exact: solve for the Cayley transform instead of its Neumann series.
        terms: of the series, at least 2; the error falls with ‖Q‖^terms.
        eps: if given, keep ‖Q_i‖_F ≤ eps/√blocks (COFT), by scaling Q_i down before it is used.
        side: "input" rotates x; "output" rotates the product's rows, y R, as PEFT does for embeddings.
    """

    cases: ClassVar = (
        {"block_size": 2},
        {"block_size": 2, "exact": True, "share": True},
        {"block_size": 2, "terms": 3, "eps": 0.5},
        {"block_size": 2, "side": "output"},
    )

    peft = Peft(
        "OFT",
        keys={"q": "oft_R.weight"},
        fields={"block_size": "oft_block_size", "share": "block_share", "terms": "num_cayley_neumann_terms"},
    )

    block_size: int = 32
    share: bool = False
    exact: bool = False
    terms: int = 5
    eps: float | None = None
    side: str = "input"

    def __post_init__(self) -> None:
        positive(self, block_size=self.block_size, **({} if self.eps is None else {"eps": self.eps}))
        choice(self, "side", ("input", "output"))
        if self.terms < 2:
            raise ValueError(f"OFT.terms is {self.terms}; the series needs its first two terms: give terms >= 2")

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        size = w.shape[1 if self.side == "input" else 0]
        divides(self, "block_size", self.block_size, **{self.side: size})
        blocks = 1 if self.share else size // self.block_size
        return {"q": rng.zeros(blocks, self.block_size * (self.block_size - 1) // 2)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        h, q = self.block_size, p["q"]
        row, col = torch.triu_indices(h, h, 1, device=q.device)
        upper = q.new_zeros(q.shape[0], h, h).index_put(
            (torch.arange(q.shape[0], device=q.device)[:, None], row, col), q
        )
        skew = upper - upper.mT
        if self.eps is not None:
            bound = self.eps / sqrt(w.shape[1 if self.side == "input" else 0] // h)
            square = (skew * skew).sum((1, 2), keepdim=True)
            skew = torch.where(square > bound**2, skew * bound / square.clamp(min=bound**2).sqrt(), skew)
        eye = torch.eye(h, dtype=q.dtype, device=q.device)
        if self.exact:
            return {"r": torch.linalg.solve(eye + skew, eye - skew, left=False)}
        r, power = eye + 2 * skew, skew
        for k in range(2, max(3, self.terms - 1) + 1) if self.terms > 2 else ():
            power = power @ skew
            r = r + (1 if k == max(3, self.terms - 1) else 2) * power
        return {"r": r}

    def _rotate(self, x: Tensor, r: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, 1, self.block_size))  # [..., blocks, 1, h]
        return (blocks @ r).flatten(-3)

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        turned = self._rotate(w, p["r"].mT) if self.side == "input" else self._rotate(w.mT, p["r"]).mT
        return turned - w

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, self._rotate(w, p["r"].mT)) if self.side == "input" else self._rotate(dot(x, w), p["r"])

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        if self.side == "output":
            return self.product(p, w, x, F.linear)
        return F.linear(self._rotate(x, p["r"]), w)
