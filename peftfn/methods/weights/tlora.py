"""T-LoRA: W + s·(B diag(E) A − B₀ diag(E₀) A₀), with fewer ranks at noisier timesteps of a diffusion model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from peftfn.core.method import Leaf
from peftfn.core.rng import Rng
from peftfn.methods.parts.sites import Planned, sites_of
from peftfn.methods.parts.variant import FromWeight


@dataclass(frozen=True)
class TLoRA(FromWeight):
    """W + s·(B diag(m⊙E) A − B₀ diag(m⊙E₀) A₀), with A [rank, in], E [rank], B [out, rank], started at the singular
    vectors and values A₀, E₀, B₀ of W or of a random matrix, a mask m of 0 and 1, and s as for `LoRA`.

    Soboleva et al., "T-LoRA: Single Image Diffusion Model Customization Without Overfitting", 2025, arXiv:2507.05964,
    as in lycoris (whose convolutions see 1×1 kernels; here the whole kernel counts). The mask of a call is
    `masked(net, adapter, rank_mask(t, …))`: an adapter like any other, so that a batch can mix timesteps.

    Trainable parameters per site: rank·(in + out + 1). Use it to personalise a diffusion model from one image.

    Args:
        rank: components, at most min(out, in).
        alpha, rslora, dropout: as for `LoRA`.
        part: which singular components: "principal", "middle" or "last".
        source: what is decomposed, "weight" or "random" (normal, std 1/rank, the same at every call).
        active: if given, m keeps the first `active` ranks alone.

    Raises:
        ValueError: a rank above the weight's own.

    Example:
        from peftfn.methods.weights.tlora import masked, rank_mask
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.TLoRA(rank=4)})
        noisy = masked(net, net.init(seed=0), rank_mask(900, steps=1000, rank=4))  # the adapter at timestep 900
        y = net.apply(noisy, torch.ones(2, 8))
    """

    cases = (
        {"rank": 2, "alpha": 3.0},
        {"rank": 3, "part": "last", "active": 2},
        {"rank": 4, "part": "middle", "source": "random"},
    )

    part: Literal["principal", "middle", "last"] = "principal"
    source: Literal["weight", "random"] = "weight"
    active: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active is not None and not 0 < self.active <= self.rank:
            raise ValueError(f"TLoRA.active is {self.active}, of {self.rank} ranks: give 1 <= active <= rank, or None")

    def start(self, rng: Rng, w: Tensor) -> Leaf:
        if self.source == "random":
            w = Rng(0, rng.site.name if rng.site else "", device=rng.device).normal(*w.shape, std=1 / self.rank)
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        i = {"principal": 0, "middle": (len(s) - self.rank) // 2, "last": len(s) - self.rank}[self.part]
        own = slice(i, i + self.rank)
        return {"a": vh[own], "b": u[:, own], "e": s[own]}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        n = self.active
        cut = {k: t[..., :n] if k[0] in "be" else t[:n] for k, t in p.items()}
        return super().prepare(cut | {"b": cut["b"] * cut["e"], "b0": cut["b0"] * cut["e0"]}, w)


def rank_mask(t: Any, steps: int, rank: int, minimum: int = 1, power: float = 1.0) -> Tensor:
    """Which ranks take part at timestep t of `steps`, bool [rank] ([n, rank] for t [n]): all at 0, `minimum` at the
    end, ((steps − t)/steps)^power of the way between."""
    t = torch.as_tensor(t)
    share = ((steps - t) / steps) ** power
    return torch.arange(rank, device=t.device) < (share * (rank - minimum)).int()[..., None] + minimum


def masked(net: Planned, adapter: Mapping[str, Leaf], mask: Tensor) -> dict[str, Leaf]:
    """The adapter with the ranks of its T-LoRA sites switched off where `mask` [rank] is false: set to their start."""
    shape = {"a": mask[:, None], "b": mask, "e": mask}
    off = {site: net.plan[site].frozen for site in sites_of(net, TLoRA)}
    leaves = {n: {k: torch.where(shape[k], t, off[n][f"{k}0"]) for k, t in adapter[n].items()} for n in off}
    return {**adapter, **leaves}
