"""GLoRA: W + W ⊙ A + B and b + b ⊙ D + E + W C, in PEFT's form and in LyCORIS'."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.fields import Start, Whole
from peftfn.method import Leaf, Method, Peft, Product
from peftfn.rng import Rng


@dataclass(frozen=True)
class GLoRA(Method):
    """W + W ⊙ A + B, b + b ⊙ D + E + W C, where each of A to E is a matrix of low rank, a vector, a number or nothing.

    Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023, arXiv:2306.07967.
    A layer without a bias is given E + W C (PEFT leaves both out there: `c="none", d_e="none"`).

    Trains 2·rank·(in + out) + rank·(in + 1) + 2 numbers. For: changing scale, weight and bias at once, merged for
    free.

    Args:
        rank: of A, B [out, in] and C [in] where they are "lora", products of a "down" and an "up" matrix.
        a_b: "lora", "vector" (one a row, [out]), "constant" (one number) or "none".
        c: "lora", "vector" or "none".
        d_e: "vector", "constant" or "none".
        init_weights: "default" (all zero) or "random" (not the identity).
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
    )

    rank: Whole = 8
    a_b: Literal["lora", "vector", "constant", "none"] = "lora"
    c: Literal["lora", "vector", "none"] = "lora"
    d_e: Literal["vector", "constant", "none"] = "constant"
    init_weights: Start = "default"

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), start = w.shape, rng.zeros if self.identity else rng.kaiming
        leaf: Leaf = {}
        for name, form, rows, columns in (
            ("a", self.a_b, out, in_),
            ("b", self.a_b, out, in_),
            ("c", self.c, in_, 1),
            ("d", self.d_e, out, 1),
            ("e", self.d_e, out, 1),
        ):
            if form == "lora":
                leaf |= {name + "u": rng.kaiming(self.rank, columns), name + "d": start(rows, self.rank)}
            elif form != "none":
                leaf[name] = start(rows if form == "vector" else 1)
        return leaf

    def prepare(self, p: Leaf, w: Tensor) -> Leaf:
        add = [p["e"].expand(w.shape[0])] if "e" in p else []
        if self.c != "none":
            c = p["c"] if self.c == "vector" else (p["cd"] @ p["cu"]).squeeze(1)
            add.append(w.to(c.dtype) @ c)
        rest = {k: t for k, t in p.items() if k[0] not in "ce"}
        return rest | ({"add": torch.stack(add).sum(0)} if add else {})

    def _scale(self, p: Leaf) -> Tensor | float:
        return p["ad"] @ p["au"] if self.a_b == "lora" else p["a"][:, None] if "a" in p else 0.0

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        add = p["bd"] @ p["bu"] if self.a_b == "lora" else p["b"][:, None] if "b" in p else 0.0
        return w * self._scale(p) + add

    def bias(self, p: Leaf, b: Tensor | None) -> Tensor | None:
        if "add" not in p:
            return b
        base = 0.0 if b is None else b
        return base + base * p.get("d", 0.0) + p["add"]

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        if self.a_b == "lora":
            return dot(x, w + w * self._scale(p)) + F.linear(dot(x, p["bu"]), p["bd"])
        y = dot(x, w)
        return y if self.a_b == "none" else y + y * p["a"] + dot(x, torch.ones_like(w[:1])) * p["b"]

    def to_peft_leaf(self, p: Leaf) -> Leaf:
        columns = ("a", "b", "c") if self.a_b == "vector" else ("c",)
        return super().to_peft_leaf({k: t[:, None] if k in columns else t for k, t in p.items()})
