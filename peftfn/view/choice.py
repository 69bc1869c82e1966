"""Which adapters of a view are active: a choice for all threads, and one of each thread."""

import threading
from typing import Any, NamedTuple


class Active(NamedTuple):
    """Adapters whose changes add up; none is the base."""

    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # a factor for each name; none is 1 for each

    def weight(self, name: str) -> float:
        """The factor of one of them."""
        return self.weights[self.names.index(name)] if self.weights else 1.0


class _Here(threading.local):
    """What this thread says of it. pinned: a `use` does."""

    def __init__(self) -> None:
        self.active = Active()
        self.pinned = False
        self.told: Any = None  # what the sites are told of the call that runs (`told.py`)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Here, ()


class Choice:
    """Which adapters are active: those of this thread's `use`, or else the default of all threads."""

    def __init__(self, default: Active, several: bool):
        self.default, self.several, self.here = default, several, _Here()
        self.blocks: list[Active] = []  # those of all threads' `use`

    def __reduce__(self) -> tuple[Any, ...]:
        return Choice, (self.default, self.several)

    @property
    def active(self) -> Active:
        here = self.here
        return here.active if here.pinned else self.default

    def has(self, name: str) -> bool:
        """Whether the adapter is active in some thread, or will be after a block."""
        return any(name in active.names for active in [self.default, *self.blocks])
