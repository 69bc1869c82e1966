"""The kernel of `dora_norm`: ‖W + s·B A‖ row by row, tile by tile, so that the sum is never stored.

The tile form reads W once, as the factored form ‖w‖² + 2s·(W Aᵀ)·B + s²·B(A Aᵀ)Bᵀ does, and has no cancellation: where
the norm is a thousandth of ‖w‖, the factored form is off by 18 % in fp32. Columns are shared out among programs, whose
sums of squares are added in their order: bitwise the same twice.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfn.kernels.choose import Target
from peftfn.kernels.launch import cdiv, launch, power


@triton.jit
def _squares(
    w, a, b, out, k, n, r, w_n, w_k, a_r, a_k, b_n, b_r, each, scale,
    PRECISION: tl.constexpr, ONE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """out[rows of the block] = ‖w + scale·b a‖², over `each` columns."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    real = (rows < n)[:, None]
    ranks = tl.arange(0, BR)
    w_rows, b_rows = w + rows.to(tl.int64)[:, None] * w_n, b + rows.to(tl.int64)[:, None] * b_n
    a_ranks = a + ranks.to(tl.int64)[:, None] * a_r
    if ONE:  # all ranks fit one tile, which the loop need not read again
        bt = tl.load(b_rows + ranks.to(tl.int64)[None, :] * b_r, real & (ranks < r)[None, :], other=0.0)
    total = tl.zeros((BN,), tl.float32)
    first = tl.program_id(1) * each
    for k0 in tl.range(first, tl.minimum(first + each, k), BK, num_stages=STAGES):
        cols = k0 + tl.arange(0, BK)
        inside = (cols < k)[None, :]
        tile = tl.load(w_rows + cols.to(tl.int64)[None, :] * w_k, real & inside, other=0.0)
        a_cols = a_ranks + cols.to(tl.int64)[None, :] * a_k
        if ONE:
            at = tl.load(a_cols, (ranks < r)[:, None] & inside, other=0.0)
            change = tl.dot(bt, at, input_precision=PRECISION)
        else:
            change = tl.zeros((BN, BK), tl.float32)
            for r0 in range(0, r, BR):
                left = ranks < r - r0
                bt = tl.load(b_rows + (r0 + ranks).to(tl.int64)[None, :] * b_r, real & left[None, :], other=0.0)
                at = tl.load(a_cols, left[:, None] & inside, other=0.0)
                change = tl.dot(bt, at, change, input_precision=PRECISION)
                a_cols += tl.full((), BR, tl.int64) * a_r
        t = tile.to(tl.float32) + scale * change
        total += tl.sum(t * t, 1)
    tl.store(out + rows, total, rows < n)


@triton.jit
def _norm(
    w, a, b, out, k, n, r, w_n, w_k, a_r, a_k, b_n, b_r, each, scale,
    PRECISION: tl.constexpr, ONE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One site: out [part, n]."""
    out += tl.program_id(1).to(tl.int64) * n
    _squares(w, a, b, out, k, n, r, w_n, w_k, a_r, a_k, b_n, b_r, each, scale, PRECISION, ONE, BN, BK, BR, STAGES)


@triton.jit
def _norms(
    addresses, scales, out, k, n, r, w_n, w_k, a_r, a_k, b_n, b_r, each,
    W: tl.constexpr, A: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, ONE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Many sites of one shape: addresses [sites, 3] of their W, A and B; scales [sites]; out [part, sites, n]."""
    site = tl.program_id(2)
    w = tl.load(addresses + 3 * site).to(tl.pointer_type(W))
    a = tl.load(addresses + 3 * site + 1).to(tl.pointer_type(A))
    b = tl.load(addresses + 3 * site + 2).to(tl.pointer_type(A))
    if ALIGN:
        w, a, b = tl.multiple_of(w, 16), tl.multiple_of(a, 16), tl.multiple_of(b, 16)
    out += (tl.program_id(1).to(tl.int64) * tl.num_programs(2) + site) * n
    scale = tl.load(scales + site)
    _squares(w, a, b, out, k, n, r, w_n, w_k, a_r, a_k, b_n, b_r, each, scale, PRECISION, ONE, BN, BK, BR, STAGES)


@triton.jit(do_not_specialize=("size",))
def _root(parts, out, size, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """out [size] = √Σ parts [SPLIT, size], in order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    total = tl.load(parts + i, ok, other=0.0)
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts + size.to(tl.int64) * part + i, ok, other=0.0)
    tl.store(out + i, tl.sqrt(total), ok)


TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tiles(NamedTuple):
    """How the norm is cut: rows, columns of a step, programs that share a row, warps, stages; and how B A is made."""

    bn: int
    bk: int
    split: int
    warps: int
    stages: int
    precision: str


def tiles(there: Target, w: torch.dtype, a: torch.dtype, sites: int, n: int, k: int, r: int) -> Tiles:
    """w, a: dtypes of the weight and of the factors. Measured on sm_90."""
    # fp32 factors multiply in three TF32 products, which lose nothing that fp32 keeps
    precision = "tf32x3" if there.kind == "cuda" and a is torch.float32 else "ieee"
    if there.kind == "interpreter":
        return Tiles(16, 32, 2 if k > 64 else 1, 4, 1, precision)
    if r <= 16:
        bn, bk, warps, stages = 32, 128, 4, 3
    elif a is torch.float32:
        bn, bk, warps, stages = 32, 128, 4, 2
    elif r <= 64:
        bn, bk, warps, stages = 64, 64, 4, 3
    else:
        bn, bk, warps, stages = 128, 64, 8, 3
    most = max(1, min(8, 4 * there.processors // (cdiv(n, bn) * sites), cdiv(k, 2 * bk)))
    split = 1 << (most.bit_length() - 1)
    return Tiles(bn, bk, split, warps, 2 if there.kind == "hip" else stages, precision)


def _squared(
    there: Target, kernel: object, sites: int, w: Tensor, a: Tensor, b: Tensor, first: tuple[object, ...],
    last: tuple[float, ...], **meta: object,
) -> Tensor:  # fmt: skip
    """Launch `kernel` for so many sites like (w, a, b): the norms [sites, n]."""
    (n, k), r = w.shape, a.shape[0]
    bn, bk, split, warps, stages, precision = tiles(there, w.dtype, a.dtype, sites, n, k, r)
    br = 16 if there.kind == "interpreter" else min(power(r), 64)
    parts = torch.empty(split, sites, n, dtype=torch.float32, device=w.device)
    launch(
        kernel, (cdiv(n, bn), split, sites), *first, parts, k, n, r, *w.stride(), *a.stride(), *b.stride(),
        cdiv(cdiv(k, bk), split) * bk, *last, **meta, PRECISION=precision, ONE=r <= br, BN=bn, BK=bk, BR=br,
        STAGES=stages, num_warps=warps,
    )  # fmt: skip
    out = torch.empty(sites, n, dtype=torch.float32, device=w.device)
    launch(_root, (cdiv(sites * n, 256),), parts, out, sites * n, SPLIT=split, BLOCK=256, num_warps=2)
    return out


def norm(there: Target, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """‖w + scale·b a‖ [n] in fp32: w [n, k], a [r, k], b [n, r], of any strides; a and b of one dtype."""
    return _squared(there, _norm, 1, w, a, b, (w, a, b), (float(scale),))[0]


def norms(
    there: Target, ws: Sequence[Tensor], downs: Sequence[Tensor], ups: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """The norms of many sites of one shape, dtype and layout, [sites, n], in one launch."""
    w, a, b = ws[0], downs[0], ups[0]
    rows = [[t.data_ptr() for t in site] for site in zip(ws, downs, ups, strict=True)]
    addresses = torch.tensor(rows, dtype=torch.int64).to(w.device, non_blocking=True)
    factors = torch.tensor(scales, dtype=torch.float32).to(w.device, non_blocking=True)
    aligned = all(address % 16 == 0 for row in rows for address in row)
    return _squared(
        there, _norms, len(ws), w, a, b, (addresses, factors), (), W=TYPES[w.dtype], A=TYPES[a.dtype], ALIGN=aligned
    )
