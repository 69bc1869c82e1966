"""Interventions on hidden states, for the methods of the ReFT family: where they act, and rows that are orthonormal."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, at_most
from peftfn.core.method import Leaf
from peftfn.core.modules import ModuleMethod
from peftfn.core.rng import Rng
from peftfn.model.place import Place

Activation = Literal["none", "relu", "gelu", "silu", "tanh"]


@dataclass(frozen=True)
class Intervention(ModuleMethod, abstract=True):
    """h + change(h) at chosen tokens, h the output of a module. A method defines `fresh`, `change`, and `made` if it
    makes something of its tensors first.

    Which tokens: with first = last = 0 all. Else the first `first` and the last `last` tokens of each row's prompt, as
    its attention mask counts them: padding on either side does not count, virtual tokens do. The first tokens are told
    by their position, so that `generate` gives the same with and without a cache. The last ones are those of a forward
    that has no past: with a cache, which is the default, those of the prompt. Without one they are the last of what a
    forward gets, generated tokens among them. A token that is among both is changed once, as one of the last.
    """

    rank: PositiveInt = 4
    first: int = 0
    last: int = 0
    tied: bool = True
    dim: int = 0
    init_weights: Literal["default", "random"] = "default"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first", "last"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{type(self).__name__}.{name} is {value}; it counts tokens: give {name} >= 0")
        if not self.tied and not (self.first and self.last):
            raise ValueError(
                f"{type(self).__name__}(tied=False) has tensors for the first tokens and others for the last: give "
                "first and last, or tied=True"
            )

    # What a method defines.

    def fresh(self, rng: Rng, size: int) -> Leaf:
        """The fresh tensors of one change of hidden states of that size."""
        raise NotImplementedError(f"{type(self).__name__} must define fresh(rng, size)")

    def made(self, p: Leaf) -> Leaf:
        """`prepare` of one change."""
        return p

    def change(self, p: Leaf, h: Tensor) -> Tensor:
        """What is added to h [..., d], or something that broadcasts to it."""
        raise NotImplementedError(f"{type(self).__name__} must define change(p, h)")

    # What follows.

    @property
    def sees_mask(self) -> bool:  # type: ignore[override]
        return self.first > 0 or self.last > 0

    @property
    def causal(self) -> bool:  # type: ignore[override]
        return self.last == 0

    @property
    def units(self) -> tuple[str, ...]:
        """Prefixes of the names of the tensors, one for each change."""
        return ("",) if self.tied else ("first_", "last_")

    def init(self, rng: Rng, m: Place) -> Leaf:
        size = self.dim or m.width
        at_most(self, "rank", width=size)
        return {f"{u}{k}": t for u in self.units for k, t in self.fresh(rng, size).items()}

    def prepare(self, p: Leaf, m: Place) -> Leaf:
        return {f"{u}{k}": t for u in self.units for k, t in self.made(_part(p, u)).items()}

    def after(self, p: Leaf, m: Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        changed = [y + self.change(_part(p, u), y) for u in self.units]
        if not self.sees_mask:
            return changed[0]
        first, last = ends(seen[0], y, self.first, self.last)
        return torch.where(last, changed[-1], torch.where(first, changed[0], y))


def _part(p: Leaf, unit: str) -> Leaf:
    return {k.removeprefix(unit): t for k, t in p.items() if k.startswith(unit)}


def ends(mask: Tensor, y: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """(which tokens of y [..., tokens, d] are among the first of their row, which among the last), [..., tokens, 1].

    mask: bool [..., past + tokens], of the tokens that count. With a past, none is among the last.
    """
    tokens = y.shape[-2] if y.dim() > 1 else 0
    if mask.shape[:-1] != y.shape[:-2] or mask.shape[-1] < tokens:
        raise ValueError(
            f"hidden states {list(y.shape)} have no tokens for an attention mask {list(mask.shape)}: name a module "
            "that sees all tokens of each row, or give first=0 and last=0"
        )
    place, count = mask.cumsum(-1), mask.sum(-1, keepdim=True)
    among = [mask & (place <= first), mask & (place > count - (last if mask.shape[-1] == tokens else 0))]
    started, ended = (m[..., mask.shape[-1] - tokens :, None] for m in among)
    return started, ended


def orthonormal(r: Tensor) -> Tensor:
    """[rank, d] with orthonormal rows that span the rows of r; r itself if its rows are orthonormal."""
    q, t = torch.linalg.qr(r.mT)
    return (q * torch.where(t.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)[..., None, :]).mT
