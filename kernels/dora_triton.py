"""The kernel of `dora_norm`: ‖W + s·B A‖ row by row, tile by tile, so that the sum is never stored.

The tile form reads W once, as the factored form ‖w‖² + 2s·(W Aᵀ)·B + s²·B(A Aᵀ)Bᵀ does, and has no cancellation: where
the norm is a thousandth of ‖w‖, the factored form is off by 18 % in fp32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfn.kernels.choose import Target
from peftfn.kernels.launch import cdiv, launch

RUNTIME = ("r", "b_n", "b_r", "scale")


@triton.jit
def _rows(
    w, a, b, out, block, n, k, r, w_n, w_k, a_r, a_k, b_n, b_r, scale,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[rows of the block] = ‖w + scale·b a‖."""
    rows = block * BN + tl.arange(0, BN)
    real = rows < n
    total = tl.zeros((BN,), tl.float32)
    w_rows, b_rows = w + rows.to(tl.int64)[:, None] * w_n, b + rows.to(tl.int64)[:, None] * b_n
    for k0 in range(0, k, BK):
        cols = k0 + tl.arange(0, BK)
        inside = (cols < k)[None, :]
        acc = tl.zeros((BN, BK), tl.float32)
        for r0 in range(0, r, BR):
            ranks = r0 + tl.arange(0, BR)
            bt = tl.load(b_rows + ranks[None, :] * b_r, real[:, None] & (ranks < r)[None, :], other=0.0)
            at = tl.load(
                a + ranks.to(tl.int64)[:, None] * a_r + cols.to(tl.int64)[None, :] * a_k,
                (ranks < r)[:, None] & inside,
                other=0.0,
            )
            acc = tl.dot(bt, at, acc, input_precision=PRECISION)
        tile = tl.load(w_rows + cols.to(tl.int64)[None, :] * w_k, real[:, None] & inside, other=0.0).to(tl.float32)
        tile += scale * acc
        total += tl.sum(tile * tile, 1)
    tl.store(out + rows, tl.sqrt(total), real)


@triton.jit(do_not_specialize=RUNTIME)
def _norm(
    w, a, b, out, n, k, r, w_n, w_k, a_r, a_k, b_n, b_r, scale,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One site."""
    _rows(w, a, b, out, tl.program_id(0), n, k, r, w_n, w_k, a_r, a_k, b_n, b_r, scale, PRECISION, BN, BK, BR)


@triton.jit(do_not_specialize=RUNTIME)
def _norms(
    addresses, scales, out, n, k, r, w_n, w_k, a_r, a_k, b_n, b_r,
    W: tl.constexpr, A: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Many sites of one shape: addresses [sites, 3] of their W, A and B; scales [sites]; out [sites, n]."""
    site = tl.program_id(1)
    w = tl.load(addresses + 3 * site).to(tl.pointer_type(W))
    a = tl.load(addresses + 3 * site + 1).to(tl.pointer_type(A))
    b = tl.load(addresses + 3 * site + 2).to(tl.pointer_type(A))
    if ALIGN:
        w, a, b = tl.multiple_of(w, 16), tl.multiple_of(a, 16), tl.multiple_of(b, 16)
    _rows(
        w, a, b, out + site.to(tl.int64) * n, tl.program_id(0), n, k, r, w_n, w_k, a_r, a_k, b_n, b_r,
        tl.load(scales + site), PRECISION, BN, BK, BR,
    )  # fmt: skip


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _blocks(there: Target, dtype: torch.dtype) -> dict[str, object]:
    """NOT MEASURED. fp32 factors multiply in three TF32 products, which lose nothing that fp32 keeps."""
    precise = "tf32x3" if there.kind == "cuda" and dtype is torch.float32 else "ieee"
    if there.kind == "interpreter":
        return {"PRECISION": precise, "BN": 16, "BK": 32, "BR": 16, "num_warps": 4, "num_stages": 1}
    return {"PRECISION": precise, "BN": 32, "BK": 128, "BR": 16, "num_warps": 4, "num_stages": 2}


def norm(there: Target, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖w + scale·b a‖ [n] in fp32: w [n, k], a [r, k], b [n, r], of any strides; a and b of one dtype."""
    (n, k), r = w.shape, a.shape[0]
    out = torch.empty(n, dtype=torch.float32, device=w.device)
    meta = _blocks(there, a.dtype)
    grid = (cdiv(n, int(str(meta["BN"]))),)
    launch(_norm, grid, w, a, b, out, n, k, r, *w.stride(), *a.stride(), *b.stride(), float(scale), **meta)
    return out


def norms(
    there: Target, ws: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """The norms of many sites of one shape, dtype and layout, [sites, n], in one launch."""
    w, a, b = ws[0], downs[0], ups[0]
    (n, k), r = w.shape, a.shape[0]
    rows = [[t.data_ptr() for t in site] for site in zip(ws, downs, ups, strict=True)]
    addresses = torch.tensor(rows, dtype=torch.int64).to(w.device, non_blocking=True)
    factors = torch.tensor(scales, dtype=torch.float32).to(w.device, non_blocking=True)
    out = torch.empty(len(ws), n, dtype=torch.float32, device=w.device)
    meta = _blocks(there, a.dtype)
    aligned = all(address % 16 == 0 for row in rows for address in row)
    launch(
        _norms, (cdiv(n, int(str(meta["BN"]))), len(ws)),
        addresses, factors, out, n, k, r, *w.stride(), *a.stride(), *b.stride(),
        W=TYPES[w.dtype], A=TYPES[a.dtype], ALIGN=aligned, **meta,
    )  # fmt: skip
    return out
