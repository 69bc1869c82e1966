"""LoHa: W + s·(A₁B₁) ⊙ (A₂B₂), a product of two low-rank matrices, entry by entry."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from peftfn.method import Leaf, Method, Peft, positive
from peftfn.rng import Rng


@dataclass(frozen=True)
class LoHa(Method):
    """W + s·(A₁B₁) ⊙ (A₂B₂), with A_i [out, rank], B_i [rank, in] and s = alpha/rank: rank up to rank².

    Hyeon-Woo et al., "FedPara", 2021, arXiv:2108.06098; as adapters: LyCORIS, arXiv:2309.14859.

    Args:
        rank: inner dimension of each of the two products.
        alpha: numerator of the scale; None means rank, so s = 1.
    """

    cases: ClassVar = ({"rank": 2, "alpha": 3.0},)

    peft = Peft(
        "LOHA",
        keys={"a1": "hada_w1_a", "b1": "hada_w1_b", "a2": "hada_w2_a", "b2": "hada_w2_b"},
        fields={"rank": "r", "alpha": "alpha"},
    )

    rank: int = 8
    alpha: float | None = None

    def __post_init__(self) -> None:
        positive(self, rank=self.rank)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), r = w.shape, self.rank
        return {
            "a1": rng.kaiming(out, r),
            "b1": rng.kaiming(r, in_),
            "a2": rng.kaiming(out, r),
            "b2": rng.zeros(r, in_),
        }

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        return scale * (p["a1"] @ p["b1"]) * (p["a2"] @ p["b2"])
