"""Two small transformers with BERT's names of layers, so that one set of patterns fits all tasks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Patches(nn.Module):
    """A transformer over the rows of an 8×8 image."""

    def __init__(self, dim: int = 48, depth: int = 2):
        super().__init__()
        self.embed, self.place = nn.Linear(8, dim), nn.Parameter(0.02 * torch.randn(8, dim))
        self.layers = nn.ModuleList(_Layer(dim) for _ in range(depth))
        self.head = nn.Linear(dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        """images [n, 8, 8] ↦ logits [n, 10]"""
        x = self.embed(images) + self.place
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(x.mean(-2))
        return y


class Characters(nn.Module):
    """A language model of characters."""

    def __init__(self, vocabulary: int, length: int, dim: int = 64, depth: int = 2):
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, dim), nn.Parameter(0.02 * torch.randn(length, dim))
        self.layers = nn.ModuleList(_Layer(dim, causal=True) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [n, length] ↦ logits [n, length, vocabulary] of the next one"""
        x = self.embed(ids) + self.place
        for layer in self.layers:
            x = layer(x)
        y: Tensor = self.head(self.norm(x))
        return y


class _Layer(nn.Module):
    """Attention with 4 heads and an MLP, each after a norm."""

    def __init__(self, dim: int, causal: bool = False):
        super().__init__()
        self.causal = causal
        self.query, self.key, self.value, self.output = (_dense(dim, dim) for _ in range(4))
        self.intermediate, self.last = _dense(dim, 4 * dim), nn.ModuleDict({"output": _dense(4 * dim, dim)})
        self.before, self.between = (nn.ModuleDict({"LayerNorm": nn.LayerNorm(dim)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.before["LayerNorm"](x)
        q, k, v = (_call(m, h).unflatten(-1, (4, -1)).transpose(-3, -2) for m in (self.query, self.key, self.value))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if self.causal:
            t = x.shape[-2]
            scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1), -torch.inf)
        x = x + _call(self.output, (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))
        h = F.gelu(_call(self.intermediate, self.between["LayerNorm"](x)))
        return x + _call(self.last["output"], h)


def _dense(into: int, out: int) -> nn.Module:
    return nn.ModuleDict({"dense": nn.Linear(into, out)})


def _call(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m["dense"](x)
    return y
