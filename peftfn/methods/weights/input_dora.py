"""DoRA on the inputs: (W + Δ) ⊙ m / ‖W + Δ‖, the norm over each column, for the Δ of another method."""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from peftfn.core.method import Leaf, Weight
from peftfn.core.rng import Rng
from peftfn.methods.weights.loha import LoHa
from peftfn.methods.weights.lokr import LoKr
from peftfn.methods.weights.lora import LoRA


@dataclass(frozen=True)
class InputDoRA(Weight):
    """(W + Δ) ⊙ m / n, with Δ the change of another method, n = ‖W + Δ‖ column by column and a trained m [in].

    LyCORIS' weight_decompose with wd_on_output=False (Yeh et al., 2023, arXiv:2309.14859), which was its only one at
    first; the gradient flows through the norm. At a convolution, m and n are of input channels: [in], over the window.

    Trainable parameters per site: those of the other method, and in. Use it to read LyCORIS' and kohya's checkpoints
    whose dora_scale is [1, in].

    Args:
        of: a LoRA, LoHa or LoKr without a magnitude or bias of its own.

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.InputDoRA(pf.LoRA(rank=2))})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    cases = (
        {"of": LoRA(2, alpha=3.0, init_weights="random")},
        {"of": LoHa(2)},
        {"of": LoKr(2, init_weights="random")},
    )

    of: Weight = field(default_factory=LoRA)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.of) not in (LoRA, LoHa, LoKr):
            raise ValueError(f"InputDoRA.of is {self.of}; give a LoRA, LoHa or LoKr")
        odd = [k for k in ("lora_bias", "weight_decompose") if getattr(self.of, k, False)]
        if odd:
            raise ValueError(f"InputDoRA.of has {odd[0]}; give a {type(self.of).__name__} without")

    @property
    def identity(self) -> bool:
        return self.of.identity

    def eval(self) -> Self:
        return replace(self, of=self.of.eval())

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        site, axis = rng.site, {"conv": 1, "conv_t": 0}
        channels = site.shape[axis[site.kind]] if site is not None and site.kind in axis else w.shape[1]
        return {**self.of.init(rng, w), "m": _norms(w.to(rng.dtype), channels)}

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        q = self.of.prepare({k: t for k, t in p.items() if k != "m"}, w)
        n = _norms(w + self.of.delta(q, w), len(p["m"]))
        return {**q, "columns": p["m"] / (n + torch.finfo(n.dtype).eps)}

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        c, q = _taken(p, w)
        return (w + self.of.delta(q, w)) * c - w

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        c, q = _taken(p, w)
        return self.of.linear(q, w, x * c.to(x.dtype))


def _taken(p: Leaf, w: Tensor) -> tuple[Tensor, Leaf]:
    """(a factor for each column of w, the other method's tensors)."""
    c = p["columns"]
    return c.repeat_interleave(w.shape[1] // len(c)), {k: t for k, t in p.items() if k != "columns"}


def _norms(w: Tensor, channels: int) -> Tensor:
    """[channels] of w [out, channels·window]."""
    return torch.linalg.vector_norm(w.unflatten(1, (channels, -1)), dim=(0, 2))
