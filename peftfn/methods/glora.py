"""GLoRA: W + W ⊙ A + B and b + b ⊙ D + E + W C, in PEFT's form and in LyCORIS'."""

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.method import Cases, Leaf, Method, Peft, Product, choice, positive
from peftfn.rng import Rng


@dataclass(frozen=True)
class GLoRA(Method):
    """W + W ⊙ A + B, b + b ⊙ D + E + W C, where each of A to E is a matrix of low rank, a vector, a number or nothing.

    Chavan et al., "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning", 2023, arXiv:2306.07967.
    A layer without a bias is given E + W C (PEFT leaves both out there: `c="none", d_e="none"`).

    Args:
        rank: of A, B [out, in] and C [in] where they are "lora", products of a "down" and an "up" matrix.
        a_b: "lora", "vector" (one a row, [out]), "constant" (one number) or "none".
        c: "lora", "vector" or "none".
        d_e: "vector", "constant" or "none".
        init_weights: "default" (all zero) or "random" (not the identity).
    """

    per_row: ClassVar = False
    cases: ClassVar[Cases] = (
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

    rank: int = 8
    a_b: str = "lora"
    c: str = "lora"
    d_e: str = "constant"
    init_weights: str = "default"

    def __post_init__(self) -> None:
        positive(self, rank=self.rank)
        choice(self, "a_b", ("lora", "vector", "constant", "none"))
        choice(self, "c", ("lora", "vector", "none"))
        choice(self, "d_e", ("vector", "constant", "none"))
        choice(self, "init_weights", ("default", "random"))

    @property
    def identity(self) -> bool:
        return self.init_weights != "random"

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


@dataclass(frozen=True)
class GLoRALycoris(Method):
    """W + s·(W A₁ A₂ + B₁ B₂): a low-rank change before the layer's own weight and one beside it.

    The form that LyCORIS calls glora (Yeh et al., 2023, arXiv:2309.14859). A₁ [in, rank], A₂ [rank, in], B₁ [out,
    rank], B₂ [rank, in], s = alpha/rank. At a convolution A₁ A₂ mixes channels, not the window.

    Args:
        rank: of both.
        alpha: numerator of s; None means rank.
        rslora: divide by √rank instead of rank.
    """

    cases: ClassVar[Cases] = ({"rank": 2, "alpha": 3.0}, {"rank": 3, "rslora": True})

    rank: int = 4
    alpha: float | None = None
    rslora: bool = False

    def __post_init__(self) -> None:
        positive(self, rank=self.rank)

    @property
    def scale(self) -> float:
        return (self.rank if self.alpha is None else self.alpha) / (sqrt(self.rank) if self.rslora else self.rank)

    def init(self, rng: Rng, w: Tensor) -> Leaf:
        (out, in_), r, site = w.shape, self.rank, rng.site
        channels = {"conv": 1, "conv_t": 0}
        c = site.shape[channels[site.kind]] if site is not None and site.kind in channels else in_
        return {"a1": rng.kaiming(c, r), "a2": rng.zeros(r, c), "b1": rng.kaiming(out, r), "b2": rng.zeros(r, in_)}

    def _before(self, p: Leaf, w: Tensor) -> Tensor:
        """W A₁ A₂, window by window."""
        by_channel = w.unflatten(1, (p["a1"].shape[0], -1)).mT  # [out, window, channels]
        return ((by_channel @ p["a1"]) @ p["a2"]).mT.flatten(1)

    def delta(self, p: Leaf, w: Tensor) -> Tensor:
        return self.scale * (self._before(p, w) + p["b1"] @ p["b2"])

    def product(self, p: Leaf, w: Tensor, x: Tensor, dot: Product) -> Tensor:
        return dot(x, w + self.scale * self._before(p, w)) + F.linear(dot(x, p["b2"]), self.scale * p["b1"])

    def linear(self, p: Leaf, w: Tensor, x: Tensor) -> Tensor:
        if p["a2"].shape[1] != w.shape[1]:
            return self.product(p, w, x, F.linear)
        moved = x + F.linear(F.linear(x, p["a2"]), self.scale * p["a1"])
        return F.linear(moved, w) + F.linear(F.linear(x, p["b2"]), self.scale * p["b1"])
