"""SHiRA: W + v at a few random places: a sparse change."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt
from peftfn.core.method import Index, Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class SHiRA(Weight):
    """W + S, S zero but for v [rank·(in + out)] at random places, as many as a LoRA of that rank has numbers.

    Bhardwaj et al., "Sparse High Rank Adapters", 2024, arXiv:2406.13175. Weights of one shape share their places.

    Trainable parameters per site: rank·(in + out). Use it where few entries of a weight may differ from the
    base's, in a merged model too.

    Args:
        rank: of the LoRA whose size the change has; rank·(in + out) is at most in·out.
        seed: of the places, drawn as PEFT draws them (random_seed); None means torch's default seed.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.SHiRA(rank=1)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    per_row = False
    linear_in = ("v",)
    cases = ({"rank": 1}, {"rank": 2, "seed": 3})

    peft = Peft(
        "SHIRA",
        {"v": "shira_weight", "index": "shira_indices"},
        {"rank": "r", "seed": "random_seed"},
        writes=lambda m: {"mask_type": "random"},
        leaf_to=lambda m, p: m.peft.named({**p, "index": p["index"].int()}),
    )

    rank: PositiveInt = 32
    seed: int | None = None

    def shared(self, rng: Rng, weights: Mapping[str, Tensor]) -> Mapping[str, Leaf]:
        drawn: dict[tuple[int, int], Tensor] = {}
        seed = torch.Generator().initial_seed() if self.seed is None else self.seed
        for site, w in weights.items():
            out, in_ = w.shape[-2:]
            n, most = self.rank * (out + in_), out * in_ // (out + in_)
            if n > out * in_:
                cure = f"choose rank <= {most}" if most else "leave it out of the rule"
                raise ValueError(
                    f"{site}: SHiRA.rank is {self.rank}, so {n} entries, more than the {out * in_} of a weight "
                    f"[{out}, {in_}]: {cure}"
                )
            if (out, in_) not in drawn:
                at = rng.reseeded(seed).permutation(out * in_)[:n].sort().values
                drawn[out, in_] = torch.stack([at // in_, at % in_])
        return {site: {"index": drawn[w.shape[-2], w.shape[-1]]} for site, w in weights.items()}

    def indices(self, p: Leaf, w: Tensor) -> Mapping[str, Index]:
        return {"index": Index(tuple(w.shape), distinct=True)}

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        return {"v": rng.zeros(self.rank * sum(w.shape))}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        row, col = p["index"]
        return p["v"].new_zeros(w.shape).index_put((row, col), p["v"])

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        row, col = p["index"]
        return dot(x, added(w, row * w.shape[1] + col, p["v"]))


def added(w: Tensor, at: Tensor, v: Tensor) -> Tensor:
    """w + v at the places `at` of the flattened w, in one pass over it."""
    return w.flatten().scatter_add(0, at, v.to(w.dtype)).view(w.shape)
