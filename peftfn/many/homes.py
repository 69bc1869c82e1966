"""Which of a bank's nets holds the adapters of another net: the smallest that holds any of them exactly."""

from collections.abc import Sequence

from peftfn.many.conform import conform
from peftfn.many.residents import Slots
from peftfn.net.net import Adapted


def home(net: Adapted, slots: Sequence[Slots]) -> tuple[Slots, bool]:
    """(the slots of the smallest net that holds any adapter of `net`, whether its plan is the same).

    Raises:
        ValueError: there are none; it says why of each.
    """
    given, why = net.init(), []
    for mine in sorted(slots, key=lambda s: size(s.net)):
        try:
            fitted = given if net is mine.net else conform(given, net, mine.net)
        except ValueError as e:
            why.append(str(e))
        else:
            return mine, fitted.keys() == given.keys() and all(fitted[n] is given[n] for n in given)
    raise ValueError("put: no net of the bank can hold this adapter exactly. " + " ".join(why))


def size(net: Adapted) -> int:
    """Parameters of an adapter of the net."""
    specs = [e.spec for e in net.plan.values()] + list(net.plan.banks.values())
    return sum(shape.numel() for spec in specs for shape in spec.values())


def fits(net: Adapted, other: Adapted) -> bool:
    """Whether a slot of `other` holds any adapter of `net` exactly."""
    try:
        conform(net.init(), net, other)
    except ValueError:
        return False
    return True
