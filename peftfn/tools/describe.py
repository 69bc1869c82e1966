"""List what a model offers to adapt: every site with its kind, shape, dtype and ties, as data and as a table."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, overload

import torch
from torch import nn

from peftfn.model.model import Model
from peftfn.model.names import matches, near
from peftfn.tools.table import table


@dataclass(frozen=True)
class Described:
    """One site: a parameter that a rule of `adapt` can take.

    Args:
        name: the parameter's dotted name.
        kind: linear, linear_t (transformers' Conv1D), embedding, conv, conv_t, stack and stack_t (experts), or other
            (norms, biases).
        shape, dtype, device: the parameter's.
        aliases: other names of the same slot (a submodule that the model has twice): they are adapted together.
        tied: names of other slots that hold the same tensor. Each is adapted alone; the others do not change.
        quantised: whether its values are packed in another form.

    Example:
        site = pf.describe(torch.nn.Sequential(torch.nn.Linear(8, 4)))[0]
        assert (site.name, site.kind, site.shape) == ("0.weight", "linear", (4, 8))
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    aliases: tuple[str, ...] = ()
    tied: tuple[str, ...] = ()
    quantised: bool = False

    @property
    def numel(self) -> int:
        return prod(self.shape)


class Description(Sequence[Described]):
    """The sites of a model, in the model's order. It prints as a table, with one line for layers that are alike.

    Example:
        sites = pf.describe(torch.nn.Sequential(torch.nn.Linear(8, 4)))
        assert len(sites) == 2 and sites.numel == 8 * 4 + 4
    """

    def __init__(self, found: Sequence[Described], hint: str = ""):
        self._sites = tuple(found)
        self._hint = hint  # what to print where there is no site

    @overload
    def __getitem__(self, index: int) -> Described: ...
    @overload
    def __getitem__(self, index: slice) -> "Description": ...
    def __getitem__(self, index: int | slice) -> "Described | Description":
        return Description(self._sites[index]) if isinstance(index, slice) else self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Description) and self._sites == other._sites

    def __hash__(self) -> int:
        return hash(self._sites)

    @property
    def numel(self) -> int:
        """Number of parameters; tied tensors count once."""
        known = {s.name for s in self}
        again = {t for s in self for t in s.tied if t in known and t > s.name}
        return sum(s.numel for s in self if s.name not in again)

    def __str__(self) -> str:
        if not self._sites:
            return f"0 sites{self._hint}"
        rows = [("site", "kind", "shape", "dtype", "tied with")]
        for name, s in self._lines():
            kind = f"{s.kind}, quantised" if s.quantised else s.kind
            alike = f" (= {', '.join(s.aliases)})" if s.aliases else ""
            dtype = str(s.dtype).removeprefix("torch.")
            rows.append((name + alike, kind, "×".join(map(str, s.shape)), dtype, ", ".join(s.tied)))
        return f"{table(rows)}\n{len(self):,} sites, {self.numel:,} parameters"

    __repr__ = __str__

    def _lines(self) -> Iterator[tuple[str, Described]]:
        """(name, site), with `layers.[0-31].….weight` for sites that differ in one number of their names alone."""
        groups: dict[tuple[Any, ...], list[Described]] = {}
        for s in self:
            general = re.sub(r"(?<![^.])\d+(?![^.])", "#", s.name, count=1)
            alone = s.name if s.tied or s.aliases else ""
            groups.setdefault((general, alone, s.kind, s.shape, s.dtype, s.device, s.quantised), []).append(s)
        for (general, *_), group in groups.items():
            if len(group) == 1:
                yield group[0].name, group[0]
                continue
            numbers = [int(re.findall(r"(?<![^.])\d+(?![^.])", s.name)[0]) for s in group]
            yield general.replace("#", f"[{_ranges(numbers)}]", 1), group[0]


def describe(model: nn.Module, pattern: str | None = None) -> Description:
    """List the sites of a model, or those that a pattern matches.

    `print(describe(model))` shows what you can adapt. Use `pattern` to try a rule without adapting anything: where it
    matches nothing, the names most like it are printed.

    Args:
        model: any module.
        pattern: a name pattern, as in the rules of `adapt`; None lists every site.

    Returns:
        A sequence of `Described`, which prints as a table.

    Raises:
        ValueError: the pattern is not a valid regular expression, or a parameter is not initialised (a lazy module).

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
        print(pf.describe(model))
        assert [site.name for site in pf.describe(model, "bias")] == ["0.bias", "1.bias"]
    """
    known, found = Model.of(model), []
    for s in known.sites.values():
        try:
            wanted = pattern is None or any(matches(pattern, n) for n in (s.name, *s.aliases))
        except re.error as e:
            raise ValueError(f"describe: {pattern!r} is not a valid regular expression: {e}") from e
        if wanted:
            w = known.weights[s.name]
            more = (s.aliases, s.tied, s.quantised)
            found.append(Described(s.name, s.kind, tuple(s.shape), w.dtype, w.device, *more))
    names = [n for s in known.sites.values() for n in (s.name, *s.aliases)]
    hint = f": {pattern!r} matches no parameter{near(pattern, names)}" if pattern is not None and names else ""
    return Description(found, hint)


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2,5"."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1][1:] = [n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, p)) for p in parts)
