"""DyLoRA: W + s·B A, trained so that it is good at every smaller rank too."""

from dataclasses import dataclass

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, divides
from peftfn.core.method import Leaf
from peftfn.methods.parts.variant import Drawn


@dataclass(frozen=True)
class DyLoRA(Drawn):
    """W + s(r)·B[:, :r] A[:r], with A [rank, in], B [out, rank] and s(r) = alpha/r (alpha/√r with rslora). r is
    `active`; in train mode, any number of blocks up to that, drawn anew for every product.

    Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
    Adaptation", 2022, arXiv:2210.07558. Of the blocks drawn, the last is trained and the others are held constant.
    lycoris divides alpha by the number of blocks, draws also in eval mode, and saves what means alpha/rank.

    Trainable parameters per site: rank·(in + out). Use it where one training must serve every smaller rank too.

    Args:
        rank, alpha, rslora, dropout, init_weights: as for `LoRA`; None as alpha means rank.
        block: ranks that come and go together; it must divide rank.
        active: r; None means rank.
        random: draw r in train mode.

    Example:
        model = torch.nn.Linear(8, 6)
        adapter = pf.adapt(model, {"weight": pf.DyLoRA(rank=4)}).init(seed=0)
        y = pf.adapt(model, {"weight": pf.DyLoRA(rank=4, active=2)}).apply(adapter, torch.ones(2, 8))  # at rank 2
    """

    cases = (
        {"rank": 4, "alpha": 3.0, "block": 2, "random": False},
        {"rank": 4, "active": 2, "rslora": True, "random": False, "init_weights": "gaussian"},
    )

    in_eval = (("dropout", 0.0), ("random", False))

    block: PositiveInt = 1
    active: PositiveInt | None = None
    random: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        divides(self, "block", self.block, rank=self.rank, active=self.active or self.rank)
        if self.active is not None and self.active > self.rank:
            raise ValueError(f"DyLoRA.active is {self.active}, of {self.rank} ranks: give active <= rank, or None")

    @property
    def exact_gradient(self) -> bool:
        return not self.random

    def _more(self, n: int, r: Tensor | int) -> Tensor | float:
        """s(r)/s(n)."""
        more: Tensor | float = (n / r) ** (0.5 if self.rslora else 1.0)
        return more

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        r = self.active or self.rank
        return {"down": p["a"][:r], "up": self._more(self.rank, r) * p["b"][:, :r]}

    def drawn(self, p: Leaf) -> Leaf:
        if not self.random:
            return p
        down, up = p["down"], p["up"]
        n = len(down)
        i = torch.arange(n, device=down.device) // self.block
        last = torch.randint(n // self.block, (), device=down.device)
        on, trained = (i <= last).to(down.dtype), i == last
        up = up * self._more(n, (last + 1) * self.block).to(up.dtype)  # type: ignore[union-attr]
        return {
            "down": on[:, None] * torch.where(trained[:, None], down, down.detach()),
            "up": on * torch.where(trained, up, up.detach()),
        }
