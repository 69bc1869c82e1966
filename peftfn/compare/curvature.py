"""The largest eigenvalue of a loss's Hessian in an adapter, by products with the Hessian alone."""

from collections.abc import Callable
from typing import Any

import torch
from optree.integrations.torch import tree_ravel
from torch import Tensor
from torch.func import grad, jvp

import peftfn as pf


def sharpness(loss: Callable[[Any], Tensor], adapter: pf.Adapter, products: int = 16) -> float:
    """Return λ_max, the largest (not the absolutely largest) eigenvalue, from below.

    Lanczos: products with the Hessian H span a space, and what is returned is the largest eigenvalue of H within it.
    It is exact when the space is all there is, and close when λ_max stands apart, as it does where few directions are
    steep. Each product is a forward-mode derivative of a gradient, through `net.apply`.

    Args:
        loss: adapter ↦ a number.
        adapter: where.
        products: with H, of one gradient's size each.
    """
    flat, tree_of = tree_ravel(adapter)
    slope = grad(lambda v: loss(tree_of(v)))
    g = torch.Generator().manual_seed(0)
    v = torch.randn(len(flat), generator=g).to(flat)
    basis, diagonal, beside = [v / v.norm()], list[Tensor](), list[Tensor]()
    for _ in range(min(products, len(flat))):
        w = jvp(slope, (flat,), (basis[-1],))[1]
        diagonal.append(w @ basis[-1])
        known = torch.stack(basis)
        for _ in range(2):  # once leaves what rounding brings back
            w = w - known.mT @ (known @ w)
        size = w.norm()
        if not size > 1e-6 * torch.stack(diagonal).abs().max():
            break  # nothing is left beyond this space
        beside.append(size)
        basis.append(w / size)
    n = len(diagonal)
    t = torch.diag(torch.stack(diagonal))
    for i, b in enumerate(beside[: n - 1]):
        t[i, i + 1] = t[i + 1, i] = b
    return float(torch.linalg.eigvalsh(t.double())[-1])
