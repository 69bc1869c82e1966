"""What the orthogonal methods share: blocks, skew-symmetric generators, Cayley transforms."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from peftfn.core.fields import PositiveInt, divides
from peftfn.core.method import Weight


@dataclass(frozen=True)
class _Blocks(Weight):
    """One side of the weight cut into equal blocks: `block_size` or `blocks` says how."""

    default_size: ClassVar[int] = 4
    """Of a block if neither is given."""

    block_size: PositiveInt | None = None
    blocks: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size is not None and self.blocks is not None:
            raise ValueError(
                f"{type(self).__name__} has block_size={self.block_size} and blocks={self.blocks}; one follows from "
                "the other: give one of them"
            )

    def block(self, size: int, side: str) -> int:
        """Size of a block of the `side` that has `size` features."""
        name, n = ("blocks", self.blocks) if self.blocks else ("block_size", self.block_size or self.default_size)
        divides(self, name, n, **{side: size})
        return size // n if self.blocks else n


def blocks_read(fields: dict[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT writes 0 for the one of the two that is not given."""
    return fields | {k: fields.get(k) or None for k in ("block_size", "blocks")}


def blocks_written(method: _Blocks) -> dict[str, Any]:
    assert method.peft is not None
    size = 0 if method.blocks else method.block_size or method.default_size
    return {method.peft.fields["block_size"]: size, method.peft.fields["blocks"]: method.blocks or 0}


def turn(x: Tensor, r: Tensor) -> Tensor:
    """Block i of x [..., blocks·h] times r_i, r [blocks, h, h]; r [1, h, h] turns every block."""
    if len(r) == 1:
        return (x.unflatten(-1, (-1, r.shape[-1])) @ r[0]).flatten(-2)
    blocks = x.reshape(-1, *r.shape[:2]).transpose(0, 1)  # [blocks, rows, h]
    return (blocks @ r).transpose(0, 1).reshape(x.shape)


def places(h: int) -> Tensor:
    """Where the entries of a skew-symmetric matrix [h, h] stand in (0, q, −q), for `skew`; [h²]."""
    row, col = torch.triu_indices(h, h, 1)
    n = torch.arange(len(row)) + 1
    at = torch.zeros(h, h, dtype=torch.int64)
    return at.index_put((row, col), n).index_put((col, row), n + len(n)).flatten()


def skew(q: Tensor, at: Tensor) -> Tensor:
    """Upper triangles q [..., h(h−1)/2], row by row → U − Uᵀ [..., h, h]; at: `places(h)`."""
    both = torch.cat([q.new_zeros(*q.shape[:-1], 1), q, -q], -1)
    return both.index_select(-1, at).unflatten(-1, (round(len(at) ** 0.5), -1))


def dropped(r: Tensor, rate: float) -> Tensor:
    """r [blocks, h, h] with int(rate·blocks) blocks, drawn anew each time, replaced by the identity; one stays."""
    if not rate or len(r) == 1:
        return r
    drop = torch.rand(len(r), device=r.device).argsort() < int(rate * len(r))
    return torch.where(drop[:, None, None], torch.eye(r.shape[-1], dtype=r.dtype, device=r.device), r)


def bounded(q: Tensor, bound: float, dims: tuple[int, ...]) -> Tensor:
    """q, scaled down where its norm over `dims` is above the bound."""
    square = (q * q).sum(dims, keepdim=True)
    return torch.where(square > bound**2, q * bound / square.clamp(min=bound**2).sqrt(), q)


def cayley(q: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹, orthogonal for a skew-symmetric Q [..., h, h]."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye - q, eye + q, left=False)


def enough(method: Any) -> None:
    """Raise ValueError unless `terms` covers the first two of `neumann`."""
    if method.terms < 2:
        raise ValueError(
            f"{type(method).__name__}.terms is {method.terms}; the series needs its first two terms: give terms >= 2"
        )


def neumann(q: Tensor, terms: int) -> Tensor:
    """`cayley(q)` by its series I + 2Q + 2Q² + …, as PEFT cuts it: Q^(terms−1) comes last, and once. By Horner."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms == 2:
        return eye + 2 * q
    inner = 2 * eye + q
    for _ in range(max(3, terms - 1) - 2):
        inner = torch.baddbmm(2 * eye, q, inner) if q.dim() == 3 else torch.addmm(2 * eye, q, inner)
    return eye + q @ inner
