"""BOFT: s ⊙ W Mᵀ, M = M_{m−1} … M₀ a product of orthogonal butterfly factors, so that x is mixed before it meets W."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Probability, Start
from peftfn.core.method import Leaf, Product
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.rotation import _Blocks, blocks_read, blocks_written, cayley, turn


@dataclass(frozen=True)
class BOFT(_Blocks):
    """s ⊙ W Mᵀ, that is s ⊙ W (x M): M_i rotates pairs of half-blocks 2^i apart, block by block, and s [out] scales.

    Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", 2023, arXiv:2311.06243.
    Trained: r [factors, blocks, h, h], of which (R − Rᵀ)/2 goes through the Cayley transform, and s [out], which
    leaves the bias alone. PEFT without a CUDA compiler silently trains one factor; here any number is plain torch.

    Trainable parameters per site: factors·in·block_size + out. Use it to keep the angles between neurons and still mix
    all features.

    Args:
        block_size: h, size of a block, or
        blocks: number of blocks; give at most one of the two (none is block_size 4). It must divide the input.
        factors: m, number of butterfly factors: h·2^(m−1) features are mixed, which must divide the input, h even.
        dropout: share of the blocks of one random factor that are left unrotated in train mode.
        init_weights: "default" (r zero, s one) or "random" (around these with std 0.1: not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.BOFT(block_size=2, factors=3)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"block_size": 4},
        {"block_size": 2, "factors": 3},
        {"blocks": 4, "factors": 2, "init_weights": "random"},
    )

    peft = Peft(
        "BOFT",
        {"r": "boft_R", "s": "boft_s"},
        {
            "block_size": "boft_block_size",
            "blocks": "boft_block_num",
            "factors": "boft_n_butterfly_factor",
            "dropout": "boft_dropout",
        },
        reads=blocks_read,
        writes=blocks_written,
        leaf_to=lambda m, p: {"boft_R": p["r"], "boft_s": p["s"][:, None]},
    )

    factors: PositiveInt = 1
    dropout: Probability = 0.0
    init_weights: Start = "default"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        out, in_ = w.shape
        h, span = self.block(in_, "input"), 2 ** min(self.factors - 1, in_.bit_length())  # 2^bits is above in
        if span > 1 and (h % 2 or in_ % (h * span)):
            raise ValueError(
                f"BOFT.factors is {self.factors}, which mixes {h * span} features with blocks of {h}; that must divide "
                f"input={in_}, and {h} be even: give fewer factors or another block_size"
            )
        std = 0.0 if self.identity else 0.1
        return {"r": rng.normal(self.factors, in_ // h, h, h, std=std), "s": rng.ones(out) + rng.normal(out, std=std)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        return {"q": cayley((p["r"].mT - p["r"]) / 2), "s": p["s"]}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self._mix(w, p["q"].mT, range(self.factors)) * p["s"][:, None] - w

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, self._mix(w, self._dropped(p["q"]).mT, range(self.factors))) * p["s"]

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        return F.linear(self._mix(x, self._dropped(p["q"]), reversed(range(self.factors))), w) * p["s"]

    def _mix(self, x: Tensor, q: Tensor, order: Any) -> Tensor:
        """x times the factors in this order; block k of factor i is half-blocks k and k + 2^i of each 2^(i+1)."""
        half = q.shape[-1] // 2
        for i in order:
            x = _shuffle(turn(_shuffle(x, 2, 2**i, half), q[i]), 2**i, 2, half)
        return x

    def _dropped(self, q: Tensor) -> Tensor:
        if not self.dropout:
            return q
        m, d, h, _ = q.shape
        factor = torch.arange(m, device=q.device) == torch.randint(m, (), device=q.device)
        blocks = torch.rand(d, device=q.device).argsort() < int(self.dropout * d)
        eye = torch.eye(h, dtype=q.dtype, device=q.device)
        return torch.where((factor[:, None] & blocks)[..., None, None], eye, q)


def _shuffle(x: Tensor, a: int, b: int, half: int) -> Tensor:
    """Every group of a·b half-blocks of x as a table [a, b], transposed."""
    return x if 1 in (a, b) else x.unflatten(-1, (-1, a, b, half)).transpose(-3, -2).flatten(-4)
