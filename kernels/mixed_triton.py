"""The kernels of `mixed_lora`: low-rank products of a batch in which every row has its own adapter.

Rows of one adapter are cut into blocks, `Segments.rows`, or each is taken alone where they are few; an adapter's
factors lie in one stack, each at its slot:

    thin     planes[part, row, j] = scale·Σₖ x[row, k] · A[j, k]        k in the part
    lookup   the same where x is one-hot: a column of A
    wide     y[row, n] = c[n]·(y[row, n] + scale·Σⱼ S[row, j] · B[j, n])     S: the planes, added on load
    outer    gradient[j, n] = scale·Σ_rows S[row, j] · x[row, n]        of one adapter, its rows in order
    dots     sums[n] = Σ_rows dy[row, n] · v[row, n]

The grid is sized by capacity, and blocks without an adapter return at once, so a captured CUDA graph may be replayed
with other segments. No atomics: every output has one writer, and planes are added in their order.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftfn.kernels.choose import Target
from peftfn.kernels.launch import cdiv, launch, power
from peftfn.kernels.segments import Segments

# The number of rows must not be part of what is compiled. Strides and ranks are: from them the compiler knows that
# neighbours are aligned, and reads 16 bytes at a time instead of 2.
RUNTIME = ("t",)


@triton.jit
def _summed(planes, rows, ranks, mask, t, width, SPLIT: tl.constexpr):
    """S [rows, ranks] in fp32: the planes, in order. All loads are in flight before the first is needed."""
    at = planes + rows[:, None] * width + ranks[None, :]
    total = tl.load(at, mask, other=0.0)
    for i in tl.static_range(1, SPLIT):
        total += tl.load(at + t.to(tl.int64) * i * width, mask, other=0.0)
    return total


@triton.jit(do_not_specialize=RUNTIME)
def _thin(
    x, a, planes, rows_of, slot_of, t, n, r, x_row, a_slot, a_r, a_n, each, scale,
    PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block, part, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = tl.load(rows_of + block * BT + tl.arange(0, BT))  # before the branch: neither load waits for the other
    slot = tl.load(slot_of + block)
    if slot < 0:
        return
    ok, rows = (rows >= 0)[:, None], rows.to(tl.int64)
    ranks = part * BR + tl.arange(0, BR)
    used = (ranks < r)[None, :]
    x_rows = x + rows[:, None] * x_row
    a_ranks = a + slot.to(tl.int64) * a_slot + ranks.to(tl.int64)[None, :] * a_r
    acc = tl.zeros((BT, BR), tl.float32)
    for k in range(plane * each, tl.minimum(plane * each + each, n), BK):
        cols = k + tl.arange(0, BK)
        xt = tl.load(x_rows + cols[None, :], ok & (cols < n)[None, :], other=0.0)
        at = tl.load(a_ranks + cols.to(tl.int64)[:, None] * a_n, used & (cols < n)[:, None], other=0.0)
        acc = tl.dot(xt, at.to(xt.dtype), acc, input_precision=PRECISION)
    to = (plane.to(tl.int64) * t + rows)[:, None] * r + ranks[None, :]
    tl.store(planes + to, acc * scale, ok & used)


@triton.jit(do_not_specialize=RUNTIME)
def _thin_row(
    x, a, planes, slot_of, t, n, r, x_row, a_slot, a_r, a_n, each, scale, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`_thin` of one row a program: no tile of 16 rows to fill."""
    row, part, plane = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slot_of + row)
    if slot < 0:
        return
    ranks = part * BR + tl.arange(0, BR)
    used = (ranks < r)[:, None]
    a_ranks = a + slot.to(tl.int64) * a_slot + ranks.to(tl.int64)[:, None] * a_r
    acc = tl.zeros((BR, BK), tl.float32)
    for k in range(plane * each, tl.minimum(plane * each + each, n), BK):
        cols = k + tl.arange(0, BK)
        xt = tl.load(x + row.to(tl.int64) * x_row + cols, cols < n, other=0.0).to(tl.float32)
        at = tl.load(a_ranks + cols.to(tl.int64)[None, :] * a_n, used & (cols < n)[None, :], other=0.0)
        acc += at.to(tl.float32) * xt[None, :]
    to = (plane.to(tl.int64) * t + row) * r + ranks
    tl.store(planes + to, tl.sum(acc, 1) * scale, ranks < r)


@triton.jit(do_not_specialize=RUNTIME)
def _wide_row(
    planes, b, y, c, out, slot_of, t, n, r, y_row, c_row, b_slot, b_r, b_n, scale,
    C: tl.constexpr, KEEP_V: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`_wide` of one row a program."""
    row = tl.program_id(0)
    slot = tl.load(slot_of + row)
    if slot < 0:
        return
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    real = cols < n
    to = row.to(tl.int64) * y_row + cols
    before = tl.load(y + to, real, other=0.0).to(tl.float32)
    b_cols = b + slot.to(tl.int64) * b_slot + cols.to(tl.int64)[:, None] * b_n
    plane = (tl.arange(0, SPLIT).to(tl.int64) * t + row)[:, None] * r
    acc = tl.zeros((BN,), tl.float32)
    for r0 in range(0, r, BR):
        ranks = r0 + tl.arange(0, BR)
        used = (ranks < r)[None, :]
        bt = tl.load(b_cols + ranks.to(tl.int64)[None, :] * b_r, real[:, None] & used, other=0.0)
        s = tl.sum(tl.load(planes + plane + ranks[None, :], used, other=0.0), 0)
        acc += tl.sum(bt.to(tl.float32) * s[None, :], 1)
    v = before + acc * scale
    if KEEP_V:
        tl.store(y + to, v.to(y.dtype.element_ty), real)
    if C:
        v = v * tl.load(c + slot.to(tl.int64) * c_row + cols, real, other=1.0).to(tl.float32)
    if KEEP_V:
        tl.store(out + to, v.to(out.dtype.element_ty), real)
    else:
        tl.store(y + to, v.to(y.dtype.element_ty), real)


@triton.jit(do_not_specialize=RUNTIME)
def _lookup(
    ids, a, planes, rows_of, slot_of, t, r, a_slot, a_r, a_n, scale, BT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rows = tl.load(rows_of + block * BT + tl.arange(0, BT))
    slot = tl.load(slot_of + block)
    if slot < 0:
        return
    ok, rows = rows >= 0, rows.to(tl.int64)
    ranks = tl.program_id(1) * BR + tl.arange(0, BR)
    mask = ok[:, None] & (ranks < r)[None, :]
    column = tl.load(ids + rows, ok, other=0).to(tl.int64)
    a_ranks = a + slot.to(tl.int64) * a_slot + ranks.to(tl.int64)[None, :] * a_r
    s = tl.load(a_ranks + column[:, None] * a_n, mask, other=0.0)
    tl.store(planes + rows[:, None] * r + ranks[None, :], s.to(tl.float32) * scale, mask)


@triton.jit(do_not_specialize=RUNTIME)
def _wide(
    planes, b, y, c, out, rows_of, slot_of, t, n, r, y_row, c_row, b_slot, b_r, b_n, scale,
    C: tl.constexpr, KEEP_V: tl.constexpr, PRECISION: tl.constexpr, SPLIT: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rows = tl.load(rows_of + block * BT + tl.arange(0, BT))
    slot = tl.load(slot_of + block)
    if slot < 0:
        return
    ok, rows = (rows >= 0)[:, None], rows.to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    real = (cols < n)[None, :]
    mask = ok & real
    to = rows[:, None] * y_row + cols[None, :]
    before = tl.load(y + to, mask, other=0.0)
    b_cols = b + slot.to(tl.int64) * b_slot + cols.to(tl.int64)[None, :] * b_n
    acc = tl.zeros((BT, BN), tl.float32)
    for r0 in range(0, r, BR):
        ranks = r0 + tl.arange(0, BR)
        bt = tl.load(b_cols + ranks.to(tl.int64)[:, None] * b_r, (ranks < r)[:, None] & real, other=0.0)
        s = _summed(planes, rows, ranks, ok & (ranks < r)[None, :], t, r, SPLIT)
        acc = tl.dot(s.to(y.dtype.element_ty), bt.to(y.dtype.element_ty), acc, input_precision=PRECISION)
    v = before.to(tl.float32) + acc * scale
    if KEEP_V:
        tl.store(y + to, v.to(y.dtype.element_ty), mask)
    if C:
        v = v * tl.load(c + slot.to(tl.int64) * c_row + cols, cols < n, other=1.0).to(tl.float32)[None, :]
    if KEEP_V:
        tl.store(out + to, v.to(out.dtype.element_ty), mask)
    else:  # one address less to keep: with `out`, sm_80 spills a register
        tl.store(y + to, v.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=RUNTIME)
def _outer(
    planes, x, out, order, starts, stops, t, n, r, x_row, o_slot, o_r, o_n, scale,
    PRECISION: tl.constexpr, SPLIT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    ranks = tl.program_id(2) * BR + tl.arange(0, BR)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    used, real = ranks < r, cols < n
    start, stop = tl.load(starts + slot), tl.load(stops + slot)
    acc = tl.zeros((BR, BN), tl.float32)
    for i in range(start, stop, BT):
        inside = i + tl.arange(0, BT)
        ok = (inside < stop)[:, None]
        rows = tl.load(order + inside, inside < stop, other=0).to(tl.int64)
        s = _summed(planes, rows, ranks, ok & used[None, :], t, r, SPLIT)
        xt = tl.load(x + rows[:, None] * x_row + cols[None, :], ok & real[None, :], other=0.0)
        acc = tl.dot(tl.trans(s).to(xt.dtype), xt, acc, input_precision=PRECISION)
    to = slot.to(tl.int64) * o_slot + ranks.to(tl.int64)[:, None] * o_r + cols.to(tl.int64)[None, :] * o_n
    tl.store(out + to, (acc * scale).to(out.dtype.element_ty), used[:, None] & real[None, :])


@triton.jit
def _dots(dy, v, out, order, starts, stops, n, dy_row, v_row, BT: tl.constexpr, BN: tl.constexpr):
    slot = tl.program_id(0)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    start, stop = tl.load(starts + slot), tl.load(stops + slot)
    acc = tl.zeros((BN,), tl.float32)
    for i in range(start, stop, BT):
        inside = i + tl.arange(0, BT)
        ok = inside < stop
        rows = tl.load(order + inside, ok, other=0).to(tl.int64)[:, None]
        mask = ok[:, None] & (cols < n)[None, :]
        dyt = tl.load(dy + rows * dy_row + cols[None, :], mask, other=0.0).to(tl.float32)
        acc += tl.sum(dyt * tl.load(v + rows * v_row + cols[None, :], mask, other=0.0).to(tl.float32), 0)
    tl.store(out + slot.to(tl.int64) * n + cols, acc.to(out.dtype.element_ty), cols < n)


class Side(NamedTuple):
    """One side (A, or B) of all adapters: element (j, k) of an adapter, j < r and k < n, is at
    slot · s_slot + j · s_r + k · s_n, and counts `scale` times."""

    data: Tensor
    s_slot: int
    s_r: int
    s_n: int
    n: int
    r: int
    scale: float


def _precision(t: Tensor) -> str:
    return "ieee" if t.dtype is torch.float32 else "tf32"


class Thin(NamedTuple):
    """How `thin` is cut: ranks and columns of a step, planes, warps, stages."""

    br: int
    bk: int
    split: int
    warps: int
    stages: int


SPLITS = (1, 2, 4, 8, 16)
"""So many planes: `wide` reads them all at once, and is compiled for their number."""


def thin_tiles(there: Target, blocks: int, block: int, n: int, r: int, width: int) -> Thin:
    """For so many blocks of rows, each of `block`; width: bytes of an element of x. Measured on sm_90: more planes make
    `thin` faster where blocks are few, and `wide`, which adds them up for every tile of columns, slower."""
    if there.kind == "interpreter":
        return Thin(16, 32, 2 if n > 64 else 1, 4, 1)
    stages = 2 if there.kind == "hip" else 3
    if block == 1:
        br, bk, warps, wanted, most = 16, 256, 2, 8 * there.processors, 16
    else:
        br = min(power(r), 64)
        bk = 128 if width == 2 and block * br <= 4096 else 64
        warps, wanted, most = 2 if block == 16 else 4, there.processors, 8
    wanted = max(1, min(cdiv(wanted, blocks * cdiv(r, br)), cdiv(n, bk), most))
    return Thin(br, bk, next(s for s in SPLITS if s >= wanted), warps, stages)


def thin(there: Target, x: Tensor, side: Side, rows: Segments) -> Tensor:
    """x [t, n] → planes [split, t, r] in fp32: S, of the rows that have an adapter. The rest is not written."""
    t, blocks = x.shape[0], len(rows.slot)
    br, bk, split, warps, stages = thin_tiles(there, blocks, rows.block, side.n, side.r, x.element_size())
    planes = torch.empty(split, t, side.r, dtype=torch.float32, device=x.device)
    each, grid = cdiv(cdiv(side.n, bk), split) * bk, (blocks, cdiv(side.r, br), split)
    if rows.block == 1:
        launch(
            _thin_row, grid,
            x, side.data, planes, rows.slot, t, side.n, side.r, x.stride(0), side.s_slot, side.s_r, side.s_n, each,
            float(side.scale), BR=br, BK=bk, num_warps=warps, num_stages=stages,
        )  # fmt: skip
        return planes
    launch(
        _thin, grid,
        x, side.data, planes, rows.rows, rows.slot, t, side.n, side.r, x.stride(0), side.s_slot, side.s_r, side.s_n,
        each, float(side.scale),
        PRECISION=_precision(x), BT=rows.block, BR=br, BK=bk, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return planes


def lookup(there: Target, ids: Tensor, side: Side, rows: Segments) -> Tensor:
    """ids [t] → planes [1, t, r]: the columns of A."""
    t, br = ids.shape[0], min(power(side.r), 64)
    planes = torch.empty(1, t, side.r, dtype=torch.float32, device=ids.device)
    launch(
        _lookup, (len(rows.slot), cdiv(side.r, br)),
        ids, side.data, planes, rows.rows, rows.slot, t, side.r, side.s_slot, side.s_r, side.s_n, float(side.scale),
        BT=rows.block, BR=br, num_warps=4,
    )  # fmt: skip
    return planes


class Wide(NamedTuple):
    """How `wide` is cut: columns, ranks of a step, warps."""

    bn: int
    br: int
    warps: int


def wide_tiles(there: Target, block: int, r: int, half: bool) -> Wide:
    """Measured on sm_90."""
    if there.kind == "interpreter":
        return Wide(32, 16, 4)
    br = min(power(r), 64)
    if there.kind == "hip" or half is False:
        return Wide(64, min(br, 32), 4)
    return Wide(64, min(br, 32), 2) if block == 1 else Wide(128, br, 4)


def wide(
    there: Target, planes: Tensor, side: Side, rows: Segments, y: Tensor, *, c: Tensor | None = None,
    out: Tensor | None = None,
) -> None:  # fmt: skip
    """y [t, n] += scale·S B, then times c: written over y, or to `out` while y keeps what c multiplies."""
    bn, br, warps = wide_tiles(there, rows.block, side.r, y.dtype is not torch.float32)
    if rows.block == 1:
        launch(
            _wide_row, (len(rows.slot), cdiv(side.n, bn)),
            planes, side.data, y, c, y if out is None else out, rows.slot,
            planes.shape[1], side.n, side.r, y.stride(0), 0 if c is None else c.stride(0),
            side.s_slot, side.s_r, side.s_n, float(side.scale),
            C=c is not None, KEEP_V=out is not None, SPLIT=planes.shape[0], BN=bn, BR=br, num_warps=warps,
            num_stages=1,
        )  # fmt: skip
        return
    launch(
        _wide, (len(rows.slot), cdiv(side.n, bn)),
        planes, side.data, y, c, y if out is None else out, rows.rows, rows.slot,
        planes.shape[1], side.n, side.r, y.stride(0), 0 if c is None else c.stride(0),
        side.s_slot, side.s_r, side.s_n, float(side.scale),
        C=c is not None, KEEP_V=out is not None, PRECISION=_precision(y), SPLIT=planes.shape[0],
        BT=rows.block, BN=bn, BR=br, num_warps=warps, num_stages=1,  # nothing to pipeline: loads are at once
    )  # fmt: skip


def outer(there: Target, planes: Tensor, x: Tensor, side: Side, rows: Segments) -> Tensor:
    """The gradient of `side`, in its own layout: scale·Σ S ⊗ x over each adapter's rows; zeros where it has none."""
    small = there.kind == "interpreter"
    bn, br = (32, 16) if small else (64, min(power(side.r), 64))
    grad = torch.empty_like(side.data)
    launch(
        _outer, (rows.slots, cdiv(side.n, bn), cdiv(side.r, br)),
        planes, x, grad, rows.order, rows.starts, rows.stops,
        planes.shape[1], side.n, side.r, x.stride(0), side.s_slot, side.s_r, side.s_n, float(side.scale),
        PRECISION=_precision(x), SPLIT=planes.shape[0], BT=16 if small else 32, BN=bn, BR=br,
        num_warps=4, num_stages=2 if planes.shape[0] <= 4 else 1,  # what is in flight lies in shared memory
    )  # fmt: skip
    return grad


def dots(there: Target, dy: Tensor, v: Tensor, c: Tensor, rows: Segments) -> Tensor:
    """The gradient of c [slots, n]: Σ dy ⊙ v over each adapter's rows."""
    bn = 32 if there.kind == "interpreter" else 128
    grad, n = torch.empty_like(c, memory_format=torch.contiguous_format), dy.shape[1]
    launch(
        _dots, (rows.slots, cdiv(n, bn)),
        dy, v, grad, rows.order, rows.starts, rows.stops, n, dy.stride(0), v.stride(0), BT=16, BN=bn, num_warps=4,
    )  # fmt: skip
    return grad
