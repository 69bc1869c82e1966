"""A reference for mixed batches: one program a row and split of K, partial sums added with atomics, as Punica's and
vLLM's first kernels do. Not deterministic; here to be compared with."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _shrink(x, a, s, index, k, r, each, BR: tl.constexpr, BK: tl.constexpr):
    row, part = tl.program_id(0), tl.program_id(1)
    slot = tl.load(index + row)
    if slot < 0:
        return
    ranks = tl.arange(0, BR)
    acc = tl.zeros((BR,), tl.float32)
    for k0 in range(part * each, tl.minimum(part * each + each, k), BK):
        cols = k0 + tl.arange(0, BK)
        xt = tl.load(x + row.to(tl.int64) * k + cols, cols < k, other=0.0).to(tl.float32)
        at = tl.load(
            a + (slot * r + ranks)[:, None] * k + cols[None, :], (ranks < r)[:, None] & (cols < k)[None, :], other=0.0
        )
        acc += tl.sum(at.to(tl.float32) * xt[None, :], 1)
    tl.atomic_add(s + row * r + ranks, acc, ranks < r)


@triton.jit
def _expand(s, b, y, index, n, r, scale, BR: tl.constexpr, BN: tl.constexpr):
    row = tl.program_id(0)
    slot = tl.load(index + row)
    if slot < 0:
        return
    ranks, cols = tl.arange(0, BR), tl.program_id(1) * BN + tl.arange(0, BN)
    st = tl.load(s + row * r + ranks, ranks < r, other=0.0)
    bt = tl.load(
        b + slot.to(tl.int64) * n * r + cols[:, None] * r + ranks[None, :],
        (cols < n)[:, None] & (ranks < r)[None, :],
        other=0.0,
    )
    change = tl.sum(bt.to(tl.float32) * st[None, :], 1) * scale
    at = y + row.to(tl.int64) * n + cols
    tl.store(at, (tl.load(at, cols < n, other=0.0).to(tl.float32) + change).to(y.dtype.element_ty), cols < n)


def pair(x: Tensor, a: Tensor, b: Tensor, index: Tensor, y: Tensor, scale: float) -> Tensor:
    """y += scale·(x a[index]ᵀ) b[index]ᵀ, in place."""
    (t, k), (_, n, r) = x.shape, b.shape
    s, split = torch.zeros(t, r, dtype=torch.float32, device=x.device), 8
    br = max(16, triton.next_power_of_2(r))
    each = triton.cdiv(triton.cdiv(k, 256), split) * 256
    _shrink[(t, split)](x, a, s, index, k, r, each, BR=br, BK=256 if br <= 64 else 64)
    _expand[(t, triton.cdiv(n, 64))](s, b, y, index, n, r, scale, BR=br, BN=64)
    return y
