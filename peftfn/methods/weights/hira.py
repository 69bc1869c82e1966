"""HiRA: W ⊙ (1 + B A), a low-rank factor for every entry of the weight."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Probability
from peftfn.core.method import Leaf, Padding, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class HiRA(Weight):
    """W ⊙ (1 + B A), with A [rank, in] and B [out, rank]: a change of high rank, since W has one.

    Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025.
    PEFT ignores a rank pattern on first use; here the rank is the rule's.

    Trainable parameters per site: rank·(in + out). Use it for changes of full rank; it makes a dense weight each call,
    so with many tokens.

    Args:
        rank: inner dimension of the product; values above min(out, in) are allowed but have no effect on
            expressiveness.
        dropout: probability of dropping an input feature of the change in train mode; embeddings have none to drop.
        init_weights: "default" (A Kaiming-uniform, B zero; at embeddings A zero, B normal), "gaussian" (A normal with
            std 1/rank, B zero), or "random" (both normal: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.HiRA(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    per_row = False
    cases = (
        {"rank": 2},
        {"rank": 3, "init_weights": "gaussian"},
        {"rank": 2, "init_weights": "random"},
    )

    padding = Padding()

    peft = Peft("HIRA", {"a": "hira_A", "b": "hira_B"}, {"rank": "r", "dropout": "hira_dropout"})

    rank: PositiveInt = 32
    dropout: Probability = 0.0
    init_weights: Literal["default", "gaussian", "random"] = "default"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), r = w.shape, self.rank
        if not self.identity:
            return {"a": rng.normal(r, in_), "b": rng.normal(out, r)}
        if rng.site is not None and rng.site.kind == "embedding":
            return {"a": rng.zeros(r, in_), "b": rng.normal(out, r)}
        a = rng.normal(r, in_, std=1 / r) if self.init_weights == "gaussian" else rng.kaiming(r, in_)
        return {"a": a, "b": rng.zeros(out, r)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return w * (p["b"] @ p["a"])

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        change = self.delta(p, w).to(w.dtype)
        if self.dropout and x.is_floating_point():
            return dot(x, w) + dot(F.dropout(x, self.dropout), change)
        return dot(x, w + change)
