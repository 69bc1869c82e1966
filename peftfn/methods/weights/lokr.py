"""LoKr: W + s·W₁ ⊗ W₂, a Kronecker product of two small matrices, each of them full or low-rank."""

from dataclasses import dataclass
from math import isqrt, prod
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import STARTS, divides
from peftfn.core.method import Leaf
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.methods.parts.lycoris import _Lycoris, kernel, leaf_to, spread, written


def _written(m: "LoKr") -> dict[str, Any]:
    if isinstance(m.decompose_factor, tuple):
        raise ValueError(f"PEFT's LoKr has one decompose_factor for out and in, and here it is {m.decompose_factor}")
    return written(m)


@dataclass(frozen=True)
class LoKr(_Lycoris):
    """W + s·W₁ ⊗ W₂, with W₁ [h, m], W₂ [k, n·kernel], out = h·k, in = m·n and s = alpha/rank.

    W₂ is low-rank, A₂ [k, rank] B₂ [rank, n·kernel], where rank < max(k, n)/2; so is W₁ where rank < max(h, m)/2 and
    `decompose_both` is on. x [m, n] becomes W₁ x W₂ᵀ: the large matrix is never made.

    Edalati et al., "KronA", 2022, arXiv:2212.10650; as adapters: LyCORIS, arXiv:2309.14859. As in PEFT the scale is
    alpha/rank also where both matrices are full (LyCORIS takes 1 there). At a Conv1d, PEFT puts the entries of a full
    W₂ into other places than the Kronecker product's, and fails with a core; here both are as at any convolution.

    Trainable parameters per site: about √(in·out) + rank·(√in + √out). Use it for the smallest files with changes of
    high rank.

    Args:
        rank: inner dimension of the low-rank ones; a large one makes W₂ full.
        alpha: numerator of the scale; None means rank, so s = 1.
        decompose_factor: h and m where it divides out and in, else their upper bound; -1 takes the most square pair;
            a pair is (h, m) itself.
        decompose_both: W₁ may be low-rank too.
        rank_dropout: probability of dropping an output's change in train mode.
        module_dropout: probability of dropping the whole change in train mode.
        rank_dropout_scale: divide the kept rows by their share, so that the mean stays.
        tucker: a low-rank W₂ at a convolution has A₂ [rank, k], B₂ [rank, n] and a core T₂ [rank, rank, *kernel]
            (PEFT's use_effective_conv2d); without effect elsewhere.
        weight_decompose: m ⊙ (W + Δ) / ‖W + Δ‖ with a trained m [out] and the row norms' own gradient, as in LyCORIS.
        init_weights: "default" (W₁ or A₁ zero), "lycoris" (W₂ or B₂ zero), or "random" (not the identity); the others
            Kaiming-uniform.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.LoKr(rank=2, decompose_factor=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"rank": 2, "alpha": 3.0, "init_weights": "lycoris", "module_dropout": 0.5},
        {"rank": 1, "alpha": 3.0, "tucker": True},
        {"rank": 1, "decompose_both": True, "decompose_factor": 4, "init_weights": "random"},
        {"rank": 1, "weight_decompose": True},
    )

    peft = Peft(
        "LOKR",
        {
            "w1": "lokr_w1",
            "a1": "lokr_w1_a",
            "b1": "lokr_w1_b",
            "w2": "lokr_w2",
            "a2": "lokr_w2_a",
            "b2": "lokr_w2_b",
            "t2": "lokr_t2",
        },
        {
            "rank": "r",
            "alpha": "alpha",
            "decompose_factor": "decompose_factor",
            "decompose_both": "decompose_both",
            "rank_dropout": "rank_dropout",
            "module_dropout": "module_dropout",
            "rank_dropout_scale": "rank_dropout_scale",
            "tucker": "use_effective_conv2d",
            "init_weights": "init_weights",
        },
        {"init_weights": (*STARTS, ("lycoris", "lycoris"))},
        writes=_written,
        leaf_to=leaf_to,
    )

    rank_dropout_scale: bool = False
    decompose_factor: int | tuple[int, int] = -1
    decompose_both: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        f = self.decompose_factor
        parts: tuple[Any, ...] = f if isinstance(f, tuple) and len(f) == 2 else (f,)
        if f != -1 and not all(isinstance(d, int) and not isinstance(d, bool) and d > 0 for d in parts):
            raise ValueError(
                f"LoKr.decompose_factor is {f!r}; give a positive divisor, a pair of them, or -1 for the most square"
            )

    def _split(self, size: int, side: int) -> tuple[int, int]:
        """(small, large) or (decompose_factor, rest), whose product is the size; side: 0 for out, 1 for in."""
        f = self.decompose_factor
        if isinstance(f, tuple):
            divides(self, "decompose_factor", f := f[side], size=size)
        elif f < 1 or size % f:
            f = max(d for d in range(1, isqrt(size) + 1) if size % d == 0 and (f < 1 or d <= f))
        return f, size // f

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        r, window = self.rank, kernel(rng)
        (h, k), (m, n) = self._split(w.shape[0], 0), self._split(w.shape[1] // prod(window), 1)
        first = rng.zeros if self.init_weights == "default" else rng.kaiming
        last = rng.zeros if self.init_weights == "lycoris" else rng.kaiming
        low1 = self.decompose_both and 2 * r < max(h, m)
        leaf = {"a1": first(h, r), "b1": rng.kaiming(r, m)} if low1 else {"w1": first(h, m)}
        if 2 * r >= max(k, n):
            leaf |= {"w2": last(k, n, *window)}
        elif self.tucker and prod(window) > 1:
            leaf |= {"a2": rng.kaiming(r, k), "b2": last(r, n), "t2": rng.kaiming(r, r, *window)}
        else:
            leaf |= {"a2": rng.kaiming(k, r), "b2": last(r, n * prod(window))}
        return leaf | self.magnitude(rng, w)

    def factors(self, p: Leaf, w: Tensor) -> Leaf:
        small = {"sw1": self.scale * (p["w1"] if "w1" in p else p["a1"] @ p["b1"])}  # [h, m]
        if "w2" in p:
            return small | {"v": p["w2"].flatten(1)}  # [k, n·kernel]
        if "t2" in p:
            return small | {"u": p["a2"].mT, "v": spread(p["t2"], p["b2"])}
        return small | {"u": p["a2"], "v": p["b2"]}  # [k, rank], [rank, n·kernel]

    def change(self, p: Leaf) -> Tensor:
        w1, w2 = p["sw1"], p["u"] @ p["v"] if "u" in p else p["v"]
        return (w1[:, None, :, None] * w2[:, None]).flatten(2).flatten(0, 1)

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        z = p["sw1"] @ F.linear(x.unflatten(-1, (p["sw1"].shape[1], -1)), p["v"])  # [..., h, k or rank]
        return self.joined(p, F.linear(x, w), (F.linear(z, p["u"]) if "u" in p else z).flatten(-2))

    def scaled(self, p: Leaf, s: Tensor) -> Leaf | None:
        return None if "c" in p else p | {"sw1": s * p["sw1"]}
