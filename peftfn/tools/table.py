"""A table as plain text, and a sequence that prints as one."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Self, TypeVar, overload

S = TypeVar("S")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length, the first of them the heading, as lines of aligned columns."""
    width = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, width, strict=True)).rstrip() for row in rows)


class Report(Sequence[S]):
    """A sequence of dataclasses, one for each site, that prints as a table."""

    def __init__(self, sites: Sequence[S]):
        self._sites = tuple(sites)

    @overload
    def __getitem__(self, index: int) -> S: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> S | Self:
        return type(self)(self._sites[index]) if isinstance(index, slice) else self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __str__(self) -> str:
        return table(self._rows())

    __repr__ = __str__

    def _rows(self) -> list[tuple[str, ...]]:
        """The heading of the table, and a row for each site."""
        raise NotImplementedError

    def json(self) -> list[dict[str, Any]]:
        """Return plain values, for `json.dumps`.

        Returns:
            The fields, as dicts and lists of numbers and strings.
        """
        return [asdict(s) for s in self]  # type: ignore[call-overload]
