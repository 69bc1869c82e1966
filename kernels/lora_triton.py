"""The kernels of `fused_linear`: y = c ⊙ (x Wᵀ + s·drop(x) Aᵀ Bᵀ) + bias, with its gradients.

    S = drop(x) Aᵀ              shrink: one pass over x
    v = x Wᵀ + s·S Bᵀ           gemm: the accumulator starts at s·S Bᵀ; c and the bias in the epilogue
    dv = c ⊙ dy
    dS = s·dv B,  dB = s·dvᵀ S,  dc = Σ dy ⊙ v       sweep: one pass over dy
    dA = dSᵀ drop(x)            sweep: one pass over x
    dx = dv W + drop(dS A)      gemm, again

A sweep gives partial sums in fp32 planes, which `fold` adds up in a fixed order: no atomics, bitwise the same twice.
The dropout mask is a function of a seed (philox.py); it is drawn where it is needed and never stored.
x, W, S, A, B and y have one dtype; c and the bias may be fp32 beside a half-precision x. Sums are fp32.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfn.kernels.choose import Target
from peftfn.kernels.launch import cdiv, launch, power

# What must not be part of what is compiled: the rows of a batch, and how they are shared out. Ranks and strides are:
# from them the compiler knows that neighbours are aligned, and reads 16 bytes at a time instead of 2.
RUNTIME = ("m", "rows_each")


@triton.jit
def keep(seed, rows, first, p, BM: tl.constexpr, BN: tl.constexpr):
    """[BM, BN] of bool: which of x[rows, first : first + BN] stay. One Philox call gives four columns."""
    row, quad = tl.broadcast(rows[:, None], (first // 4 + tl.arange(0, BN // 4))[None, :])
    zero = row * 0
    a, b, c, d = tl.philox(seed, row, quad, zero, zero, 7)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BM, BN))
    return (words >> 8).to(tl.float32) * 5.9604644775390625e-08 >= p


@triton.jit(do_not_specialize=RUNTIME)
def _shrink(
    x, a, out, seed, m, k, r, x_row, a_r, a_k, each, p,
    DROP: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """out [plane, m, r] = drop(x [m, k]) aᵀ, summed over the plane's `each` columns of x."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    plane = tl.program_id(2)
    ok, real = (rows < m)[:, None], (ranks < r)[None, :]
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    a_ranks = a + ranks.to(tl.int64)[None, :] * a_r
    acc = tl.zeros((BM, BR), tl.float32)
    for k0 in range(plane * each, tl.minimum(plane * each + each, k), BK):
        cols = k0 + tl.arange(0, BK)
        xt = tl.load(x_rows + cols[None, :], ok & (cols < k)[None, :], other=0.0)
        if DROP:
            xt = tl.where(keep(tl.load(seed), rows, k0, p, BM, BK), xt, 0.0)
        at = tl.load(a_ranks + cols.to(tl.int64)[:, None] * a_k, real & (cols < k)[:, None], other=0.0)
        acc = tl.dot(xt, at, acc, input_precision=PRECISION)
    if DROP:
        acc = acc / (1 - p)
    to = (plane.to(tl.int64) * m + rows)[:, None] * r + ranks[None, :]
    tl.store(out + to, acc.to(out.dtype.element_ty), ok & real)


@triton.jit(do_not_specialize=RUNTIME)
def _gemm(
    x, w, s, b, y, v, c, bias, seed, m, n, k, r, x_row, w_n, w_k, s_row, b_n, b_r, y_row, scale, p,
    C: tl.constexpr, BIAS: tl.constexpr, KEEP_V: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, MAIN: tl.constexpr,
):  # fmt: skip
    """y [m, n] = c ⊙ v + bias, v = x wᵀ + scale·drop(s bᵀ); w [n, k] and b [n, r] by their strides."""
    down, across = tl.cdiv(m, BM), tl.cdiv(n, BN)
    pid = tl.program_id(0)
    first = pid // (GROUP * across) * GROUP  # programs that run together share rows of w in the cache
    height = tl.minimum(down - first, GROUP)
    inside = pid % (GROUP * across)
    rows = (first + inside % height) * BM + tl.arange(0, BM)
    n0 = inside // height * BN
    cols = n0 + tl.arange(0, BN)
    ok, real = (rows < m)[:, None], (cols < n)[None, :]
    acc = tl.zeros((BM, BN), tl.float32)
    for r0 in range(0, r, 16):
        ranks = r0 + tl.arange(0, 16)
        st = tl.load(s + rows.to(tl.int64)[:, None] * s_row + ranks[None, :], ok & (ranks < r)[None, :], other=0.0)
        bt = tl.load(
            b + cols.to(tl.int64)[None, :] * b_n + ranks.to(tl.int64)[:, None] * b_r,
            (ranks < r)[:, None] & real,
            other=0.0,
        )
        acc = tl.dot(st, bt, acc, input_precision=PRECISION)
    acc = acc * scale
    if DROP:
        acc = tl.where(keep(tl.load(seed), rows, n0, p, BM, BN), acc / (1 - p), 0.0)
    x_rows = x + rows.to(tl.int64)[:, None] * x_row
    w_cols = w + cols.to(tl.int64)[None, :] * w_n
    if MAIN:  # `expand` has none: compiled all the same, an empty loop would cost a third of the registers
        for k0 in range(0, k, BK):
            ks = k0 + tl.arange(0, BK)
            xt = tl.load(x_rows + ks[None, :], ok & (ks < k)[None, :], other=0.0)
            wt = tl.load(w_cols + ks.to(tl.int64)[:, None] * w_k, (ks < k)[:, None] & real, other=0.0)
            acc = tl.dot(xt, wt, acc, input_precision=PRECISION)
    to = rows.to(tl.int64)[:, None] * y_row + cols[None, :]
    if KEEP_V:
        tl.store(v + to, acc.to(v.dtype.element_ty), ok & real)
    if C:
        acc = acc * tl.load(c + cols, cols < n, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        acc = acc + tl.load(bias + cols, cols < n, other=0.0).to(tl.float32)[None, :]
    tl.store(y + to, acc.to(y.dtype.element_ty), ok & real)


@triton.jit(do_not_specialize=RUNTIME)
def _sweep(
    t, thin, b, c, v, across, down, sums, scaled, seed, m, n, r, t_row, v_row, s_row, b_n, b_r, rows_each, p,
    ACROSS: tl.constexpr, DOWN: tl.constexpr, C: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One pass over t [m, n], whose tile is first scaled by c (kept in `scaled`) or dropped out:

    down [chunk, n, r] = tileᵀ thin      across [column block, m, r] = tile b      sums [chunk, n] = Σ t ⊙ v
    """
    chunk, block, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    cols = block * BN + tl.arange(0, BN)
    ranks = part * BR + tl.arange(0, BR)
    real, used = cols < n, ranks < r
    if ACROSS:
        bt = tl.load(
            b + cols.to(tl.int64)[:, None] * b_n + ranks.to(tl.int64)[None, :] * b_r,
            real[:, None] & used[None, :],
            other=0.0,
        )
    if C:
        ct = tl.load(c + cols, real, other=0.0).to(tl.float32)
        total = tl.zeros((BN,), tl.float32)
    outer = tl.zeros((BN, BR), tl.float32)
    stop = tl.minimum(chunk * rows_each + rows_each, m)
    for m0 in range(chunk * rows_each, stop, BM):
        rows = m0 + tl.arange(0, BM)
        ok = (rows < stop)[:, None]
        tile = tl.load(t + rows.to(tl.int64)[:, None] * t_row + cols[None, :], ok & real[None, :], other=0.0)
        if C:
            at = rows.to(tl.int64)[:, None] * v_row + cols[None, :]
            total += tl.sum(tile.to(tl.float32) * tl.load(v + at, ok & real[None, :], other=0.0).to(tl.float32), 0)
            tile = (tile.to(tl.float32) * ct[None, :]).to(t.dtype.element_ty)
            if part == 0:
                tl.store(scaled + at, tile, ok & real[None, :])
        if DROP:
            kept = keep(tl.load(seed), rows, block * BN, p, BM, BN)
            tile = tl.where(kept, tile, 0.0)
        if DOWN:
            st = tl.load(thin + rows.to(tl.int64)[:, None] * s_row + ranks[None, :], ok & used[None, :], other=0.0)
            outer = tl.dot(tl.trans(tile), st, outer, input_precision=PRECISION)
        if ACROSS:
            s = tl.dot(tile, bt, input_precision=PRECISION)
            to = (block.to(tl.int64) * m + rows)[:, None] * r + ranks[None, :]
            tl.store(across + to, s, ok & used[None, :])
    if DOWN:
        to = (chunk.to(tl.int64) * n + cols)[:, None] * r + ranks[None, :]
        tl.store(down + to, outer, real[:, None] & used[None, :])
    if C:  # noqa: SIM102  (the other condition is none that the compiler knows)
        if part == 0:
            tl.store(sums + chunk.to(tl.int64) * n + cols, total, real)


@triton.jit
def _sum(block, parts, out, size, r, out_row, out_r, planes, scale, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """out[i // r, i % r] = scale·Σ parts[plane, i], the planes in order, STEP of them in flight."""
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    acc = tl.zeros((BLOCK,), tl.float32)
    at = parts + i
    for first in range(0, planes, STEP):
        for j in tl.static_range(STEP):
            acc += tl.load(at, i < tl.where(first + j < planes, size, 0), other=0.0)
            at += size
    tl.store(out + i // r * out_row + i % r * out_r, (acc * scale).to(out.dtype.element_ty), ok)


@triton.jit(do_not_specialize=("size0", "planes0", "size1", "planes1", "size2", "planes2"))
def _fold(
    parts0, out0, size0, r0, row0, col0, planes0, scale0, parts1, out1, size1, r1, row1, col1, planes1, scale1,
    parts2, out2, size2, r2, row2, col2, planes2, scale2, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Up to three sums of planes, one by the first blocks, one by the next ones …"""
    block = tl.program_id(0)
    blocks0 = tl.cdiv(size0, BLOCK)
    if block < blocks0:
        _sum(block, parts0, out0, size0, r0, row0, col0, planes0, scale0, BLOCK, STEP)
    if parts1 is not None:
        block -= blocks0
        blocks1 = tl.cdiv(size1, BLOCK)
        if (block >= 0) & (block < blocks1):
            _sum(block, parts1, out1, size1, r1, row1, col1, planes1, scale1, BLOCK, STEP)
        if parts2 is not None:
            block -= blocks1
            if block >= 0:
                _sum(block, parts2, out2, size2, r2, row2, col2, planes2, scale2, BLOCK, STEP)


@triton.jit(do_not_specialize=RUNTIME)
def _rowwise(v, c, bias, out, m, n, v_row, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """out [m, n] = c ⊙ v + bias."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    t = tl.load(v + rows.to(tl.int64)[:, None] * v_row + cols[None, :], mask, other=0.0).to(tl.float32)
    t = t * tl.load(c + cols, cols < n, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        t = t + tl.load(bias + cols, cols < n, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * n + cols[None, :], t.to(out.dtype.element_ty), mask)


class Blocks(NamedTuple):
    """Tile sizes and options of the large product on a target."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


def blocks(there: Target, dtype: torch.dtype, m: int, busy: bool = False) -> Blocks:
    """The usual shapes for each architecture. busy: an epilogue or a mask that needs registers too."""
    if there.kind == "interpreter":
        return Blocks(32, 32, 32, 4, 1)
    if dtype is torch.float32:  # exact fp32 products have no tensor cores
        return Blocks(32, 64, 32, 4, 2)
    if m <= 64:
        return Blocks(64, 128, 64, 4, 2 if there.kind == "hip" else 4)
    if there.kind == "hip":
        return Blocks(128, 128, 64, 8, 2)
    return Blocks(128, 128 if busy or int(there.arch) < 90 else 256, 64, 8, 3)


def precision(dtype: torch.dtype) -> dict[str, str]:
    return {"PRECISION": "ieee" if dtype is torch.float32 else "tf32"}  # of no effect in half precision


def rowed(t: Tensor) -> Tensor:
    """t with neighbours in its last dimension next to each other."""
    return t if t.stride(-1) == 1 else t.contiguous()


class Shrink(NamedTuple):
    """How `shrink` is cut: rows, ranks and columns of a step, planes, warps, stages."""

    bm: int
    br: int
    bk: int
    split: int
    warps: int
    stages: int


def shrink_tiles(there: Target, dtype: torch.dtype, m: int, k: int, r: int) -> Shrink:
    """Enough programs to ask for all of the bandwidth; A is read by every 64 rows. Measured on sm_90."""
    if there.kind == "interpreter":
        return Shrink(16, 16, 32, 2 if k > 64 else 1, 4, 1)
    bm, br, bk = 64, min(power(r), 64), 64 if dtype is torch.float32 else 128
    split = max(1, min(8, cdiv(2 * there.processors, cdiv(m, bm) * cdiv(r, br)), cdiv(k, 2 * bk)))
    return Shrink(bm, br, bk, split, 4, 2 if there.kind == "hip" else 3)


def shrink(there: Target, x: Tensor, a: Tensor, p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """drop(x) aᵀ: x [m, k], a [r, k] of any strides → [m, r] in x's dtype."""
    (m, k), r = x.shape, a.shape[0]
    x = rowed(x)
    bm, br, bk, split, warps, stages = shrink_tiles(there, x.dtype, m, k, r)
    out = x.new_empty(m, r)
    planes = out if split == 1 else torch.empty(split, m, r, dtype=torch.float32, device=x.device)
    launch(
        _shrink, (cdiv(m, bm), cdiv(r, br), split),
        x, a, planes, seed, m, k, r, x.stride(0), a.stride(0), a.stride(1), cdiv(cdiv(k, bk), split) * bk,
        float(p), DROP=p > 0, **precision(x.dtype), BM=bm, BR=br, BK=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if split > 1:
        fold((planes, out, 1.0))
    return out


def gemm(
    there: Target,
    x: Tensor,
    w: Tensor,
    s: Tensor,
    b: Tensor,
    scale: float,
    *,
    c: Tensor | None = None,
    bias: Tensor | None = None,
    keep_v: bool = False,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(y, v): v = x wᵀ + scale·drop(s bᵀ), y = c ⊙ v + bias. x [m, k], w [n, k], s [m, r], b [n, r] → [m, n]."""
    (m, k), n, r = x.shape, w.shape[0], s.shape[1]
    x, s = rowed(x), rowed(s)
    y = x.new_empty(m, n)
    v = torch.empty_like(y) if keep_v else None
    size = blocks(there, x.dtype, m, busy=keep_v or p > 0)
    launch(
        _gemm, (cdiv(m, size.m) * cdiv(n, size.n),),
        x, w, s, b, y, v, c, bias, seed, m, n, k, r, x.stride(0), w.stride(0), w.stride(1), s.stride(0),
        b.stride(0), b.stride(1), n, float(scale), float(p),
        C=c is not None, BIAS=bias is not None, KEEP_V=keep_v, DROP=p > 0, **precision(x.dtype),
        BM=size.m, BN=size.n, BK=size.k, GROUP=8, MAIN=k > 0, num_warps=size.warps, num_stages=size.stages,
    )  # fmt: skip
    return y, v


def expand(there: Target, s: Tensor, b: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """drop(s bᵀ) [m, n], for a large product to be added to: `gemm` without its main loop."""
    return gemm(there, s[:, :0], b[:, :0], s, b, 1.0, p=p, seed=seed)[0]


def rowwise(there: Target, v: Tensor, c: Tensor, bias: Tensor | None = None) -> Tensor:
    """c ⊙ v + bias [m, n] in v's dtype: one pass, and no copy of c."""
    v = rowed(v)
    (m, n), (bm, bn) = v.shape, (16, 32) if there.kind == "interpreter" else (16, 256)
    out = v.new_empty(m, n)
    launch(
        _rowwise, (cdiv(m, bm), cdiv(n, bn)), v, c, bias, out, m, n, v.stride(0), BIAS=bias is not None, BM=bm, BN=bn,
        num_warps=4,
    )  # fmt: skip
    return out


class Sweep(NamedTuple):
    """How `sweep` is cut: rows of a step, columns, ranks, programs for each processor, warps, stages."""

    bm: int
    bn: int
    br: int
    waves: int
    warps: int
    stages: int


def sweep_tiles(there: Target, dtype: torch.dtype, r: int, scaled: bool, both: bool) -> Sweep:
    """scaled: c scales the tile, and its sums are wanted. both: two products of the tile. Measured on sm_90."""
    if there.kind == "interpreter":
        return Sweep(16, 32, 16, 2, 4, 1)
    br = min(power(r), 64)
    if dtype is torch.float32:
        return Sweep(32, 128, br, 2, 4 if there.kind == "hip" else 8, 2)
    if scaled and there.kind == "cuda" and int(there.arch) >= 100:  # the tile of sm_90 spills there
        return Sweep(32, 128, br, 2, 8, 2)
    if scaled or there.kind == "hip":
        return Sweep(64, 128, br, 2, 4, 2)
    if both:
        return Sweep(64, 256, br, 2 if br == 16 else 1, 8, 2)
    return Sweep(128, 128, br, 2, 8, 2)


class Swept(NamedTuple):
    """What one pass gives, each in fp32 or None: down [n, r], across [m, r], sums [n]; scaled [m, n] in t's dtype."""

    down: Tensor | None
    across: Tensor | None
    sums: Tensor | None
    scaled: Tensor | None


def sweep(
    there: Target,
    t: Tensor,
    thin: Tensor | None,
    b: Tensor | None,
    *,
    c: Tensor | None = None,
    v: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
    scale: float = 1.0,
    down: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Swept:
    """One pass over t [m, n]: scale·(c ⊙ t)ᵀ thin into `down` [n, r], scale·(c ⊙ t) b in `dtype`, Σ t ⊙ v, and c ⊙ t.

    thin [m, r], b [n, r]; None leaves that product out. down: where the first goes, of any strides and dtype.
    """
    t = rowed(t)
    (m, n), of = t.shape, thin if thin is not None else b
    r = 1 if of is None else of.shape[1]
    bm, bn, br, waves, warps, stages = sweep_tiles(there, t.dtype, r, c is not None, thin is not None and b is not None)
    columns = cdiv(n, bn)
    chunks = max(1, min(cdiv(m, bm), waves * there.processors // columns))
    rows_each = cdiv(cdiv(m, chunks), bm) * bm
    chunks = cdiv(m, rows_each)

    def planes(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=t.device)

    downs = planes(chunks, n, r) if thin is not None else None
    acrosses = planes(columns, m, r) if b is not None else None
    sums = planes(chunks, n) if c is not None else None
    scaled = torch.empty_like(t, memory_format=torch.contiguous_format) if c is not None else None
    thin = None if thin is None else rowed(thin)
    launch(
        _sweep, (chunks, columns, cdiv(r, br)),
        t, thin, b, c, v, acrosses, downs, sums, scaled, seed, m, n, r, t.stride(0), n,
        0 if thin is None else thin.stride(0), *((0, 0) if b is None else b.stride()), rows_each, float(p),
        ACROSS=b is not None, DOWN=thin is not None, C=c is not None, DROP=p > 0, **precision(t.dtype),
        BM=bm, BN=bn, BR=br, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    kept, across, total, todo = 1 / (1 - p), None, None, []
    if acrosses is not None:
        across = torch.empty(m, r, dtype=dtype or t.dtype, device=t.device)
        todo.append((acrosses, across, scale * kept))
    if downs is not None and down is not None:
        todo.append((downs, down, scale * kept))
    if sums is not None:
        total = torch.empty(n, dtype=torch.float32, device=t.device)
        todo.append((sums[..., None], total[:, None], 1.0))
    fold(*todo)
    return Swept(down, across, total, scaled)


def fold(*sums: tuple[Tensor, Tensor, float]) -> None:
    """For each (parts [planes, rows, r], out [rows, r], scale), of at most three: out = scale·Σ parts, in order."""
    args: list[object] = []
    for parts, out, scale in sums:
        planes, rows, r = parts.shape
        args += [parts, out, rows * r, r, out.stride(0), out.stride(1), planes, float(scale)]
    args += [None, None, 0, 0, 0, 0, 0, 0.0] * (3 - len(sums))
    blocks = sum(cdiv(parts[0].numel(), 512) for parts, _, _ in sums)
    launch(_fold, (blocks,), *args, BLOCK=512, STEP=8, num_warps=4)
