"""What routes are tried with: several adapters of several nets on one model, and a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import peftfn as pf
from peftfn.core.method import Weight
from peftfn.testing.case import SITE, Case, leaves, shaken


@dataclass(frozen=True)
class Party:
    """Three adapters of one net, one adapter of each other net on the same model, and a batch of five rows.

    Adapters are numbered through all nets. Their tensors require gradients.
    """

    nets: tuple[pf.Adapted, ...]
    groups: tuple[list[pf.Adapter], ...]  # of each net
    x: Tensor
    seed: int = 0

    @classmethod
    def of(cls, c: Case, net: pf.Adapted | None = None) -> "Party":
        """`net` in place of the case's own: one of the same sites and sizes on another model."""
        net = net or c.net
        others = tuple(pf.adapt(net.model, {c.site: m}, seed=c.seed) for m in _companions(c)) if c.kind.rowed else ()
        groups = [c.adapter(i) for i in range(3)], *([shaken(other.init(i), i)] for i, other in enumerate(others))
        return cls((net, *others), tuple(tracked(group) for group in groups), c.kind.x(5, c.seed, c.dtype), c.seed)

    @property
    def net(self) -> pf.Adapted:
        return self.nets[0]

    @property
    def first(self) -> pf.Adapter:
        return self.groups[0][0]

    @property
    def all(self) -> Iterator[tuple[pf.Adapted, pf.Adapter]]:
        return ((net, a) for net, group in zip(self.nets, self.groups, strict=True) for a in group)

    @property
    def trained(self) -> list[Tensor]:
        return [t for _, a in self.all for t in leaves(a)]

    @cached_property
    def stack(self) -> Any:
        """The net's own three."""
        return pf.stack(self.groups[0])

    @property
    def count(self) -> int:
        return sum(map(len, self.groups))

    def gates(self, *rows: int, count: int = 3) -> Tensor:
        """Random gates [*rows, count], some of them 0."""
        g = torch.randn(*rows, count, generator=torch.Generator().manual_seed(self.seed))
        return torch.where(g > 1, 0, g).requires_grad_()

    def hot(self, index: Sequence[int], count: int = 3) -> Tensor:
        """The gates [rows, count] that give each row the one adapter of `index`; −1: none."""
        return (torch.tensor(index)[:, None] == torch.arange(count)).float()

    def together(self, order: int) -> tuple[pf.Nets, list[Any], list[int]]:
        """(the nets as one, their stacks, the numbers of their adapters) in this order, 1, or the other, −1."""
        count = iter(range(self.count))
        numbers = [[next(count) for _ in group] for group in self.groups]
        stacks = [pf.stack(group) for group in self.groups]
        return pf.Nets(self.nets[::order]), stacks[::order], [k for group in numbers[::order] for k in group]


def _companions(c: Case) -> list[Any]:
    """Methods for the same site: one that leaves its layer's bias as it is and, where there can be one, one that makes
    another; around a module, one of its output."""
    if isinstance(c.method, pf.Tokens | pf.Prefix):
        return [pf.PromptTuning(n=2)]
    if isinstance(c.method, pf.Along):
        return [replace(c.method, alpha=0.7)]  # type: ignore[call-arg]
    if not isinstance(c.method, Weight):
        return [pf.Bottleneck(rank=2, activation="tanh", init_weights="random")]
    plain: Weight = pf.Full() if c.kind.kind == "other" else pf.LoRA(rank=2, init_weights="random")
    bias = pf.sites(c.model)[SITE].bias
    if bias is None:
        return [plain]
    return [plain, pf.IA3() if bias in dict(c.model.named_parameters()) else pf.LoRA(rank=2, lora_bias=True)]


def tracked(tree: Any) -> Any:
    """A copy whose tensors require gradients."""
    if isinstance(tree, list):
        return [tracked(v) for v in tree]
    return {k: tracked(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.clone().requires_grad_()
