"""Gates: a weighted sum of adapters, y = base + Σ_k g_k ⊙ (f_k(x) − base), at every site.

f_k(x) is the output of the site with adapter k, so the sum is one of outputs, whatever the method: a gate of 1 is the
adapter and 0 the base; between them the output is on the line from one to the other. Where f_k is linear in the change
of the weight that is the change scaled by g_k; at a norm, say, it is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftfn.slots.mixed import MixedWeight
from peftfn.slots.part import Part
from peftfn.slots.route import Cut, Route, Rows, Run, check_rows, picked, storages, tensors
from peftfn.tensors.precision import operand_dtype
from peftfn.tensors.transform import under_transform


@dataclass(frozen=True, eq=False)
class Gates(Route):
    """Adapter k has weight g[…, k]: g is [K], [rows, K], or [rows, tokens, K]."""

    g: Tensor
    stepwise: bool = False  # later steps of `generate` have other numbers of tokens
    active: tuple[Tensor | None, ...] = ()  # of each adapter, the rows with a gate that is not 0; None: all

    @classmethod
    def of(cls, gates: Any, count: int, inputs: Any = (), copies: int = 1, stepwise: bool = False) -> "Gates | Rows":
        """The route of these gates; Rows where each row has one adapter with gate 1, or none.

        Raises ValueError for gates that fit neither the stack nor the inputs.
        """
        g = gates if isinstance(gates, Tensor) else torch.tensor(gates)
        if not 1 <= g.dim() <= 3 or not g.is_floating_point():
            raise ValueError(
                f"gated: gates are a {g.dtype} tensor of shape {list(g.shape)}; give floating-point numbers, "
                "[adapters], [rows, adapters] or [rows, tokens, adapters]"
            )
        if g.shape[-1] != count:
            raise ValueError(
                f"gated: gates of shape {list(g.shape)} are for {g.shape[-1]} adapters, and the stack has {count}: "
                "the last dimension counts adapters"
            )
        free = torch.compiler.is_compiling() or under_transform() or g.requires_grad
        if torch.compiler.is_compiling():
            return cls(count, g, stepwise, (None,) * count, copies=copies)
        given = tensors(inputs)
        if g.dim() > 1:
            check_rows("gated", f"gates have shape {list(g.shape)}, for {g.shape[0]} rows", g.shape[0], given)
        if g.dim() == 3 and given and not any(t.dim() > 1 and t.shape[:2] == g.shape[:2] for t in given):
            shapes = ", ".join(str(list(t.shape)) for t in given[:4])
            raise ValueError(f"gated: gates have shape {list(g.shape)}, and no input has {g.shape[1]} tokens: {shapes}")
        if g.dim() == 3 and stepwise:
            check_steps(inputs)
        own = storages(given)
        if free:
            return cls(count, g, stepwise, (None,) * count, inputs=own, copies=copies)
        flat = g.detach().cpu()
        one = flat[:, 0] if flat.dim() == 3 and g.shape[1] and bool((flat == flat[:, :1]).all()) else flat
        if one.dim() == 2 and bool(((one == 0) | (one == 1)).all()) and bool((one.sum(1) <= 1).all()):
            return Rows.of(torch.where(one.sum(1) > 0, one.argmax(1), -1), count, inputs, copies)
        used = flat != 0
        if used.dim() == 1:
            active = tuple(None if u else torch.empty(0, dtype=torch.long) for u in used.tolist())
        else:
            used = used.any(1) if used.dim() == 3 else used
            active = tuple(None if bool(u.all()) else u.nonzero()[:, 0].to(g.device) for u in used.unbind(1))
        return cls(count, g, stepwise, active, inputs=own, copies=copies)

    @property
    def size(self) -> int | None:
        return None if self.g.dim() == 1 else self.g.shape[0]

    @cached_property
    def repeated(self) -> "Gates":
        n = self.copies
        active = tuple(
            None if rows is None else (rows[:, None] * n + torch.arange(n, device=rows.device)).flatten()
            for rows in self.active
        )
        return replace(self, g=self.g.repeat_interleave(n, 0), active=active, copies=1)

    def over(self, y: Tensor, what: str) -> Tensor:
        """The gates of an output y [rows, …]: [rows, 1 …, K], or [rows, tokens, 1 …, K], with as many dimensions."""
        g = self.g.to(y)
        if g.dim() == 1:
            return g.view(*[1] * (y.dim() - 1), -1)
        if g.dim() == 2:
            return g.view(g.shape[0], *[1] * (y.dim() - 2), -1)
        tokens = y.shape[1] if y.dim() > 2 else -1
        if self.stepwise and tokens == 1:
            g = g[:, -1:]
        elif self.stepwise and tokens > g.shape[1]:
            g = torch.cat([g, g[:, -1:].expand(-1, tokens - g.shape[1], -1)], 1)
        if tokens != g.shape[1]:
            raise ValueError(
                f"{what}: its output has shape {list(y.shape)}, and the gates are for {g.shape[1]} tokens in the "
                "second dimension. Give gates [rows, adapters], or leave this site out of the rules."
            )
        return g.view(*g.shape[:2], *[1] * (y.dim() - 3), -1)

    def each(self, run: Run) -> Tensor:
        base = run(-1, lambda x: x)
        return self._sum(base, run, range(self.count), "a function of the weight")

    def _sum(self, base: Tensor, run: Run, ks: Sequence[int], what: str) -> Tensor:
        """base + Σ_k g_k ⊙ (run(k) − base), each adapter on the rows where its gate is not 0."""
        y, g = base, None
        for k in ks:
            rows = self.active[k]
            if rows is not None and not len(rows):
                continue
            cut = _cut(rows)
            g = self.over(base, what) if g is None else g
            mine = g[..., k : k + 1]
            change = (mine if rows is None else cut(mine)) * (run(k, cut) - cut(base))
            y = y + change if rows is None else y.index_add(0, rows.to(y.device), change.to(y.dtype))
        return y.to(base.dtype)

    def product(self, weight: MixedWeight, x: Tensor, kind: str, adapted: Any, base: Cut) -> Tensor:
        plain = y = base(x)
        for part in weight.parts:
            if part.is_low_rank(kind) and kind == "linear":
                y = y + self._low_rank(part, x, plain, weight.name)
            else:
                ks = range(part.start, part.start + part.size)
                y = y + self._sum(plain, part.runs(x, adapted), ks, weight.name) - plain
        return y

    def _low_rank(self, part: Part, x: Tensor, y: Tensor, what: str) -> Tensor:
        """Σ_k g_k (diag(c_k) (y + s·U_k D_k x) − y): all D one product, gated, then all U one product."""
        low, dtype = part.low, operand_dtype(x)
        assert low is not None
        g = self.over(y, what)[..., part.start : part.start + part.size].to(dtype)
        n, r = part.size, low.down.shape[-2]
        down = low.down.to(dtype).expand(n, r, -1)
        up = low.up.to(dtype).expand(n, -1, r)
        c = None if low.gain is None else low.gain.to(dtype).expand(n, -1)
        s = F.linear(x, down.reshape(n * r, -1)).unflatten(-1, (n, r))
        s = (s * (low.scale * g)[..., None]).flatten(-2)
        up = up if c is None else c[..., None] * up
        change = F.linear(s, up.transpose(0, 1).reshape(-1, n * r))
        return change if c is None else change + (g @ (c - 1)) * y

    def bias(self, values: Tensor, base: Tensor, y: Tensor) -> Tensor:
        change = self.over(y, "a bias").to(values.dtype) @ (values - base)
        return y + base.to(y.dtype) + change.to(y.dtype)


def check_steps(inputs: Any) -> None:
    """Raise for a `generate` whose later steps are of several tokens: they could be taken for the prompt's."""
    _, kwargs = inputs
    config = kwargs.get("generation_config")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "prefill_chunk_size"):
        if kwargs.get(name) or getattr(config, name, None):
            raise ValueError(
                f"gated: {name} makes steps of several tokens, and which gates of [rows, tokens, adapters] are theirs "
                "is not known: leave it out, or give gates [rows, adapters]"
            )


def _cut(rows: Tensor | None) -> Cut:
    return (lambda x: x) if rows is None else (lambda x: picked(x, rows.to(x.device)))
