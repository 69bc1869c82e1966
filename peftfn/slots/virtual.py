"""What virtual tokens and prefixes have in common: which rows have how many, and the arguments that count tokens.

A batch whose rows have different numbers of virtual tokens has the largest number for all, and masks the rest. Where
attention is causal these holes stand in front, so that a plain slice takes the virtual part off and distances between
real tokens stay (sliding windows, ALiBi). Elsewhere they stand at the end, so that position 0 is a row's first token
(which poolers read) and positions count right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.model.place import Place
from peftfn.slots.gates import Gates, Index
from peftfn.tensors.cache import grows, is_cache

BY_MASK = frozenset(["opt"])
"""Types of models that count positions by the attention mask, so that positions given to them would be wrong."""


@dataclass(frozen=True)
class Virtual:
    """The virtual tokens of a batch."""

    size: int  # of a row with the most
    counts: Tensor | None  # [rows]; None: all rows have `size`
    causal: bool
    shift: Tensor | int = 0  # by how much the positions of each row's own tokens are moved [rows, 1]
    still: bool = False  # whether those of any row are not

    def mine(self, device: torch.device) -> Tensor:
        """[rows or 1, size]: whether a position holds a virtual token, and no hole."""
        j = torch.arange(self.size, device=device)
        if self.counts is None:
            return torch.ones(1, self.size, dtype=torch.bool, device=device)
        n = self.counts.to(device)[:, None]
        return j >= self.size - n if self.causal else j < n

    def order(self, tokens: int, device: torch.device) -> Tensor | None:
        """[rows, size + tokens]: what stands where, so that the holes come last; None where nothing moves."""
        if self.counts is None or self.causal:
            return None
        j, n = torch.arange(self.size + tokens, device=device), self.counts.to(device)[:, None]
        return torch.where(j < n, j, torch.where(j < n + tokens, self.size + j - n, j - tokens))

    def joined(self, virtual: Tensor, own: Tensor) -> Tensor:
        """[rows, size + tokens, …]: virtual [rows or 1, size, …] in front of own [rows, tokens, …], holes moved."""
        out = torch.cat([virtual.expand(len(own), *virtual.shape[1:]), own], 1)
        order = self.order(own.shape[1], own.device)
        return out if order is None else moved(out, order)


def moved(x: Tensor, order: Tensor) -> Tensor:
    """x [rows, tokens, …] with the token order[i, j] of each row i at j."""
    return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def named(m: Place, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name, those that are None left out."""
    given = {**dict(zip(m.arguments, args, strict=False)), **kwargs}
    return {k: v for k, v in given.items() if v is not None}


def past(m: Place, cache: Any) -> int:
    """How many positions a cache holds. ValueError for one that has no room for more."""
    if cache is None:
        return 0
    if is_cache(cache) and not grows(cache):
        raise ValueError(
            f"{m.label}: virtual tokens take places in the cache, and a {type(cache).__name__} has none for them: "
            "generate with a dynamic cache (no cache_implementation)"
        )
    return int(cache.get_seq_length())


def has_positions_by_cache(m: Place) -> bool:
    """Whether a backbone embeds absolute positions that nobody can give: it counts on from the length of the cache."""
    return "position_ids" not in m.arguments and any(
        "PositionalEmbedding" in type(part).__name__ for part in m.module.modules()
    )


def gathered(
    parts: Sequence[Any], gates: Gates | None, rows: int, names: Sequence[str], m: Place, causal: bool
) -> tuple[dict[str, Tensor], Virtual]:
    """({name: the tensor of each row, [rows or 1, …, size, d]}, the virtual tokens). Tokens are the second to last."""
    if gates is None:
        (part,) = parts
        values = {k: part.p[k][None] for k in names}
        n = values[names[0]].shape[-2]
        return values, Virtual(n, None, causal, n if _shifts(part) else 0, not _shifts(part))
    found = gates.at(rows)
    if not isinstance(found, Index):
        if found is None:
            raise ValueError(f"{m.label}: its inputs have {rows} rows, and the batch has {gates.size}")
        raise ValueError(
            f"{m.label}: a fraction of a virtual token has no meaning: give gates with one 1 a row, or use net.mixed"
        )
    stacks = [{k: _whole(part, k) for k in names} for part in parts]
    size = max(s[names[0]].shape[-2] for s in stacks)
    index = found.index
    at = torch.zeros(found.count + 1, dtype=torch.long)  # adapter → its row in the table; the last: −1, the base
    counts, shifts = (torch.zeros(found.count + 1, dtype=torch.long) for _ in range(2))
    tables: dict[str, list[Tensor]] = {k: [] for k in names}
    total = 0
    for part, stack in zip(parts, stacks, strict=True):
        n = stack[names[0]].shape[-2]
        hole = (0, 0, size - n, 0) if causal else (0, 0, 0, size - n)
        for k, t in stack.items():
            tables[k].append(F.pad(t, hole))
        counts[part.start : part.start + part.size] = n
        shifts[part.start : part.start + part.size] = n if _shifts(part) else 0
        at[part.start : part.start + part.size] = torch.arange(total, total + part.size)
        total += part.size
    at, counts, shifts = (t.to(index.device) for t in (at, counts, shifts))
    values = {k: torch.cat(ts)[at[index]] for k, ts in tables.items()}
    return values, Virtual(size, counts[index], causal, shifts[index][:, None], not all(map(_shifts, parts)))


def _shifts(part: Any) -> bool:
    """Whether positions count virtual tokens."""
    return getattr(part.method, "shifts", True)


def _whole(part: Any, name: str) -> Tensor:
    """A prepared tensor of every adapter of a stack."""
    t: Tensor = part.p[name]
    return t.expand(part.size, *t.shape) if part.axes[name] is None else t


def _own_positions(m: Place, ids: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """The positions that a backbone gives to its tokens by itself, where its cache is empty: from 0 on, or as RoBERTa
    counts them, behind its padding token's number and past padding."""
    by_ids: Any = next((q for q in m.module.modules() if hasattr(q, "create_position_ids_from_input_ids")), None)
    if by_ids is None:
        return torch.arange(tokens, device=device)[None]
    if ids is None:
        return torch.arange(tokens, device=device)[None] + by_ids.padding_idx + 1
    positions: Tensor = by_ids.create_position_ids_from_input_ids(ids, by_ids.padding_idx)
    return positions


def counted(
    given: dict[str, Any], m: Place, virtual: Virtual, rows: int, tokens: int, before: int, first: bool
) -> None:
    """Change the arguments that count tokens: mask, positions, token types.

    before: positions in the cache, virtual ones among them. first: this step has the virtual tokens in its input.
    """
    mask = given.get("attention_mask")
    if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() != 2):
        what = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(f"{m.label}: virtual tokens need an attention mask [rows, tokens], and this one is {what}")
    device = m.device if mask is None else mask.device
    if mask is not None or virtual.counts is not None:
        if mask is None:
            mask = torch.ones(rows, tokens + max(0, before - virtual.size), dtype=torch.long, device=device)
        mine = virtual.mine(device).to(mask.dtype).expand(rows, virtual.size)
        given["attention_mask"] = virtual.joined(mine, mask)
    if first and "token_type_ids" in given:
        types = given["token_type_ids"].expand(rows, tokens)
        given["token_type_ids"] = virtual.joined(types.new_zeros(1, virtual.size), types)
    given.pop("cache_position", None)
    holes = virtual.counts is not None and virtual.causal
    counts = virtual.counts
    if holes and counts is not None and has_positions_by_cache(m) and not bool(counts.eq(virtual.size).all()):
        raise ValueError(
            f"{m.label}: a {type(m.module).__name__} counts positions by its cache and takes no position_ids, so the "
            "rows of a batch need the same number of virtual tokens here: call it once for each number (rows without "
            "an adapter have none)"
        )
    by_mask = getattr(m.config, "model_type", "") in BY_MASK
    if virtual.still and (by_mask or "position_ids" not in m.arguments):
        raise ValueError(
            f"{m.label}: a {type(m.module).__name__} counts positions by itself, those of a prefix among them, and a "
            "prefix with shifts=False asks for positions without: give shifts=True"
        )
    if "position_ids" not in m.arguments:
        return
    positions = given.get("position_ids")
    if positions is not None and positions.dim() != 2:
        raise ValueError(
            f"{m.label}: virtual tokens shift positions [rows, tokens], and these have shape {list(positions.shape)}, "
            "as of a model whose tokens have several each: adapt its modules instead (pf.Bottleneck, pf.LoRA)"
        )
    if positions is None and ((not holes and not virtual.still) or by_mask):
        return  # the model counts by itself
    if positions is None:
        positions = _own_positions(m, given.get("input_ids"), tokens, device) + max(0, before - virtual.size)
    shift: Any = virtual.shift.to(device) if isinstance(virtual.shift, Tensor) else virtual.shift
    positions = (positions + shift).expand(rows, tokens)
    if first:
        own = torch.arange(virtual.size, device=device)[None]
        if holes:
            own = (own - (virtual.size - shift)).clamp(min=0)
        positions = virtual.joined(own, positions)
    given["position_ids"] = positions
