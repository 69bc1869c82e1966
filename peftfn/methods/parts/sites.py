"""The sites of a net where one method stands, for what a training loop asks of all of them together."""

from typing import Protocol, TypeVar

from peftfn.core.method import Method
from peftfn.core.plan import Plan

M = TypeVar("M", bound=Method)


class Planned(Protocol):
    """A net, as far as its plan goes."""

    @property
    def plan(self) -> Plan: ...


def sites_of(net: Planned, cls: type[M]) -> dict[str, M]:
    """{site: its method} where a method of the class stands. ValueError if there is none."""
    found: dict[str, M] = {name: entry.method for name, entry in net.plan.items() if isinstance(entry.method, cls)}
    if not found:
        raise ValueError(f"the net has no {cls.__name__} at its {len(net.plan)} sites: give the net that it adapts")
    return found
