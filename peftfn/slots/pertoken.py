"""An index of tokens: each token of a batch uses an adapter of its own, or the base."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from peftfn.slots.gates import Gates, Index, Shaped
from peftfn.tensors.arguments import storages, tensors


@dataclass(frozen=True, eq=False)
class PerToken(Shaped):
    """Token j of row i uses adapter index[i, j]; −1 is the base."""

    flat: Index  # of all tokens, one row after the other
    windows: dict[Any, Index] = field(default_factory=dict, kw_only=True)  # of passes that have some of the tokens

    @classmethod
    def of(cls, index: Any, count: int, inputs: Any = (), copies: int = 1, stepwise: bool = False) -> "PerToken":
        rows, tokens = index.shape
        given = tensors(inputs)
        if given and not any(t.shape[:2] == (rows, tokens) for t in given):
            shapes = ", ".join(str(list(t.shape)) for t in given[:4])
            raise ValueError(
                f"mixed: index has shape {[rows, tokens]}, and none of the inputs has as many rows and tokens: "
                f"{shapes}. Give one integer a token, or one a row"
            )
        if copies > 1:
            raise ValueError(
                f"mixed: generate makes {copies} sequences of each row, and index {[rows, tokens]} is one of tokens: "
                "give one integer a row"
            )
        flat = Index.of(index.flatten(), count)
        return cls(count, flat, shape=(rows, tokens), inputs=storages(given), by_token=True)

    @property
    def only(self) -> int | None:
        return self.flat.only

    def at(self, rows: int) -> Gates | None:
        """None: a first dimension of rows alone does not say whose tokens these are."""
        return None

    def uses(self, start: int, size: int) -> bool:
        return self.flat.uses(start, size)

    def of_positions(self, owner: Tensor, tokens: int | None) -> Index:
        return self.flat.of_positions(owner)

    def flattened(self, x: Tensor) -> Index | None:
        """The index of x [rows, tokens, …], its first two dimensions seen as one; None if it has others. In a pass of
        `generate` that has some of the tokens, it is theirs; tokens after those of the index use what the last does."""
        n, m = self.shape
        if x.dim() < 2 or x.shape[0] != n:
            return None
        at = None if self.steps is None else self.steps.positions(x.shape[1], m)
        if at is None:
            return self.flat if x.shape[1] == m else None
        key = x.shape[1], at.tolist()[0]
        if key not in self.windows:
            self.windows[key] = self.flat.of_positions((torch.arange(n)[:, None] * m + at).flatten())
        return self.windows[key]

    def mapped(self, f: Callable[[Tensor], Tensor]) -> "PerToken":
        flat = self.flat.mapped(f)
        return self if flat is self.flat else replace(self, flat=flat, windows={})


def of(index: Any, count: int, inputs: Any = (), copies: int = 1, stepwise: bool = False) -> Gates:
    """The gates that an index [rows] or [rows, tokens] means. ValueError where it fits neither adapters nor inputs."""
    if isinstance(index, list | tuple) and index and isinstance(index[0], list | tuple):
        if len({len(row) for row in index}) > 1 or not all(isinstance(k, int) for row in index for k in row):
            raise ValueError("mixed: index is a list of rows; give each as many integers as the input has tokens")
        index = torch.tensor(index)
    if isinstance(index, Tensor) and index.dim() == 2 and not index.is_floating_point() and index.dtype != torch.bool:
        return PerToken.of(index, count, inputs, copies, stepwise)
    return Index.of(index, count, inputs, copies, stepwise)
