"""How a batch runs: what gates mean for a layer's product, for a bias, and for any other function of a weight.

Three strategies stand side by side. A low-rank change of all adapters is two batched products. Any other method with a
fast form runs under one `vmap` over its adapters. What is left runs once for each adapter that occurs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.kernels import choose
from peftfn.kernels.mixed_lora import mixed_rows
from peftfn.slots.gates import Gates, Index, Weights
from peftfn.slots.part import SIDE_BY_SIDE, Cut, One, Part, Run, Stack, Use
from peftfn.slots.rows import Share, share
from peftfn.tensors.arguments import picked
from peftfn.tensors.narrow import Narrow, half_of
from peftfn.tensors.precision import operand_dtype
from peftfn.tensors.transform import exactly


class Layer(NamedTuple):
    """A linear layer, an embedding or a convolution: x [rows, …] → [rows, …, out]."""

    name: str  # its site
    kind: str  # "linear", "embedding", or "product" for a convolution
    w: Any  # the base's weight, canonical; an operand where it is quantised
    parts: Sequence[Part]  # its adapters
    adapted: Callable[[Any, Tensor], Tensor]  # (adapted weight, x) ↦ the output with one adapter
    base: Cut  # x ↦ the output without


def product(gates: Gates, layer: Layer, x: Tensor) -> Tensor:
    """The layer's output for x [rows, …], each row with the adapters that its gates name."""
    gates = gates.here(x, layer.name)
    dtype = operand_dtype(x) if x.is_floating_point() else layer.w.dtype
    if (half := half_of(dtype)) and any(part.entry.fp32 for part in layer.parts):
        with exactly(x):
            return _by_gates(gates, _in_fp32(layer, half), x.float() if layer.kind == "linear" else x).to(dtype)
    return _by_gates(gates, layer, x)


def _in_fp32(layer: Layer, half: torch.dtype) -> Layer:
    """The layer whose adapters compute in fp32, and whose base in `half`."""
    w = Narrow(layer.w, half)
    if layer.kind == "linear":
        return layer._replace(w=w, base=lambda x: F.linear(x, w))  # type: ignore[arg-type]
    return layer._replace(w=w, base=lambda x: layer.base(x).float())


def _by_gates(gates: Gates, layer: Layer, x: Tensor) -> Tensor:
    if isinstance(gates, Weights):
        return _weighted(gates, layer, x)
    assert isinstance(gates, Index)
    return _masked(gates, layer, x) if gates.known is None else _sorted(gates, layer, x)


def each(gates: Gates, run: Run) -> Tensor:
    """The output of any function of the weight, from its outputs with single adapters."""
    gates = gates.here(None, "a function of the weight")
    if isinstance(gates, Weights):
        base = run(-1, lambda x: x)
        return _sum(gates, base, run, range(gates.count), "a function of the weight")
    assert isinstance(gates, Index)
    if gates.known is None:
        every = torch.stack([run(k, lambda x: x) for k in range(-1, gates.count)])
        return every[gates.index.to(every.device) + 1, torch.arange(gates.size, device=every.device)]
    if not gates.known:
        return run(-1, lambda x: x)
    order = sorted(range(len(gates.known)), key=gates.known.__getitem__)
    outputs, start = [], 0
    while start < len(order):
        k, stop = gates.known[order[start]], start
        while stop < len(order) and gates.known[order[stop]] == k:
            stop += 1
        outputs.append(run(k, _cut(torch.tensor(order[start:stop]))))
        start = stop
    out = torch.cat(outputs)
    return picked(out, torch.tensor(order).argsort().to(out.device))


class Uses(NamedTuple):
    """What a stack's adapters make of rows of `xs`."""

    xs: Sequence[Tensor]
    one: One  # with one adapter
    many: Use | None  # the same as a function of its tensors, for a vmap over adapters; None: not to be run under one


def around(gates: Gates, stacks: Sequence[Stack], name: str, base: Tensor, uses: Callable[[Stack], Uses]) -> Tensor:
    """What each row's adapters make of `base` [rows, …], which is what rows without an adapter have."""
    y = base
    for stack in stacks:
        xs, one, many = uses(stack)
        gates = gates.here(xs[0], name)
        if isinstance(gates, Weights):
            run = partial(_cut_to, stack, xs, one)
            y = _sum(gates, base, run, range(stack.start, stack.start + stack.size), name, y)
            continue
        assert isinstance(gates, Index)
        if gates.known is None:
            local, mine = own_adapters(gates, stack, y)
            if many is not None:
                new = stack.vmapped(local, [x[:, None] for x in xs], many)[:, 0]
            else:
                every = torch.arange(gates.size, device=y.device)
                new = torch.stack([one(k, *xs) for k in range(stack.size)])[local, every]
            y = torch.where(mine, new.to(y.dtype), y)
        elif (share := share_of(gates, stack.start, stack.size, y.device)) is not None:
            new = stack.by_bucket(share, xs, many, one).to(y.dtype)
            y = new if share.rows is None else y.index_copy(0, share.rows, new)
    return y


def _cut_to(stack: Stack, xs: Sequence[Tensor], one: One, k: int, cut: Cut) -> Tensor:
    return one(k - stack.start, *map(cut, xs))


def own_adapters(gates: Index, stack: Stack, y: Tensor) -> tuple[Tensor, Tensor]:
    """(which of the stack's adapters each row uses, any for those that use none; whether it uses one, as a mask of
    y [rows, …])."""
    local = gates.index.to(y.device) - stack.start
    mine = ((local >= 0) & (local < stack.size)).view(-1, *[1] * (y.dim() - 1))
    return local.clamp(0, stack.size - 1), mine


def bias(gates: Gates, values: Tensor, base: Tensor, y: Tensor) -> Tensor:
    """y and a bias: of adapter k values[k] [out], of the base `base` [out]."""
    gates = gates.here(None, "a bias")
    if isinstance(gates, Weights):
        change = gates.over(y, "a bias").to(values.dtype) @ (values - base)
        return y + base.to(y.dtype) + change.to(y.dtype)
    assert isinstance(gates, Index)
    index = gates.index.to(values.device)
    rows = values[index.clamp(min=0)]
    if gates.known is None or -1 in gates.known:
        rows = torch.where((index < 0)[:, None], base, rows)
    return y + rows.to(y.dtype).view(gates.size, *[1] * (y.dim() - 2), y.shape[-1])


# One adapter a row.


def _sorted(gates: Index, layer: Layer, x: Tensor) -> Tensor:
    """The index is known: rows of one adapter are computed together."""
    y, parts = _fused(gates, layer, x)
    if y is None and gates.positions and layer.kind == "linear" and x.dim() == 2 and all(map(_narrow, parts)):
        return _at_once(gates, layer, x)
    shares = [
        (part, found) for part in parts if (found := share_of(gates, part.start, part.size, x.device)) is not None
    ]
    if y is None and len(shares) == 1 and shares[0][1].size == gates.size:
        part, found = shares[0]
        if not part.is_low_rank(layer.kind):
            y = part.run(found, x, layer.kind, layer.adapted)
            return y if found.rows is None else picked(y, found.rows.argsort())
        if layer.kind == "linear":
            tokens = x.numel() // max(1, gates.size * x.shape[-1])
            bucket = found.as_it_stands(tokens, part.low.down.shape[-2])  # type: ignore[union-attr]
            if bucket is not None:
                return part.linear(bucket, x, layer.w, layer.base)
    y = layer.base(x) if y is None else y
    for part, found in shares:
        if part.is_low_rank(layer.kind):
            y = part.add_low_rank(y, found, x, layer.kind)
        else:
            new = part.run(found, x, layer.kind, layer.adapted)
            y = new if found.rows is None else y.index_copy(0, found.rows, new.to(y.dtype))
    return y


def share_of(gates: Index, start: int, size: int, device: torch.device) -> Share | None:
    """The rows of a part's adapters; None if there are none. Made once for all sites."""
    key, kept = (start, size, device), gates.kept
    if key not in kept:
        kept[key] = share(gates.known or (), *key)
    return kept[key]  # type: ignore[no-any-return]


def _fused(gates: Index, layer: Layer, x: Tensor) -> tuple[Tensor | None, Sequence[Part]]:
    """(the base's product with the changes of some parts, by kernels; None for nothing, the other parts)."""
    if not choose.fits(x):
        return None, layer.parts
    fast = [part for part in layer.parts if part.low is not None and _short(gates, part, x, layer.kind)]
    if not fast:
        return None, layer.parts
    y = mixed_rows(x, layer.w, [(p.low, p.start) for p in fast], gates.index, layer.kind, gates.kept)
    return y, layer.parts if y is None else [part for part in layer.parts if part not in fast]


def _short(gates: Index, part: Part, x: Tensor, kind: str) -> bool:
    """Whether the part has rows, and not so many for each of its adapters that these should be taken one by one."""
    if gates.known is None:
        return True
    key, kept = ("rows each", part.start, part.size), gates.kept
    if key not in kept:
        mine = [k for k in gates.known if part.start <= k < part.start + part.size]
        kept[key] = len(mine) / max(1, len(set(mine)))
    rows: float = kept[key]
    if not rows or kind != "linear":
        return rows > 0
    out, r = part.low.up.shape[-2:]  # type: ignore[union-attr]
    tokens = x.numel() // max(1, x.shape[0] * x.shape[-1])
    return not choose.by_segment(x, rows * tokens, out, x.shape[-1], r)


def _narrow(part: Part) -> bool:
    """Whether all factors of its adapters side by side are fewer than what it costs to sort positions by adapter."""
    low = part.low
    return (
        low is not None
        and low.gain is None
        and low.down.dim() == low.up.dim() == 3
        and part.size * low.down.shape[-2] <= SIDE_BY_SIDE
    )


def _at_once(gates: Index, layer: Layer, x: Tensor) -> Tensor:
    """Positions x [n, in]: all D are one product, of which each position keeps its own part, and all U one product."""
    y = layer.base(x)
    for part in layer.parts:
        low = part.low
        assert low is not None
        wide = part.size * low.down.shape[-2]
        s = F.linear(x, low.down.reshape(wide, -1).to(x.dtype)) * own_factors(gates, part, wide, y)
        up = low.up.transpose(0, 1).reshape(-1, wide).to(s.dtype).mT
        y = torch.addmm(y, s, up, alpha=low.scale) if s.dtype == y.dtype else y + (low.scale * (s @ up)).to(y.dtype)
    return y


def own_factors(gates: Index, part: Stack, wide: int, y: Tensor) -> Tensor:
    """[n, wide] for a part whose factors stand side by side: 1 where one is of the adapter that a position of y uses,
    0 for others."""
    key, kept = ("own", part.start, part.size, wide, y.dtype, y.device), gates.kept
    if key not in kept:
        table = gates.shared.get((key, torch.is_inference_mode_enabled()))
        if table is None:
            table = y.new_zeros(gates.count + 1, wide)  # the last: −1, the base
            own = torch.eye(part.size, dtype=y.dtype, device=y.device).repeat_interleave(wide // part.size, 1)
            table[part.start : part.start + part.size] = own
            gates.shared[key, torch.is_inference_mode_enabled()] = table
        kept[key] = table[gates.index.to(y.device)]
    return kept[key]  # type: ignore[no-any-return]


def _masked(gates: Index, layer: Layer, x: Tensor) -> Tensor:
    """Nobody can look at the index: each row with its own copy of its leaf, or every adapter on all rows."""
    fused, parts = _fused(gates, layer, x)
    y, every = layer.base(x) if fused is None else fused, torch.arange(gates.size, device=x.device)
    for part in parts:
        local, mine = own_adapters(gates, part, y)
        if part.is_low_rank(layer.kind) or part.vmaps(layer.kind):
            new = part.vmapped(local, (x,), part.using(layer.adapted))
        else:
            new = torch.stack([layer.adapted(part.one(k), x) for k in range(part.size)])[local, every]
        y = torch.where(mine, new.to(y.dtype), y)
    return y


# A weighted sum of adapters.


def _weighted(gates: Weights, layer: Layer, x: Tensor) -> Tensor:
    base = y = layer.base(x)
    for part in layer.parts:
        if part.is_low_rank(layer.kind) and layer.kind == "linear":
            y = y + _weighted_low_rank(gates, part, x, base, layer.name)
        else:
            ks = range(part.start, part.start + part.size)
            y = _sum(gates, base, part.runs(x, layer.adapted), ks, layer.name, y)
    return y


def _sum(gates: Weights, base: Tensor, run: Run, ks: Sequence[int], what: str, onto: Tensor | None = None) -> Tensor:
    """base, or `onto`, + Σ_k g_k ⊙ (run(k) − base), each adapter on the rows where its gate is not 0."""
    y, g = base if onto is None else onto, None
    for k in ks:
        rows = gates.active[k]
        if rows is not None and not len(rows):
            continue
        cut = _cut(rows)
        g = gates.over(base, what) if g is None else g
        mine = g[..., k : k + 1]
        change = (mine if rows is None else cut(mine)) * (run(k, cut) - cut(base))
        y = y + change if rows is None else y.index_add(0, rows.to(y.device), change.to(y.dtype))
    return y.to(base.dtype)


def _weighted_low_rank(gates: Weights, part: Part, x: Tensor, y: Tensor, what: str) -> Tensor:
    """Σ_k g_k (diag(c_k) (y + s·U_k D_k x) − y): all D one product, gated, then all U one product."""
    low, dtype = part.low, operand_dtype(x)
    assert low is not None
    g = gates.over(y, what)[..., part.start : part.start + part.size].to(dtype)
    n, r = part.size, low.down.shape[-2]
    down = low.down.to(dtype).expand(n, r, -1)
    up = low.up.to(dtype).expand(n, -1, r)
    c = None if low.gain is None else low.gain.to(dtype).expand(n, -1)
    s = F.linear(x, down.reshape(n * r, -1)).unflatten(-1, (n, r))
    s = (s * (low.scale * g)[..., None]).flatten(-2)
    up = up if c is None else c[..., None] * up
    change = F.linear(s, up.transpose(0, 1).reshape(-1, n * r))
    return change if c is None else change + (g @ (c - 1)) * y


def _cut(rows: Tensor | None) -> Cut:
    return (lambda x: x) if rows is None else (lambda x: picked(x, rows.to(x.device)))
