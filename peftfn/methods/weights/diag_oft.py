"""Diag-OFT: s ⊙ Rᵀ W, blocks of output features turned, and scaled."""

from dataclasses import dataclass

from torch import Tensor

from peftfn.core.fields import Positive, PositiveInt, Probability, divides
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.rng import Rng
from peftfn.methods.parts.rotation import bounded, cayley, dropped, turn


@dataclass(frozen=True)
class DiagOFT(Weight):
    """s ⊙ Rᵀ W: block i of the product y becomes s_i ⊙ y_i R_i, R_i = (I + Q_i)(I − Q_i)⁻¹, Q_i = B_i − B_iᵀ.

    LyCORIS' diag-oft (Yeh et al., 2023, arXiv:2309.14859), after Qiu et al., 2023, arXiv:2306.07280. Trained: the
    whole blocks b [out/block_size, block_size, block_size], and s [out] with rescale. The bias stays as it is.

    Trainable parameters per site: out·block_size. Use it to read LyCORIS' checkpoints, or as OFT on the outputs.

    Args:
        block_size: size of a block; it must divide out. (LyCORIS takes the smaller factor of out that its rank finds.)
        constraint: keep ‖Q‖_F over all blocks ≤ constraint·out, by scaling Q down; None or 0: no bound.
        rescale: train s as well.
        dropout: share of the blocks that do not turn in train mode, drawn anew each call, as in `OFT`.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.DiagOFT(block_size=3, rescale=True)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = ({"block_size": 2}, {"block_size": 3, "constraint": 0.05, "rescale": True, "dropout": 0.5})

    block_size: PositiveInt = 4
    constraint: Positive | None = None
    rescale: bool = False
    dropout: Probability = 0.0

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        out, h = w.shape[0], self.block_size
        divides(self, "block_size", h, out=out)
        return {"b": rng.zeros(out // h, h, h)} | ({"s": rng.ones(out)} if self.rescale else {})

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        q = p["b"] - p["b"].mT
        q = bounded(q, float(self.constraint * w.shape[0]), (0, 1, 2)) if self.constraint else q
        return {"r": dropped(cayley(q), self.dropout)} | ({"s": p["s"]} if self.rescale else {})

    def _turn(self, y: Tensor, p: Leaf) -> Tensor:
        y = turn(y, p["r"])
        return y * p["s"] if self.rescale else y

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self._turn(w.mT, p).mT - w

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return self._turn(dot(x, w), p)
