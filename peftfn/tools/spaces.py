"""The spaces in which changes of one site are merged: each turns them into a stack of matrices, and the result back."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from peftfn.core.method import MATRIX
from peftfn.tools.change import Change

Back = Callable[[Tensor], Change]
"""A merged matrix ↦ the change of the weight that it stands for."""


def dense(changes: Sequence[Change]) -> tuple[Tensor, Back]:
    """The changes themselves, [T, …, out, in]; at a site that is no matrix, [T, 1, numel]."""
    site = changes[0].site
    stack = torch.stack([c.matrix() for c in changes])
    if site.kind not in MATRIX:
        return stack.flatten(1)[:, None], lambda m: Change(site, dense=m.reshape(site.shape))
    return stack, lambda m: Change(site, dense=m)


def core(changes: Sequence[Change]) -> tuple[Tensor, Back]:
    """Core Space, [T, …, k, l]: M_t = Uᵀ B_t A_t V, with U the left singular vectors of [B_1 … B_T] and V the right
    ones of the stacked A_t. The change is U M Vᵀ.

    Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space", 2025, arXiv:2509.17786.
    """
    site = changes[0].site
    ups, downs = zip(*(_factors(c) for c in changes), strict=True)
    u = torch.linalg.svd(torch.cat(ups, -1), full_matrices=False)[0]  # [out, k]
    vh = torch.linalg.svd(torch.cat(downs, -2), full_matrices=False)[2]  # [l, in]
    stack = torch.stack([(u.mT @ up) @ (down @ vh.mT) for up, down in zip(ups, downs, strict=True)])

    def back(m: Tensor) -> Change:
        if m.shape[-2] <= m.shape[-1]:
            return Change(site, u, m @ vh)
        return Change(site, u @ m, vh)

    return stack, back


def knots(changes: Sequence[Change]) -> tuple[Tensor, Back]:
    """KnOTS, [T, …, k, in]: S V_tᵀ, where [Δ_1 … Δ_T] = U S [V_1ᵀ … V_Tᵀ] is one singular value decomposition. The
    change is U times the merged matrix.

    Stoica et al., "Model merging with SVD to tie the Knots", 2024, arXiv:2410.19735. Where the changes have factors,
    U is found from them: k is at most the sum of the ranks.
    """
    site = changes[0].site
    if all(c.factors for c in changes):
        q = torch.linalg.qr(torch.cat([_factors(c)[0] for c in changes], -1))[0]
        parts = [(q.mT @ up) @ down for up, down in map(_factors, changes)]
        left = torch.linalg.svd(torch.cat(parts, -1), full_matrices=False)[0]
        u = q @ left
        stack = torch.stack([left.mT @ part for part in parts])
    else:
        parts = [c.matrix() for c in changes]
        u = torch.linalg.svd(torch.cat(parts, -1), full_matrices=False)[0]
        stack = torch.stack([u.mT @ part for part in parts])
    return stack, lambda m: Change(site, u, m)


def shared(rank: int, beta: float, changes: Sequence[Change]) -> tuple[Tensor, Back]:
    """Compress-then-Merge, [T, …, r, r]: C_t = Uᵀ Δ_t V in the subspaces that all changes share. The change is U C Vᵀ.

    He et al., "Compress then Merge: From Multiple LoRAs into One Low-Rank Adapter", 2026, arXiv:2606.03723. U and V are
    those of `subspaces`, of the changes at sizes β‖Δ_t‖ + (1 − β)·mean ‖Δ_s‖: with β = 0 all count alike. Found in Core
    Space where the changes have factors, which loses nothing.
    """
    stack, back = (core if all(c.factors for c in changes) else dense)(changes)
    sizes = stack.flatten(-2).norm(dim=-1)[..., None, None]
    even = beta * sizes + (1 - beta) * sizes.mean(0)
    u, v = subspaces(torch.where(sizes > 0, stack * even / sizes, stack), rank)
    return u.mT @ stack @ v, lambda c: back(u @ c @ v.mT)


def subspaces(stack: Tensor, rank: int, sweeps: int = 1000, tol: float = 1e-8) -> tuple[Tensor, Tensor]:
    """U [..., m, r] and V [..., n, r] with orthonormal columns for which Σ_t ‖Uᵀ X_t V‖² is largest, of [T, ..., m, n].

    Alternating, from the singular vectors of [X_1ᵀ … X_Tᵀ] on (higher-order orthogonal iteration): each half of a sweep
    is the best U for this V, or the other way round, so the sum never falls. It stops where the sum gains less than
    `tol` of itself, in fp64, since the subspaces are known to the root of that.
    """
    x = stack.double()
    v, held = _left(x.mT, rank), x.new_zeros(())
    for _ in range(sweeps):
        u = _left(x @ v, rank)
        v = _left((u.mT @ x).mT, rank)
        now = (u.mT @ x @ v).square().sum()
        if now - held <= tol * now:
            break
        held = now
    return u.to(stack.dtype), v.to(stack.dtype)


def _left(x: Tensor, rank: int) -> Tensor:
    """The first left singular vectors of [X_1 … X_T], of x [T, ..., m, n]."""
    side_by_side = torch.cat(list(x), -1)
    return torch.linalg.svd(side_by_side, full_matrices=False)[0][..., :rank]


def _factors(c: Change) -> tuple[Tensor, Tensor]:
    pair = c.factors
    if pair is None:
        raise ValueError(
            f"{c.site.name}: the method here has no factors, which Core Space is made of: give space='knots' or 'dense'"
        )
    return pair


SPACES: dict[str, Callable[[Sequence[Change]], tuple[Tensor, Back]]] = {"dense": dense, "core": core, "knots": knots}
