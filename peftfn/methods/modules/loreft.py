"""LoReFT: h + (act(W h + b) − R h) Rᵀ, an edit of hidden states in the span of R's orthonormal rows."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from peftfn.core.method import Cases, Leaf
from peftfn.core.rng import Rng
from peftfn.methods.modules.bottleneck import ACTIVATIONS
from peftfn.methods.parts.reft import Activation, Intervention, orthonormal


@dataclass(frozen=True)
class LoReFT(Intervention):
    """h + (act(W h + b) − R h) Rᵀ, h the output of a module, R [rank, d] with orthonormal rows, W [rank, d], b [rank].

    R is made of a trained matrix of its shape, by a QR decomposition once a call. With first = last = 0 every token is
    changed; else the first `first` and the last `last` tokens of each row's prompt, whatever its padding. In `generate`
    with a cache, tokens behind the first `first` are left as they are; without a cache, `last` would move with each
    token, so leave the cache on.

    Wu et al., "ReFT: Representation Finetuning for Language Models", 2024, arXiv:2404.03592.

    Trainable parameters per site: 2·rank·d + rank. Use it on the output of some layers of a language model, where very
    few parameters should do.

    Args:
        rank: rows of R and W.
        first, last: tokens to change at the start and at the end of each prompt; 0 and 0: all tokens.
        tied: whether first and last tokens have the same tensors; else those of their own, `first_r`, `last_r`, ….
        activation: act; "none" leaves it out, as the paper does.
        dim: features of the hidden states, where the module's weights do not tell; 0: they do.
        init_weights: "default" (W = R and b = 0: the identity, but with an activation), or "random" (W of its own, as
            in the paper's code: not the identity).

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
        net = pf.adapt(model, {"0": pf.LoReFT(rank=2)})
        y = net.apply(net.init(seed=0), torch.ones(3, 8))
    """

    cases: ClassVar[Cases] = (
        {"rank": 2},
        {"rank": 2, "first": 1, "last": 1, "init_weights": "random"},
        {"rank": 3, "first": 1, "last": 1, "tied": False},
        {"rank": 2, "first": 2, "activation": "tanh"},
    )

    activation: Activation = "none"

    @property
    def identity(self) -> bool:
        return self.init_weights == "default" and self.activation == "none"

    def fresh(self, rng: Rng, size: int) -> Leaf:
        r = orthonormal(rng.normal(self.rank, size))
        w = r.clone() if self.init_weights == "default" else rng.kaiming(self.rank, size)
        return {"r": r, "w": w, "b": rng.zeros(self.rank)}

    def made(self, p: Leaf) -> Leaf:
        return {"rotation": orthonormal(p["r"]), "w": p["w"], "b": p["b"]}

    def change(self, p: Leaf, h: Tensor) -> Tensor:
        r = p["rotation"]
        if self.activation == "none":
            return F.linear(h, p["w"] - r, p["b"]) @ r
        return (ACTIVATIONS[self.activation](F.linear(h, p["w"], p["b"])) - F.linear(h, r)) @ r
