"""MiSS bat: every block of W turned and shifted by a trained matrix of its row of blocks."""

from dataclasses import dataclass

from torch import Tensor

from peftfn.core.fields import PositiveInt, divides
from peftfn.core.method import Leaf, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng


@dataclass(frozen=True)
class MiSSBat(Weight):
    """W_oi + W_oi m_o + m_o for every block (o, i) of W, of side rank; m [out/rank, rank, rank] trained, from zero.

    MiSS's "bat" form (Kang & Yin, 2024, arXiv:2409.15371), whose change depends on W: it runs
    as the dense weight, as PEFT's does.

    Trainable parameters per site: rank·out. Use it for MiSS with a change that depends on the weight; it makes a dense
    weight each call.

    Args:
        rank: side of a block; it must divide in and out.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.MiSSBat(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = ({"rank": 2},)

    peft = Peft("MISS", {"m": "miss_block"}, {"rank": "r"}, fixed={"init_weights": "bat"})

    rank: PositiveInt = 64

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        out, in_ = w.shape
        divides(self, "rank", self.rank, out=out, **{"in": in_})
        return {"m": rng.zeros(out // self.rank, self.rank, self.rank)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        blocks = w.unflatten(0, (-1, self.rank)).unflatten(-1, (-1, self.rank))  # [o, rank, i, rank]
        turned = (blocks.flatten(1, 2) @ p["m"]).unflatten(1, (self.rank, -1)) + p["m"][:, :, None]
        return turned.flatten(2).flatten(0, 1)
