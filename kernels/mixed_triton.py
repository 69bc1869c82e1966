"""The kernels of `mixed_lora`: low-rank products of a batch in which every row has its own adapter.

Rows of one adapter are neighbours in `Segments.order`, and work is cut into blocks of rows that share an adapter:

    thin     planes[split, slice, row, j] = Σₖ x[row, k] · A[j, k]          j < rank of the row's adapter
    lookup   the same where x is one-hot: a column of A
    wide     y[row, n] = c[n]·(y[row, n] + scale·Σⱼ S[row, j] · B[j, n])     S: the planes, added on load
    outer    gradient[j, n] = scale·Σ_rows S[row, j] · x[row, n]            of one adapter, its rows in order
    dots     sums[n] = Σ_rows dy[row, n] · v[row, n]

The grid is sized by capacity, and blocks without an adapter return at once, so a captured CUDA graph may be replayed
with other segments. Adapters lie in one tensor: evenly (a stack of one rank), or packed, each at an offset of its own
with a rank and a scale of its own. No atomics: every output has one writer.
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

RUNTIME = (
    "t", "slots", "width", "r", "scale", "split", "parts", "p_r", "p_n", "s_slot", "slices", "slice0",
)  # fmt: skip


@triton.jit
def _adapter(slot, piece, slots, at, rank_of, scale_of, s_slot, r, scale, PACKED: tl.constexpr):
    """(offset in the pool, rank, scale) of an adapter's slice."""
    if PACKED:
        i = piece * slots + slot
        return tl.load(at + i), tl.load(rank_of + i), tl.load(scale_of + i)
    else:
        return slot.to(tl.int64) * s_slot, r, scale


@triton.jit
def _summed(planes, rows, ranks, ok, rank, piece, slices, t, width, split, BT: tl.constexpr, BR: tl.constexpr):
    """S [BT, BR] in fp32: the planes of these rows and ranks, in order."""
    mask = ok[:, None] & (ranks < rank)[None, :]
    at = planes + (piece.to(tl.int64) * t + rows)[:, None] * width + ranks[None, :]
    total = tl.zeros((BT, BR), tl.float32)
    for _ in range(split):
        total += tl.load(at, mask, other=0.0)
        at += slices.to(tl.int64) * t * width
    return total


@triton.jit(do_not_specialize=RUNTIME)
def _thin(
    x, pool, planes, order, first, size, slot_of, at, rank_of, scale_of, in_at, in_n,
    t, slots, slices, width, x_row, s_slot, p_r, p_n, n, r, scale, split, parts,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slot = tl.load(slot_of + block)
    if slot < 0:
        return
    piece, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    offset, rank, factor = _adapter(slot, piece, slots, at, rank_of, scale_of, s_slot, r, scale, PACKED)
    if part * BR >= rank:
        return
    inside = tl.arange(0, BT)
    ok = inside < tl.load(size + block)
    rows = tl.load(order + tl.load(first + block) + inside, ok, other=0).to(tl.int64)
    ranks = part * BR + tl.arange(0, BR)
    col0 = 0
    if PACKED:
        n, col0 = tl.load(in_n + piece), tl.load(in_at + piece)
        p_r = n  # packed rows are as long as their layer is wide
    each = tl.cdiv(tl.cdiv(n, BK), split) * BK
    k0 = tl.program_id(2) * each
    acc = tl.zeros((BT, BR), tl.float32)
    for k in range(k0, tl.minimum(k0 + each, n), BK):
        cols = k + tl.arange(0, BK)
        xt = tl.load(x + rows[:, None] * x_row + (col0 + cols)[None, :], ok[:, None] & (cols < n)[None, :], other=0.0)
        pt = tl.load(
            pool + offset + ranks.to(tl.int64)[None, :] * p_r + cols.to(tl.int64)[:, None] * p_n,
            (ranks < rank)[None, :] & (cols < n)[:, None],
            other=0.0,
        )
        acc = tl.dot(xt, pt.to(xt.dtype), acc, input_precision=PRECISION)
    plane = tl.program_id(2).to(tl.int64) * slices + piece
    to = (plane * t + rows)[:, None] * width + ranks[None, :]
    tl.store(planes + to, acc * factor, ok[:, None] & (ranks < rank)[None, :])


@triton.jit(do_not_specialize=RUNTIME)
def _lookup(
    ids, pool, planes, order, first, size, slot_of, at, rank_of, scale_of,
    t, slots, slices, width, s_slot, p_r, p_n, r, scale, parts,
    PACKED: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slot = tl.load(slot_of + block)
    if slot < 0:
        return
    piece, part = tl.program_id(1) // parts, tl.program_id(1) % parts
    offset, rank, factor = _adapter(slot, piece, slots, at, rank_of, scale_of, s_slot, r, scale, PACKED)
    inside = tl.arange(0, BT)
    ok = inside < tl.load(size + block)
    rows = tl.load(order + tl.load(first + block) + inside, ok, other=0).to(tl.int64)
    ranks = part * BR + tl.arange(0, BR)
    mask = ok[:, None] & (ranks < rank)[None, :]
    column = tl.load(ids + rows, ok, other=0).to(tl.int64)
    s = tl.load(pool + offset + ranks.to(tl.int64)[None, :] * p_r + column[:, None] * p_n, mask, other=0.0)
    to = (piece.to(tl.int64) * t + rows)[:, None] * width + ranks[None, :]
    tl.store(planes + to, s.to(tl.float32) * factor, mask)


@triton.jit(do_not_specialize=RUNTIME)
def _wide(
    planes, pool, y, c, out, order, first, size, slot_of, at, rank_of, scale_of, out_at, out_n,
    t, slots, slices, slice0, width, y_row, c_row, s_slot, p_r, p_n, n, r, scale, split,
    PACKED: tl.constexpr, C: tl.constexpr, KEEP_V: tl.constexpr, PRECISION: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    slot = tl.load(slot_of + block)
    if slot < 0:
        return
    piece = slice0 + tl.program_id(2)
    offset, rank, factor = _adapter(slot, piece, slots, at, rank_of, scale_of, s_slot, r, scale, PACKED)
    col0 = 0
    if PACKED:
        n, col0 = tl.load(out_n + piece), tl.load(out_at + piece)
        p_r = n  # packed rows are as long as their layer is wide
    if tl.program_id(1) * BN >= n:
        return
    inside = tl.arange(0, BT)
    ok = inside < tl.load(size + block)
    rows = tl.load(order + tl.load(first + block) + inside, ok, other=0).to(tl.int64)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BT, BN), tl.float32)
    for r0 in range(0, rank, 16):
        ranks = r0 + tl.arange(0, 16)
        s = _summed(planes, rows, ranks, ok, rank, piece, slices, t, width, split, BT, 16)
        pt = tl.load(
            pool + offset + ranks.to(tl.int64)[:, None] * p_r + cols.to(tl.int64)[None, :] * p_n,
            (ranks < rank)[:, None] & (cols < n)[None, :],
            other=0.0,
        )
        acc = tl.dot(s.to(y.dtype.element_ty), pt.to(y.dtype.element_ty), acc, input_precision=PRECISION)
    mask = ok[:, None] & (cols < n)[None, :]
    to = rows[:, None] * y_row + (col0 + cols)[None, :]
    v = tl.load(y + to, mask, other=0.0).to(tl.float32) + acc * factor
    if KEEP_V:
        tl.store(y + to, v.to(y.dtype.element_ty), mask)
    if C:
        v = v * tl.load(c + slot.to(tl.int64) * c_row + col0 + cols, cols < n, other=1.0).to(tl.float32)[None, :]
    if KEEP_V:
        tl.store(out + to, v.to(out.dtype.element_ty), mask)
    else:  # one address less to keep: with `out`, sm_80 spills a register
        tl.store(y + to, v.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=RUNTIME)
def _outer(
    planes, x, out, order, starts, stops, at, rank_of, scale_of, in_at, in_n,
    t, slots, slices, width, x_row, s_slot, p_r, p_n, n, r, scale, split, parts,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    piece, part = tl.program_id(2) // parts, tl.program_id(2) % parts
    offset, rank, factor = _adapter(slot, piece, slots, at, rank_of, scale_of, s_slot, r, scale, PACKED)
    col0 = 0
    if PACKED:
        n, col0 = tl.load(in_n + piece), tl.load(in_at + piece)
        p_r = n  # packed rows are as long as their layer is wide
    if part * BR >= rank or tl.program_id(1) * BN >= n:
        return
    ranks = part * BR + tl.arange(0, BR)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    start, stop = tl.load(starts + slot), tl.load(stops + slot)
    acc = tl.zeros((BR, BN), tl.float32)
    for i in range(start, stop, BT):
        inside = i + tl.arange(0, BT)
        ok = inside < stop
        rows = tl.load(order + inside, ok, other=0).to(tl.int64)
        s = _summed(planes, rows, ranks, ok, rank, piece, slices, t, width, split, BT, BR)
        xt = tl.load(x + rows[:, None] * x_row + (col0 + cols)[None, :], ok[:, None] & (cols < n)[None, :], other=0.0)
        acc = tl.dot(tl.trans(s).to(xt.dtype), xt, acc, input_precision=PRECISION)
    to = offset + ranks.to(tl.int64)[:, None] * p_r + cols.to(tl.int64)[None, :] * p_n
    tl.store(out + to, (acc * factor).to(out.dtype.element_ty), (ranks < rank)[:, None] & (cols < n)[None, :])


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


class Tables(NamedTuple):
    """Where adapters lie in a packed tensor: [slices, slots] each."""

    at: Tensor  # int64, offset in elements
    rank: Tensor  # int32
    scale: Tensor  # fp32


class Columns(NamedTuple):
    """The columns that belong to each slice of an activation: [slices] of int32."""

    at: Tensor
    n: Tensor


class Side(NamedTuple):
    """One side (A, or B) of all adapters: element (j, k) of an adapter is at its offset + j·p_r + k·p_n (packed: p_r is
    its layer's n).

    tables and columns are None for a plain stack of one slice: slot · s_slot, rank r, scale `scale`, n columns.
    """

    data: Tensor
    s_slot: int
    p_r: int
    p_n: int
    n: int
    r: int
    scale: float
    tables: Tables | None
    columns: Columns | None
    slices: int = 1

    def where(self) -> tuple[Tensor | None, ...]:
        return tuple(self.tables) if self.tables is not None else (None, None, None)

    def span(self) -> tuple[Tensor | None, ...]:
        return tuple(self.columns) if self.columns is not None else (None, None)


def _precision(t: Tensor) -> str:
    return "ieee" if t.dtype is torch.float32 else "tf32"


def thin(there: Target, x: Tensor, side: Side, rows: Segments) -> Tensor:
    """x [t, in] → planes [split, slices, t, r] in fp32; a row's own rank is written, the rest is not read."""
    t = x.shape[0]
    small = there.kind == "interpreter"
    br = 16 if side.r <= 16 or small else min(power(side.r), 64)
    bk = 32 if small else 128 if x.element_size() == 2 and rows.block * br <= 1024 else 64
    parts = cdiv(side.r, br)
    programs = len(rows.slot) * parts * side.slices  # NOT MEASURED: enough programs to ask for all the bandwidth
    split = max(1, min(8, cdiv(2 * there.processors, programs), cdiv(side.n, 2 * bk)))
    planes = torch.empty(split, side.slices, t, side.r, dtype=torch.float32, device=x.device)
    launch(
        _thin, (len(rows.slot), side.slices * parts, split),
        x, side.data, planes, rows.order, rows.first, rows.size, rows.slot, *side.where(), *side.span(),
        t, rows.slots, side.slices, side.r, x.stride(0), side.s_slot, side.p_r, side.p_n, side.n, side.r,
        float(side.scale), split, parts,
        PACKED=side.tables is not None, PRECISION=_precision(x), BT=rows.block, BR=br, BK=bk,
        num_warps=4, num_stages=2 if there.kind == "hip" else 3,
    )  # fmt: skip
    return planes


def lookup(there: Target, ids: Tensor, side: Side, rows: Segments) -> Tensor:
    """ids [t] → planes [1, slices, t, r]: the columns of A."""
    t = ids.shape[0]
    br = min(power(side.r), 64)
    planes = torch.empty(1, side.slices, t, side.r, dtype=torch.float32, device=ids.device)
    launch(
        _lookup, (len(rows.slot), side.slices * cdiv(side.r, br)),
        ids, side.data, planes, rows.order, rows.first, rows.size, rows.slot, *side.where(),
        t, rows.slots, side.slices, side.r, side.s_slot, side.p_r, side.p_n, side.r, float(side.scale),
        cdiv(side.r, br), PACKED=side.tables is not None, BT=rows.block, BR=br, num_warps=4,
    )  # fmt: skip
    return planes


def wide(
    there: Target,
    planes: Tensor,
    side: Side,
    rows: Segments,
    y: Tensor,
    *,
    c: Tensor | None = None,
    out: Tensor | None = None,
    piece: int | None = None,
) -> None:
    """y [t, n] += scale·S B, then times c: written over y, or to `out` while y keeps what c multiplies.

    piece: of the slices, only this one.
    """
    bn = 32 if there.kind == "interpreter" else 64  # a width of 128 gave NaN on sm_90 elsewhere
    launch(
        _wide, (len(rows.slot), cdiv(side.n, bn), side.slices if piece is None else 1),
        planes, side.data, y, c, y if out is None else out, rows.order, rows.first, rows.size, rows.slot,
        *side.where(), *side.span(),
        planes.shape[2], rows.slots, side.slices, piece or 0, planes.shape[3], y.stride(0),
        0 if c is None else c.stride(0),
        side.s_slot, side.p_r, side.p_n, side.n, side.r, float(side.scale), planes.shape[0],
        PACKED=side.tables is not None, C=c is not None, KEEP_V=out is not None, PRECISION=_precision(y),
        BT=rows.block, BN=bn, num_warps=4, num_stages=2,
    )  # fmt: skip


def outer(there: Target, planes: Tensor, x: Tensor, side: Side, rows: Segments) -> Tensor:
    """The gradient of `side`, in its own layout: scale·Σ S ⊗ x over each adapter's rows; zeros where it has none."""
    small = there.kind == "interpreter"
    bn, br = (32, 16) if small else (64, min(power(side.r), 64))
    grad = torch.empty_like(side.data)
    parts = cdiv(side.r, br)
    launch(
        _outer, (rows.slots, cdiv(side.n, bn), side.slices * parts),
        planes, x, grad, rows.order, rows.starts, rows.stops, *side.where(), *side.span(),
        planes.shape[2], rows.slots, side.slices, planes.shape[3], x.stride(0), side.s_slot, side.p_r, side.p_n,
        side.n, side.r, float(side.scale), planes.shape[0], parts,
        PACKED=side.tables is not None, PRECISION=_precision(x), BT=16 if small else 32, BN=bn, BR=br,
        num_warps=4, num_stages=2,
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
