"""List what a model offers to adapt: every site with its kind, shape, dtype and ties, as data and as a table."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, overload

import torch
from torch import nn

from peftfn.model.model import Model
from peftfn.model.names import ends, matches, near
from peftfn.tools.table import table


@dataclass(frozen=True)
class Described:
    """One site: a parameter, or a module, that a rule of `adapt` can take.

    Args:
        name: the dotted name of the parameter or module.
        kind: linear, linear_t (transformers' Conv1D), embedding, conv, conv_t, stack and stack_t (experts), or other
            (norms, biases); module; tokens (a backbone).
        shape, dtype, device: the parameter's. Of a module, the shape is the size of the hidden states that come out, as
            far as its weights tell it (0: they do not), and the others are of its first parameter.
        aliases: other names of the same slot (a submodule that the model has twice): they are adapted together.
        tied: names of other slots that hold the same tensor. Each is adapted alone; the others do not change.
        quantised: whether its values are packed in another form.
        type: the class of a module.

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
    type: str = ""

    @property
    def numel(self) -> int:
        """Of a parameter, its size; a module is none."""
        return 0 if self.type else prod(self.shape)


class Description(Sequence[Described]):
    """Sites of a model, in the model's order. It prints as a table, with one line for layers that are alike.

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
        modules = any(s.type for s in self)
        head = ("module", "class", "width", "dtype") if modules else ("site", "kind", "shape", "dtype", "tied with")
        rows: list[tuple[str, ...]] = [head]
        for name, s in self._lines():
            kind = s.type or (f"{s.kind}, quantised" if s.quantised else s.kind)
            alike = f" (= {', '.join(s.aliases)})" if s.aliases else ""
            dtype, shape = str(s.dtype).removeprefix("torch."), "×".join(map(str, s.shape))
            line = (name + alike or "(the model itself)", kind, shape, dtype, ", ".join(s.tied))
            rows.append(line[: len(rows[0])])
        return f"{table(rows)}\n{len(self):,} " + ("modules" if modules else f"sites, {self.numel:,} parameters")

    __repr__ = __str__

    def _lines(self) -> Iterator[tuple[str, Described]]:
        """(name, site), with `layers.[0-31].….weight` for sites that differ in one number of their names alone."""
        groups: dict[tuple[Any, ...], list[Described]] = {}
        for s in self:
            general = re.sub(r"(?<![^.])\d+(?![^.])", "#", s.name, count=1)
            alone = s.name if s.tied or s.aliases else ""
            groups.setdefault((general, alone, s.kind, s.shape, s.dtype, s.device, s.quantised, s.type), []).append(s)
        for (general, *_), group in groups.items():
            if len(group) == 1:
                yield group[0].name, group[0]
                continue
            numbers = [int(re.findall(r"(?<![^.])\d+(?![^.])", s.name)[0]) for s in group]
            yield general.replace("#", f"[{_ranges(numbers)}]", 1), group[0]


def describe(
    model: nn.Module,
    pattern: str | None = None,
    *,
    what: Literal["parameters", "modules", "backbones"] = "parameters",
) -> Description:
    """List the sites of a model, or those that a pattern matches: its parameters, its modules or its backbones.

    `print(describe(model))` shows what you can adapt. Use `pattern` to try a rule without adapting anything: where it
    matches nothing, the names most like it are printed.

    Args:
        model: any module.
        pattern: a name pattern, as in the rules of `adapt`; None lists every site.
        what: what methods adapt: "parameters" (methods that change a weight), "modules" (methods around a module's
            forward) or "backbones" (methods on a model's inputs). Patterns of the last two are matched at the end.

    Returns:
        A sequence of `Described`, which prints as a table.

    Raises:
        ValueError: the pattern is not a valid regular expression, a parameter is not initialised (a lazy module), or
            `what` is another word.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
        print(pf.describe(model))
        assert [site.name for site in pf.describe(model, "bias")] == ["0.bias", "1.bias"]
        print(pf.describe(model, what="modules"))
    """
    known, found = Model.of(model), []
    listings = {"parameters": "sites", "modules": "places", "backbones": "backbones"}
    if what not in listings:
        raise ValueError(f"describe: what is {what!r}; choose one of {list(listings)}")
    sites, fits = getattr(known, listings[what]), matches if what == "parameters" else ends
    seen = known.weights | known.at(s for s in sites.values() if what != "parameters")
    for s in sites.values():
        try:
            wanted = pattern is None or any(fits(pattern, n) for n in (s.name, *s.aliases))
        except re.error as e:
            raise ValueError(f"describe: {pattern!r} is not a valid regular expression: {e}") from e
        if wanted:
            w = seen[s.name]
            cls = type(w.module).__name__ if what != "parameters" else ""
            more = (s.aliases, s.tied, s.quantised, cls)
            found.append(Described(s.name, s.kind, tuple(s.shape), w.dtype, w.device, *more))
    names = [n for s in sites.values() for n in (s.name, *s.aliases)]
    hint = f": {pattern!r} matches no {what[:-1]}{near(pattern, names)}" if pattern is not None and names else ""
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
