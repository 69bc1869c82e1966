"""GLoRA: W + W ⊙ A + B and b + b ⊙ D + E + W C, in PEFT's form and in LyCORIS'."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.core.fields import PositiveInt, Start
from peftfn.core.method import Leaf, Product, Weight
from peftfn.core.peft import Peft
from peftfn.core.rng import Rng
from peftfn.kernels.lora_linear import lora_linear


def _leaf_to(m: "GLoRA", p: Leaf) -> Leaf:
    columns = ("a", "b", "c") if m.a_b == "vector" else ("c",)
    return m.peft.named({k: t[:, None] if k in columns else t for k, t in p.items()})


@dataclass(frozen=True)
class GLoRA(Weight):
    """W + W ⊙ A + B, b + b ⊙ D + E + W C, where each of A to E is a matrix of low rank, a vector, a number or nothing.

    Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023, arXiv:2306.07967.
    A layer without a bias has no D and is given E + W C (PEFT leaves both out there: `c="none", d_e="none"`).

    Trainable parameters per site: 2·rank·(in + out) + rank·(in + 1) + 2. Use it to change scale, weight and bias at
    once; it merges without cost.

    Args:
        rank: of A, B [out, in] and C [in] where they are "lora", products of a "down" and an "up" matrix.
        a_b: "lora", "vector" (one a row, [out]), "constant" (one number) or "none".
        c: "lora", "vector" or "none".
        d_e: "vector", "constant" or "none".
        init_weights: "default" (all zero) or "random" (not the identity).

    Example:
        net = pf.adapt(torch.nn.Linear(8, 6), {"weight": pf.GLoRA(rank=2, d_e="vector")})
        y = net.apply(net.init(seed=0), torch.ones(2, 8))
    """

    per_row = False
    cases = (
        {"rank": 2},
        {"rank": 2, "a_b": "vector", "c": "vector", "d_e": "vector", "init_weights": "random"},
        {"a_b": "constant", "c": "none", "d_e": "none"},
        {"a_b": "none", "rank": 3},
    )

    peft = Peft(
        "GLORA",
        keys={m + k: f"glora_{m.upper()}.{v}" for m in "abcde" for k, v in (("d", "Xd"), ("u", "Xu"), ("", "X"))},
        fields={"rank": "r", "a_b": "config_A_B", "c": "config_C", "d_e": "config_D_E"},
        leaf_to=_leaf_to,
    )

    rank: PositiveInt = 8
    a_b: Literal["lora", "vector", "constant", "none"] = "lora"
    c: Literal["lora", "vector", "none"] = "lora"
    d_e: Literal["vector", "constant", "none"] = "constant"
    init_weights: Start = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a_b == self.c == self.d_e == "none":
            raise ValueError('GLoRA.a_b, c and d_e are all "none", so nothing is trained: leave one of them on')

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), start = w.shape, rng.zeros if self.identity else rng.kaiming
        d, leaf = "none" if rng.bias is None else self.d_e, Leaf()
        for name, form, rows, columns in (
            ("a", self.a_b, out, in_),
            ("b", self.a_b, out, in_),
            ("c", self.c, in_, 1),
            ("d", d, out, 1),
            ("e", self.d_e, out, 1),
        ):
            if form == "lora":
                leaf |= {name + "u": rng.kaiming(self.rank, columns), name + "d": start(rows, self.rank)}
            elif form != "none":
                leaf[name] = start(rows if form == "vector" else 1)
        return leaf

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        ready = {k: t for k, t in p.items() if k[0] not in "ce"}
        if self.c != "none":
            c = p["c"] if self.c == "vector" else (p["cd"] @ p["cu"]).squeeze(1)
            ready["add"] = w.to(c.dtype) @ c + p.get("e", 0.0)
        elif "e" in p:
            ready["add"] = p["e"].expand(len(w))
        return ready

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        if self.a_b == "none":
            return torch.zeros_like(w)
        low = self.a_b == "lora"
        return w * (p["ad"] @ p["au"]) + p["bd"] @ p["bu"] if low else w * p["a"][:, None] + p["b"][:, None]

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        if b is not None and "d" in p:
            b = b + b * p["d"]
        return b if "add" not in p else p["add"] if b is None else b + p["add"]

    def _scaled(self, p: Leaf, w: Tensor) -> Tensor:
        return w * torch.addmm(w.new_ones(1), p["ad"], p["au"])  # W ⊙ (1 + A)

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        if self.a_b == "lora":
            return dot(x, self._scaled(p, w)) + F.linear(dot(x, p["bu"]), p["bd"])
        y = dot(x, w)
        return y if self.a_b == "none" else y + y * p["a"] + dot(x, torch.ones_like(w[:1])) * p["b"]

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        if self.a_b == "lora":
            return lora_linear(x, self._scaled(p, w), p["bu"], p["bd"])
        return self.product(p, w, x, F.linear)
