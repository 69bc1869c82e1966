"""y[i] = c_k ⊙ (x[i] Wᵀ + s_k·(x[i] A_kᵀ) B_kᵀ), k the adapter of row i: a batch whose rows have adapters of their own.

The base product runs once on all rows; the low-rank parts run in two launches for all adapters. Rows of index −1 are
the base's, and cost nothing more.

`Stack` is adapters of one rank, as `peftfn.stack` gives them. Adapters of other ranks, or of other nets, are further
groups: the base product is theirs too.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from peftfn.kernels.choose import Target, kernels_for
from peftfn.kernels.segments import Segments, segments

if TYPE_CHECKING:
    from peftfn.kernels.mixed_triton import Side


class Stack(NamedTuple):
    """k adapters of one layer and one rank: down [k, r, in], up [k, out, r], one scale, c [k, out] or None."""

    down: Tensor
    up: Tensor
    scale: float = 1.0
    rows: Tensor | None = None

    @property
    def slots(self) -> int:
        return self.down.shape[0]

    def operands(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.down.contiguous(), self.up.contiguous(), self.rows

    def sides(self, a: Tensor, b: Tensor) -> "tuple[Side, Side]":
        from peftfn.kernels.mixed_triton import Side

        (_, r, in_), out = a.shape, b.shape[1]
        return (
            Side(a, r * in_, in_, 1, in_, r, 1.0),
            Side(b, out * r, 1, r, out, r, float(self.scale)),
        )


Group = tuple[Stack, Segments]
"""Adapters, and which rows of the batch are whose; to them, the rows of other groups are the base's."""


def _run(
    x: Tensor, w: Tensor, groups: Sequence[Group], there: Target, tensors: Sequence[Any], keep_v: bool
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """(y; v, what c multiplies, if it is to be kept; the planes of S of each group)."""
    import peftfn.kernels.mixed_triton as ops

    y = torch.mm(x, w.mT)
    v, planes = y.clone() if keep_v else None, []
    for (adapters, rows), (a, b, c) in zip(groups, _threes(tensors), strict=True):
        down, up = adapters.sides(a, b)
        planes.append(ops.thin(there, x, down, rows))
        if c is None or v is None:
            ops.wide(there, planes[-1], up, rows, y, c=c)
        else:
            ops.wide(there, planes[-1], up, rows, v, c=c, out=y)
    return y, v, planes


class _Mixed(Function):
    """tensors: a, b and c of each group. No row is in two groups, so they may write one output in turn."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, w: Tensor, groups: Sequence[Group], there: Target, graded: bool, *tensors: Tensor | None
    ) -> Tensor:
        y, v, planes = _run(x, w, groups, there, tensors, graded and any(ctx.needs_input_grad[7::3]))
        ctx.save_for_backward(x, w, v, *planes, *tensors)
        ctx.groups, ctx.there = groups, there
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        import peftfn.kernels.mixed_triton as ops

        groups, there, need = ctx.groups, ctx.there, ctx.needs_input_grad
        x, w, v, *saved = ctx.saved_tensors
        planes, tensors = saved[: len(groups)], saved[len(groups) :]
        if torch.is_grad_enabled():  # to be differentiated again
            inputs = [t for t, n in zip((x, w, *tensors), (*need[:2], *need[5:]), strict=True) if n]
            with torch.enable_grad():
                y = _reference(x, w, groups, tensors)
            found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True, materialize_grads=True))
            grads = [next(found) if n else None for n in (*need[:2], *need[5:])]
            return *grads[:2], None, None, None, *grads[2:]
        dy = dv = dy.contiguous()
        for (_, rows), (_, _, c) in zip(groups, _threes(tensors), strict=True):
            dv = dv if c is None else dv * by_row(c, rows.of).to(dv.dtype)
        dx = torch.mm(dv, w) if need[0] else None
        dw = torch.mm(dv.mT, x) if need[1] else None
        grads = []
        for i, ((adapters, rows), (a, b, c)) in enumerate(zip(groups, _threes(tensors), strict=True)):
            need_a, need_b, need_c = need[5 + 3 * i : 8 + 3 * i]
            down, up = adapters.sides(a, b)
            ds = ops.thin(there, dv, up, rows) if dx is not None or need_a else None
            if dx is not None:
                ops.wide(there, ds, down, rows, dx)
            grads += [
                ops.outer(there, ds, x, down, rows) if need_a else None,
                ops.outer(there, planes[i], dv, up, rows) if need_b else None,
                ops.dots(there, dy, v, c, rows) if need_c else None,
            ]
        return dx, dw, None, None, None, *grads


def _threes(tensors: Sequence[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True))


def by_row(c: Tensor, index: Tensor) -> Tensor:
    """c [slots, n] → [t, n]: each row's own, ones for the base."""
    return torch.cat([torch.ones_like(c[:1]), c])[index + 1]


def mixed_lora(x: Tensor, w: Tensor, *groups: Group) -> Tensor:
    """c_k ⊙ (x Wᵀ + s_k·(x A_kᵀ) B_kᵀ), row by row with its own adapter k; −1 is x Wᵀ.

    x [t, in], w [Σ out, in] → [t, Σ out]. groups: (adapters, `segments` of the adapters of x's rows); several have one
    base product and two launches each, and a row that is in one group must be −1 in the others.
    """
    tensors = [t for adapters, _ in groups for t in adapters.operands()]
    there = kernels_for(x, w, *tensors)
    if there is None or x.dtype != w.dtype or not x.numel():
        return _reference(x, w, groups, tensors)
    x = x if x.stride(1) == 1 else x.contiguous()
    tensors[2::3] = [c if c is None else c.contiguous() for c in tensors[2::3]]
    if not torch.is_grad_enabled():
        return _run(x, w, groups, there, tensors, False)[0]
    y: Tensor = _Mixed.apply(x, w, groups, there, True, *tensors)  # type: ignore[no-untyped-call]
    return y


def mixed_rows(
    x: Tensor, w: Tensor, parts: Sequence[tuple[Any, int]], index: Tensor, kind: str, cache: dict[Any, Any]
) -> Tensor | None:
    """A mixed batch x [rows, …, in], or ids [rows, …] for kind "embedding", with w [out, in]; None where plain torch
    has to run it.

    parts: (adapters as `Method.low_rank` gives them for a stack, the number of the first of them); what is in none of
    them is the base. index: the adapter of each row. cache: keeps the segments of a batch, which all its layers use.
    """
    ids = kind == "embedding"
    stacks = [Stack(low.down, low.up, low.scale, low.gain) for low, _ in parts]
    shapes = all(s.down.dim() == s.up.dim() == 3 and (s.rows is None or s.rows.dim() == 2) for s in stacks)
    if kind == "product" or not shapes:
        return None
    tensors = [t for s in stacks for t in (s.down, s.up, s.rows)]
    if kernels_for(w if ids else x, w, *tensors) is None:
        return None
    if not x.numel() or (not ids and x.dtype != w.dtype) or (ids and x.is_floating_point()):
        return None
    if ids and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (w, *tensors)):
        return None
    each = x.numel() // x.shape[0] // (1 if ids else x.shape[-1])
    groups: list[tuple[Stack, Segments]] = []
    for stack, (_, start) in zip(stacks, parts, strict=True):
        key = "segments", each, x.device, start, stack.slots
        if key not in cache:
            local = index.to(x.device) - start
            local = local.where((local >= 0) & (local < stack.slots), -1)
            cache[key] = segments(local.repeat_interleave(each), stack.slots)
        groups.append((stack, cache[key]))
    if ids:
        return mixed_embedding(x.reshape(-1), w, *groups).view(*x.shape, -1)
    return mixed_lora(x.reshape(-1, x.shape[-1]), w, *groups).view(*x.shape[:-1], -1)


def mixed_embedding(ids: Tensor, w: Tensor, *groups: tuple[Stack, Segments]) -> Tensor:
    """`mixed_lora` of one-hot rows: ids [t] integers, w [dim, vocab] → [t, dim]. Gradients by plain torch."""
    tensors = [t for adapters, _ in groups for t in adapters.operands()]
    there = kernels_for(w, *tensors)
    graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (w, *tensors))
    if there is None or graded or ids.device != w.device or not ids.numel():
        return _embedding_reference(ids, w, groups)
    import peftfn.kernels.mixed_triton as ops

    y = F.embedding(ids, w.mT).contiguous()
    for (adapters, rows), (a, b, c) in zip(groups, _threes(tensors), strict=True):
        down, up = adapters.sides(a, b)
        ops.wide(there, ops.lookup(there, ids, down, rows), up, rows, y, c=c if c is None else c.contiguous())
    return y


def _embedding_reference(ids: Tensor, w: Tensor, groups: Sequence[tuple[Stack, Segments]]) -> Tensor:
    y = F.embedding(ids, w.mT)
    for adapters, rows in groups:
        index, k = rows.of, rows.of.clamp(min=0)
        s = adapters.down.mT[k, ids][:, None]  # [t, 1, r]
        change = adapters.scale * (s @ adapters.up[k].mT).squeeze(1)
        y = y + torch.where(index[:, None] < 0, 0.0, change).to(y.dtype)
        y = y if adapters.rows is None else y * by_row(adapters.rows, index).to(y.dtype)
    return y


def reference(x: Tensor, w: Tensor, adapters: Stack, index: Tensor) -> Tensor:
    """What `mixed_lora` means for one group: adapter by adapter."""
    return _alone(x, w, *adapters.operands(), adapters, index)


def _reference(x: Tensor, w: Tensor, groups: Sequence[Group], tensors: Sequence[Any]) -> Tensor:
    """What `mixed_lora` means: each row as in its own group."""
    (adapters, rows), *others = groups
    first, *more = _threes(tensors)
    y = _alone(x, w, *first, adapters, rows.of)
    for (adapters, rows), (a, b, c) in zip(others, more, strict=True):
        y = torch.where((rows.of < 0)[:, None], y, _alone(x, w, a, b, c, adapters, rows.of))
    return y


def _alone(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor | None, adapters: Stack, index: Tensor) -> Tensor:
    y = x @ w.mT
    for k in range(adapters.slots):
        change = adapters.scale * (x @ a[k].to(x.dtype).mT) @ b[k].to(x.dtype).mT
        y = y + torch.where((index == k)[:, None], change, 0.0)
    return y if c is None else y * by_row(c, index).to(y.dtype)
