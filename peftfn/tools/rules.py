"""What merging does to the changes of one site: rules for their entries, and for their singular vectors."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from peftfn.core.method import MATRIX
from peftfn.core.rng import Rng
from peftfn.tools.change import Change

Elect = Literal["total", "frequency"]
Rule = Callable[[Tensor, Tensor, list[Rng]], Tensor]
"""(changes [T, …, m, n], weights [T], a generator for each adapter) ↦ the merged matrix [..., m, n]."""


# Rules for entries.


def magnitude(x: Tensor, w: Tensor, rngs: list[Rng], *, density: float) -> Tensor:
    return weighted(trimmed(x, density), w)


def ties(x: Tensor, w: Tensor, rngs: list[Rng], *, density: float, elect: Elect | None) -> Tensor:
    return fused(trimmed(x, density), w, elect)


def dare(x: Tensor, w: Tensor, rngs: list[Rng], *, density: float, elect: Elect | None) -> Tensor:
    return fused(kept(x, torch.full_like(x, density), rngs), w, elect)


def della(x: Tensor, w: Tensor, rngs: list[Rng], *, density: float, epsilon: float, elect: Elect | None) -> Tensor:
    ranks = x.abs().argsort(-1).argsort(-1) / max(1, x.shape[-1] - 1)
    return fused(kept(x, density - epsilon + 2 * epsilon * ranks.to(x.dtype), rngs), w, elect)


def trimmed(x: Tensor, density: float) -> Tensor:
    """Each matrix with its int(density·numel) entries of largest magnitude, the others 0."""
    flat = x.flatten(-2)
    keep = int(density * flat.shape[-1])
    if keep >= flat.shape[-1]:
        return x
    top = flat.abs().topk(keep, dim=-1).indices
    return torch.zeros_like(flat).scatter(-1, top, flat.gather(-1, top)).view_as(x)


def kept(x: Tensor, q: Tensor, rngs: list[Rng]) -> Tensor:
    """Each entry with its probability q, over q; else 0."""
    drawn = torch.stack([rng.uniform(*x.shape[1:], bound=0.5) + 0.5 for rng in rngs]).to(x.dtype)
    return torch.where(drawn < q, x / q, torch.zeros_like(x))


def weighted(x: Tensor, w: Tensor) -> Tensor:
    return torch.tensordot(w, x, 1)


def fused(x: Tensor, w: Tensor, elect: Elect | None) -> Tensor:
    """Σ w_t x_t; with `elect`, over those that have the elected sign, divided by their number."""
    if elect is None:
        return weighted(x, w)
    signs, total = x.sign(), x.sum(0)
    count = signs.sum(0)
    majority = torch.where((total if elect == "total" else torch.where(count == 0, total, count)) >= 0, 1.0, -1.0)
    agree = (signs == majority).to(x.dtype)
    return weighted(x * agree, w) / agree.sum(0).clamp(min=1)


# Rules for whole changes.


def with_bias(out: Change, cs: Sequence[Change], rule: Callable[[Tensor], Tensor]) -> Change:
    """The merged change with a merged bias, where one of the changes has one."""
    given = [c.bias for c in cs]
    some = next((b for b in given if b is not None), None)
    if some is None:
        return out
    stack = torch.stack([torch.zeros_like(some) if b is None else b for b in given])
    return Change(out.site, out.up, out.down, out.dense, rule(stack))


def weighted_sum(cs: Sequence[Change], weights: Tensor) -> Change:
    """Σ w_t Δ_t: side by side where all have factors."""
    site, w = cs[0].site, [weights[t] for t in range(len(cs))]
    if all(c.factors for c in cs):
        pairs = [c.factors for c in cs if c.factors]
        up = torch.cat([x.to(u) * u for x, (u, _) in zip(w, pairs, strict=True)], -1)
        out = Change(site, up, torch.cat([d for _, d in pairs], -2))
    else:
        parts = [x.to(m := c.matrix()) * m for x, c in zip(w, cs, strict=True)]
        out = Change(site, dense=sum(parts[1:], parts[0]))
    return with_bias(out, cs, lambda b: weighted(b, weights.to(b)))


def rank_of(c: Change) -> int:
    """The most singular values that are not zero."""
    return min(c.site.matrix_shape()) if c.up is None else min(*c.site.matrix_shape(), c.up.shape[-1])


def tsv(cs: Sequence[Change], weights: Tensor, keep: int | None) -> Change:
    site = cs[0].site
    if site.kind not in MATRIX:
        return weighted_sum(cs, weights)
    most = min(site.matrix_shape()) // len(cs) if keep is None else keep
    us, ss, vs = [], [], []
    for c, w in zip(cs, weights, strict=True):
        u, s, vh = c.svd()
        k = min(max(1, most), rank_of(c))
        us.append(u[..., :, :k])
        ss.append(w.to(s) * s[..., :k])
        vs.append(vh[..., :k, :].mT)
    u, s, v = orthogonal(torch.cat(us, -1)), torch.cat(ss, -1), orthogonal(torch.cat(vs, -1))
    return with_bias(Change(site, u * s[..., None, :], v.mT), cs, lambda b: weighted(b, weights.to(b)))


def orthogonal(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns; directions that x does not have stay out, not made up."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    return u * nonzero(s, x)[..., None, :] @ vh


def nonzero(s: Tensor, x: Tensor) -> Tensor:
    """1 for singular values that are not zero up to rounding, else 0."""
    if not s.shape[-1]:
        return s
    return (s > s[..., :1] * max(x.shape[-2:]) * torch.finfo(s.dtype).eps).to(s.dtype)


def iso(c: Change) -> Change:
    if c.site.kind not in MATRIX:
        return c
    u, s, vh = c.svd()
    some = nonzero(s, c.matrix() if c.up is None else torch.empty(c.site.matrix_shape(), device="meta"))
    mean = (s * some).sum(-1, keepdim=True) / some.sum(-1, keepdim=True).clamp(min=1)
    return Change(c.site, u * (some * mean)[..., None, :], vh, bias=c.bias)
