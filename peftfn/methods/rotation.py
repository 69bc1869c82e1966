"""What the orthogonal methods share: blocks, skew-symmetric generators, Cayley transforms."""

from typing import Any

import torch
from torch import Tensor

from peftfn.method import divides, positive


def one_of(method: Any) -> None:
    """Raise ValueError if both `block_size` and `blocks` are given, or one is not positive."""
    if method.block_size is not None and method.blocks is not None:
        raise ValueError(
            f"{type(method).__name__} has block_size={method.block_size} and blocks={method.blocks}; one follows from "
            "the other: give one of them"
        )
    positive(method, **{k: v for k in ("block_size", "blocks") if (v := getattr(method, k)) is not None})


def block(method: Any, size: int, side: str, default: int) -> int:
    """Size of a block of the `side` that has `size` features, from `block_size` or `blocks`."""
    name, n = ("blocks", method.blocks) if method.blocks else ("block_size", method.block_size or default)
    divides(method, name, n, **{side: size})
    return int(size // n if method.blocks else n)


def turn(x: Tensor, r: Tensor) -> Tensor:
    """Block i of x [..., blocks·h] times r_i, r [blocks, h, h]; r [1, h, h] turns every block."""
    x = x.unflatten(-1, (-1, r.shape[-1]))
    return (x @ r[0] if len(r) == 1 else torch.einsum("...bi,bij->...bj", x, r)).flatten(-2)


def skew(q: Tensor, h: int) -> Tensor:
    """Upper triangles q [..., h(h−1)/2], row by row → U − Uᵀ [..., h, h]."""
    row, col = torch.triu_indices(h, h, 1, device=q.device)
    at = row * h + col
    upper = q.new_zeros(*q.shape[:-1], h * h).index_copy(-1, at, q).unflatten(-1, (h, h))
    return upper - upper.mT


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
    """`cayley(q)` by its series I + 2Q + 2Q² + …, as PEFT cuts it: Q^(terms−1) comes last, and once."""
    r, power, last = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) + 2 * q, q, max(3, terms - 1)
    for k in range(2, last + 1) if terms > 2 else ():
        power = power @ q
        r = r + (1 if k == last else 2) * power
    return r
