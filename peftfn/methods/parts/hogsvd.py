"""W_i = U_i diag(λ_i) Vᵀ with one V for several matrices: a higher-order generalised SVD, as PEFT takes it for FRoD.

Kempf, Goulart and Duncan, "A Higher-Order Generalized Singular Value Decomposition for Rank Deficient Matrices", 2021,
arXiv:2102.09822.
"""

import torch
from torch import Tensor


def right(ws: list[Tensor], ridge: float) -> Tensor:
    """V [in, in], for matrices ws [out_i, in], that makes the columns of every W V⁻ᵀ nearly orthogonal.

    ridge: added to the diagonal of the Gram matrices, so that they have inverses.
    """
    stacked, in_ = torch.cat(ws), ws[0].shape[1]
    if stacked.shape[0] < in_:
        full: Tensor = torch.linalg.svd(stacked)[2]
        return full.mT
    q, r = torch.linalg.qr(stacked)
    grams = [part.mT @ part + ridge * torch.eye(in_) for part in q.split([len(w) for w in ws])]
    mean = torch.linalg.inv(torch.stack(grams)).mean(0)
    v: Tensor = r.mT @ torch.linalg.eigh(mean)[1]
    return v


def left(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """(U [out, in] with columns of length 1 or 0, λ [in]) of w = U diag(λ) vᵀ; about, where v is singular."""
    v, w = v.double(), w.double()
    try:
        scaled = torch.linalg.solve(v, w.mT).mT
    except RuntimeError:
        scaled = w @ torch.linalg.pinv(v, rtol=1e-6).mT
    size = torch.linalg.vector_norm(scaled, dim=0)
    return torch.where(size > 1e-12, scaled / size, 0.0).float(), size.float()
