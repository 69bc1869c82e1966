"""Gates: which adapters act on which rows, and how much. Plain data; batch.py computes with them.

    y = base + Σ_k g_k ⊙ (f_k(x) − base),    f_k(x): the output of the site with adapter k

An `Index` has one adapter with g = 1 for each row, or none; `Weights` have any. The sum is one of outputs, whatever the
method: a gate of 1 is the adapter and 0 the base; between them the output is on the line from one to the other. Where
f_k is linear in the change of the weight, that is the change scaled by g_k; at a norm, say, it is not.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor, nn

from peftfn.model.names import matches, near
from peftfn.tensors.arguments import hidden, storages, tensors
from peftfn.tensors.sequence import Steps
from peftfn.tensors.transform import under_transform


@dataclass(frozen=True, eq=False)
class Gates:
    """Which adapters act on which rows, and how much. Adapters are numbered through all parts of a call."""

    count: int  # adapters
    inputs: frozenset[int] = field(default=frozenset(), kw_only=True)  # storages of the call's own indices
    fixed: Mapping[int, Any] = field(default_factory=dict, kw_only=True)  # the model's tensors, which have no rows
    copies: int = field(default=1, kw_only=True)  # how often `generate` repeats each row: beams, sampled sequences
    common: frozenset[str] | None = field(default=None, kw_only=True)  # sites whose input has no rows; None: not said
    call: Any = field(default=None, kw_only=True)  # the `Followed` of a call of a net that has routed modules
    steps: "Steps | None" = field(default=None, kw_only=True)  # of a method that runs several forward passes
    tokens = None  # tokens of a row, where each has gates of its own
    by_token: bool = field(default=False, kw_only=True)  # the caller said for each token which adapters act on it

    @property
    def sealed(self) -> bool:
        """Whether all its tensors are its own: a function may have others, which a rematerialisation does not see."""
        return True

    def bound(self, common: Sequence[str] | None, sites: Iterable[str]) -> Self:
        """These gates for a call's sites; `common`'s patterns find some of them. ValueError for one that finds none."""
        if common is None:
            return self
        names = list(sites)
        patterns = [common] if isinstance(common, str) else common
        for pattern in patterns:
            if not any(matches(pattern, n) for n in names):
                raise ValueError(f"common: {pattern!r} matches none of the {len(names)} sites{near(pattern, names)}")
        return replace(self, common=frozenset(n for n in names if any(matches(p, n) for p in patterns)))

    def owned(self, t: Tensor) -> bool:
        """Whether t is the model's own: a parameter or a buffer, or a view of one, which has no rows."""
        if not self.fixed:  # also while compiling, where an id would become a guard on this very tensor
            return False
        return id(t) in self.fixed or (t._base is not None and id(t._base) in self.fixed)

    @classmethod
    def of(cls, gates: Any, count: int, inputs: Any = (), copies: int = 1, stepwise: bool = False) -> "Gates":
        """The gates that a caller means. ValueError where it fits neither the adapters nor the inputs."""
        raise NotImplementedError

    @property
    def only(self) -> int | None:
        """The adapter that all rows use, with weight 1; None if there are several, or the base, or nobody knows."""
        return None

    @property
    def size(self) -> int | None:
        """Rows of the batch; None where all rows are alike."""
        raise NotImplementedError

    def of_positions(self, owner: Tensor, tokens: int | None) -> "Gates":
        """The gates of positions that belong to the rows `owner` [n] of these; −1: to none. tokens: owner numbers the
        tokens of all rows, so many in each."""
        raise NotImplementedError

    def at(self, rows: int) -> "Gates | None":
        """The gates of a tensor with so many rows; None if it is none of the batch's."""
        if self.size is None or rows == self.size:
            return self
        return self.repeated if self.copies > 1 and rows == self.copies * self.size else None

    @cached_property
    def repeated(self) -> "Gates":
        """The gates of a batch in which each row stands `copies` times, next to itself."""
        raise NotImplementedError

    def passed_to(self, gates: "Gates") -> "Gates":
        """`gates` with what these know of the call."""
        return replace(gates, fixed=self.fixed, common=self.common, call=self.call, steps=self.steps)

    def site(self, name: str) -> "Gates":
        """The gates at one site."""
        return self

    def here(self, x: Tensor | None, what: str) -> "Gates":
        """The gates of a site whose input is x; None: what has no input, such as a bias. what: the site, for errors."""
        return self

    def during(self, root: nn.Module) -> AbstractContextManager[None]:
        """What surrounds the call of a model's skeleton."""
        return nullcontext() if self.steps is None else self.steps.during(root)

    def uses(self, start: int, size: int) -> bool:
        """Whether any row may use one of these adapters."""
        return True

    def mapped(self, f: Callable[[Tensor], Tensor]) -> "Gates":
        """The same with f of its tensor."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Shaped(Gates):
    """Gates that know how many tokens the rows have."""

    shape: tuple[int, int] = field(kw_only=True)  # rows, tokens

    @property
    def size(self) -> int:
        return self.shape[0]

    @property
    def tokens(self) -> int:  # type: ignore[override]  # a plain None in gates of rows
        return self.shape[1]


class OnHost(Sequence[int]):
    """The values of an index, for those who look at one: on a GPU, the first look waits for the device."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    @cached_property
    def values(self) -> list[int]:
        return self.tensor.tolist()  # type: ignore[no-any-return]

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __getitem__(self, i: Any) -> Any:
        return self.values[i]

    def __iter__(self) -> Iterator[int]:
        return iter(self.values)


@dataclass(frozen=True, eq=False)
class Index(Gates):
    """Row i uses adapter index[i]; −1 is the base."""

    index: Tensor  # [rows]
    known: Sequence[int] | None  # the index on the host; None while compiling
    held: dict[bool, dict[Any, Any]] = field(default_factory=dict, kw_only=True)  # inference mode → what it made
    shared: dict[Any, Any] = field(default_factory=dict, kw_only=True)  # what depends on its adapters alone
    positions: bool = field(default=False, kw_only=True)  # of positions that were moved, not of rows

    @classmethod
    def of(cls, index: Any, count: int, inputs: Any = (), copies: int = 1, stepwise: bool = False) -> "Index":
        """Raise ValueError for an index that names no adapter, or has not one entry for each row of the inputs."""
        if isinstance(index, list | tuple) and (names := [k for k in index if isinstance(k, str)]):
            raise TypeError(
                f"mixed: index has the name {names[0]!r}; give one integer a row, the adapter's place in the stack. "
                "For calls by name, see peftfn.bank"
            )
        t = index if isinstance(index, Tensor) else torch.tensor(index)
        t = t if isinstance(index, Tensor) or t.numel() else t.long()  # [] makes a tensor of floats
        if t.dim() != 1 or t.is_floating_point() or t.dtype == torch.bool:
            raise ValueError(
                f"mixed: index is a {t.dtype} tensor of shape {list(t.shape)}; give one integer a row, [rows], or "
                "a token, [rows, tokens]"
            )
        t = t.long()  # uint8 would select as a mask does
        if hidden(t):  # taking from a table raises for an adapter there is none of
            table = torch.arange(-1, count, device=t.device)
            return cls(count, table[torch.where(t < -1, count, t) + 1], None, copies=copies)
        known = t.tolist()
        for row, k in enumerate(known):
            if not -1 <= k < count:
                raise ValueError(f"mixed: row {row} asks for adapter {k}; the stack has {count} (−1 is the base)")
        given = tensors(inputs)
        check_rows("mixed", f"index has {len(known)} entries", len(known), given)
        return cls(count, t, known, inputs=storages(given), copies=copies)

    @property
    def size(self) -> int:
        return self.index.shape[0]

    @property
    def only(self) -> int | None:
        """The adapter that all rows use; None if there are several, or the base among them, or nobody knows."""
        known = self.known
        return known[0] if known and known[0] >= 0 and known.count(known[0]) == len(known) else None

    def of_positions(self, owner: Tensor, tokens: int | None = None) -> "Index":
        if "extended" not in self.kept:
            self.kept["extended"] = extended(self.index, -1)
        index = self.kept["extended"][_rows(owner, tokens).to(self.index.device)]
        known = None if self.known is None or hidden(index) else OnHost(index)
        return replace(self, index=index, known=known, copies=1, held={}, positions=True)

    @cached_property
    def repeated(self) -> "Index":
        known = None if self.known is None else [k for k in self.known for _ in range(self.copies)]
        index = self.index.repeat_interleave(self.copies)
        return replace(self, index=index, known=known, copies=1, held={})

    def uses(self, start: int, size: int) -> bool:
        return self.known is None or any(start <= k < start + size for k in self.known)

    def mapped(self, f: Callable[[Tensor], Tensor]) -> "Index":
        index = f(self.index)
        return self if index is self.index else replace(self, index=index, held={})

    @property
    def kept(self) -> dict[Any, Any]:
        """What is made once for all sites. Indices that are made in inference mode can be in no graph later."""
        return self.held.setdefault(torch.is_inference_mode_enabled(), {})


@dataclass(frozen=True, eq=False)
class Weights(Gates):
    """Adapter k has weight g[…, k]: g is [K], [rows, K], or [rows, tokens, K]."""

    g: Tensor
    active: tuple[Tensor | None, ...] = ()  # of each adapter, the rows with a gate that is not 0; None: all

    @classmethod
    def of(cls, gates: Any, count: int, inputs: Any = (), copies: int = 1, stepwise: bool = False) -> Gates:
        """These gates; an Index where each row has one adapter with gate 1, or none.

        Raises ValueError for gates that fit neither the stack nor the inputs, and TypeError for gates that are not
        numbers.
        """
        try:
            g = gates if isinstance(gates, Tensor) else torch.tensor(gates)
        except (TypeError, ValueError, RuntimeError) as e:
            raise TypeError(
                f"gated: gates are {gates!r}, which torch cannot make a tensor of ({e}); give a tensor, "
                "{pattern: tensor}, a function of (site, x), or PerForward(f)"
            ) from e
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
        free = hidden(g) or under_transform() or g.requires_grad
        if torch.compiler.is_compiling():
            return cls(count, g, (None,) * count, copies=copies, by_token=g.dim() == 3)
        given = tensors(inputs)
        if g.dim() > 1:
            check_rows("gated", f"gates have shape {list(g.shape)}, for {g.shape[0]} rows", g.shape[0], given)
        if g.dim() == 3 and given and not any(t.dim() > 1 and t.shape[:2] == g.shape[:2] for t in given):
            shapes = ", ".join(str(list(t.shape)) for t in given[:4])
            raise ValueError(f"gated: gates have shape {list(g.shape)}, and no input has {g.shape[1]} tokens: {shapes}")
        own = storages(given)
        if free:
            return cls(count, g, (None,) * count, inputs=own, copies=copies, by_token=g.dim() == 3)
        flat = g.detach().cpu()
        one = flat[:, 0] if flat.dim() == 3 and g.shape[1] and bool((flat == flat[:, :1]).all()) else flat
        if one.dim() == 2 and bool(((one == 0) | (one == 1)).all()) and bool((one.sum(1) <= 1).all()):
            index = Index.of(torch.where(one.sum(1) > 0, one.argmax(1), -1), count, inputs, copies)
            return replace(index, by_token=g.dim() == 3)
        used = flat != 0
        if used.dim() == 1:
            active = tuple(None if u else torch.empty(0, dtype=torch.long) for u in used.tolist())
        else:
            used = used.any(1) if used.dim() == 3 else used
            active = tuple(None if bool(u.all()) else u.nonzero()[:, 0].to(g.device) for u in used.unbind(1))
        return cls(count, g, active, inputs=own, copies=copies, by_token=g.dim() == 3)

    @property
    def size(self) -> int | None:
        return None if self.g.dim() == 1 else self.g.shape[0]

    @property
    def tokens(self) -> int | None:  # type: ignore[override]
        return self.g.shape[1] if self.g.dim() == 3 else None

    def of_positions(self, owner: Tensor, tokens: int | None) -> "Weights":
        if self.g.dim() == 1:
            return self
        g, owner = (self.g.flatten(0, 1), owner) if self.g.dim() == 3 else (self.g, _rows(owner, tokens))
        g = extended(g, 0)[owner.to(g.device)]
        return replace(self, g=g, active=(None,) * self.count, copies=1)

    @cached_property
    def repeated(self) -> "Weights":
        n = self.copies
        active = tuple(
            None if rows is None else (rows[:, None] * n + torch.arange(n, device=rows.device)).flatten()
            for rows in self.active
        )
        return replace(self, g=self.g.repeat_interleave(n, 0), active=active, copies=1)

    def mapped(self, f: Callable[[Tensor], Tensor]) -> "Weights":
        return replace(self, g=f(self.g))

    def over(self, y: Tensor, what: str) -> Tensor:
        """The gates of an output y [rows, …]: [rows, 1 …, K], or [rows, tokens, 1 …, K], with as many dimensions."""
        g = self.g.to(y)
        if g.dim() == 1:
            return g.view(*[1] * (y.dim() - 1), g.shape[-1])
        if g.dim() == 2:
            return g.view(g.shape[0], *[1] * (y.dim() - 2), g.shape[-1])
        tokens = y.shape[1] if y.dim() > 2 else -1
        if self.steps is not None and (at := self.steps.positions(tokens, g.shape[1], g.device)) is not None:
            g = g.index_select(1, at)
        if tokens != g.shape[1]:
            raise ValueError(
                f"{what}: its output has shape {list(y.shape)}, and the gates are for {g.shape[1]} tokens in the "
                "second dimension. Give gates [rows, adapters], or leave this site out of the rules."
            )
        return g.view(*g.shape[:2], *[1] * (y.dim() - 3), g.shape[-1])


def _rows(owner: Tensor, tokens: int | None) -> Tensor:
    return owner if tokens is None else owner.div(tokens, rounding_mode="floor")


def extended(t: Tensor, last: int) -> Tensor:
    """t, and behind it what index −1 then is."""
    return torch.cat([t, t.new_full((1, *t.shape[1:]), last)])


def check_rows(what: str, have: str, rows: int, given: list[Tensor]) -> None:
    """Raise unless one of the call's tensors has so many rows (or columns, for models with the batch second)."""
    if given and not any(rows in t.shape[:2] for t in given):
        shapes = ", ".join(str(list(t.shape)) for t in given[:4])
        raise ValueError(f"{what}: {have}, and none of the inputs has as many rows: {shapes}. Give one entry a row.")
