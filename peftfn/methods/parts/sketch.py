"""The largest singular components of a matrix from a random start: Halko et al., 2009, arXiv:0909.4061."""

import torch
from torch import Tensor


def sketched_svd(w: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """About (U [out, n], S [n], Vᵀ [n, in]) of w [out, in], from start [in, n], by `steps` of subspace iteration."""
    q = torch.linalg.qr(w @ start)[0]
    for _ in range(steps):
        q = torch.linalg.qr(w @ torch.linalg.qr(w.mT @ q)[0])[0]
    u, s, vh = torch.linalg.svd(q.mT @ w, full_matrices=False)
    return q @ u, s, vh
