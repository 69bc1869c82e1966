"""What stands in the call slot of a module: what its adapters do around its forward.

A module's forward looks into its call slot first. There is the module's `Place`, which runs the forward as it is, or a
`Call`: functions around the forward, one around the other, in a fixed order of families.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from peftfn.core.method import Method
from peftfn.core.modules import Along, ModuleMethod, Prefix, Tokens
from peftfn.core.plan import Entry
from peftfn.model.place import Place
from peftfn.slots import along, modules, prefix, tokens
from peftfn.slots.gates import Gates
from peftfn.slots.part import Stack
from peftfn.slots.slot import OUTLIVED
from peftfn.tensors.transform import backward_task, moment

Step = Callable[[Place, Callable[..., Any], Any, Any], Any]
"""(place, forward, args, kwargs) ↦ the output: what happens around a forward"""
Run = Callable[[Sequence[Any], Gates | None, Place, Callable[..., Any], Any, Any], Any]
"""(adapters, gates, place, forward, args, kwargs) ↦ the output. The adapters are `Stack`s of one family; without gates,
one `Alone`."""

RUNS: dict[type[Method], tuple[int, Run]] = {
    Tokens: (5, tokens.run),
    Prefix: (10, prefix.run),  # inside of tokens, which look whether the cache is empty
    Along: (15, along.run),
    ModuleMethod: (20, modules.run),
}
"""Family → (its place in the order of what happens, the lowest outermost; what it does around a forward)."""


class Alone:
    """One adapter of one method at one site: what a `Stack` is where all rows use the same."""

    __slots__ = ("entry", "method", "p", "seen")
    start, size, axes = 0, 1, None

    def __init__(self, entry: Entry, method: Any, p: dict[str, Any]):
        self.entry, self.method, self.p = entry, method, p
        self.seen: dict[str, Tensor] = {}

    def mapped(self, f: Callable[[Tensor], Tensor]) -> "Alone":
        return Alone(self.entry, self.method, {k: f(t) for k, t in self.p.items()})

    def has(self, k: int) -> bool:
        return k == 0

    def tensors(self, k: int = 0) -> dict[str, Any]:
        return self.p


class Call:
    """What a call of the net has in the call slot of a module.

    seen: what companions at other modules found in this call, by name. task: as of a `Slot`.
    """

    __slots__ = ("entry", "gates", "own", "parts", "place", "seen", "steps", "task")

    def __init__(self, parts: Sequence[Any], place: Place, gates: Gates | None, task: int):
        self.parts, self.place, self.gates, self.task = parts, place, gates, task
        self.entry: Entry | None = parts[0].entry if parts else None
        self.seen: dict[str, Tensor] = {}
        self.steps: list[tuple[int, Step]] = []
        groups: dict[type[Method], list[Any]] = {}
        for part in parts:
            part.seen = self.seen
            groups.setdefault(part.entry.family, []).append(part)
        for family, some in groups.items():
            order, run = RUNS[family]
            self.add(order, functools.partial(run, some, gates))
        self.own = len(self.steps)

    @staticmethod
    def gates_of(held: Any) -> Gates | None:
        gates: Gates | None = held.gates
        return gates

    def share(self, seen: dict[str, Tensor]) -> None:
        """Let companions that run before this is made write to `seen`."""
        for holder in (self, *self.parts):
            holder.seen = seen

    def add(self, order: int, step: Step) -> None:
        """Let a step happen around the forward: outside of those of a higher order."""
        self.steps.append((order, step))
        self.steps.sort(key=lambda s: s[0])

    @property
    def by_itself(self) -> bool:
        """Whether it reads nothing at other modules, and nothing reads here."""
        sealed = self.gates is None or self.gates.sealed
        return sealed and len(self.steps) == self.own and not any(part.entry.companions for part in self.parts)

    def mapped(self, f: Callable[[Tensor], Tensor], made: dict[int, Any]) -> "Call":
        """As `Slot.mapped`."""
        if self.gates is not None and id(self.gates) not in made:
            made[id(self.gates)] = self.gates.mapped(f)
        gates = None if self.gates is None else made[id(self.gates)]
        return Call([part.mapped(f) for part in self.parts], self.place, gates, moment()[0])

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The module's output with all that stands here. forward: the module's own."""
        if not torch.compiler.is_compiling() and self.task != backward_task():
            outlived(self.place.name)
        for _, step in self.steps[:0:-1]:
            forward = _around(step, self.place, forward)
        if not self.steps:
            return forward(*args, **kwargs)
        return self.steps[0][1](self.place, forward, args, kwargs)

    def chosen(self, k: int) -> Any:
        """What stands here where all rows use adapter k of the batch."""
        part = next((part for part in self.parts if part.has(k)), None)
        if part is None:
            return self.place
        return Call([Alone(part.entry, part.method, part.tensors(k - part.start))], self.place, None, self.task)


class Gone:
    """Stands in a call slot between calls: a forward that comes here has outlived its call."""

    def __init__(self, name: str):
        self.name = name

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> NoReturn:
        outlived(self.name)


def outlived(name: str) -> NoReturn:
    raise RuntimeError(OUTLIVED.format(name=name or "the model"))


def _around(step: Step, m: Place, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: step(m, forward, args, kwargs)


def alone(entry: Entry, method: Any, p: dict[str, Any], place: Place, now: tuple[int, bool] | None = None) -> Call:
    """One adapter in a module's call slot."""
    return Call((Alone(entry, method, p),), place, None, (now or moment())[0])


def mixed(parts: Sequence[Stack], place: Place, gates: Gates) -> Call:
    """The adapters of a batch in a module's call slot."""
    return Call(parts, place, gates, moment()[0])


def hooked(slots: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward that looks into its call slot first."""

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return slots["call"].run(forward, args, kwargs)

    call.slots = slots  # type: ignore[attr-defined]
    return call
