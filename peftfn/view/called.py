"""Call slots of a view: what methods at modules do around the forward of a module in it."""

import threading
from collections.abc import Mapping, Sequence
from functools import wraps
from typing import Any

from torch import Tensor, nn

from peftfn.core.plan import Plan
from peftfn.model.place import TOKENS, Place, first_floats
from peftfn.slots.call import Call
from peftfn.slots.companions import companion
from peftfn.tensors.transform import backward_task
from peftfn.view.choice import Choice
from peftfn.view.held import Held, Leaf, itself

CALL = "peftfn_call"
"""The submodule of an adapted module that holds what stands in its call slot."""


class _Seen(threading.local):
    """What the companions of one module's methods found in this thread's call."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _Seen, ()


class Called(Held):
    """What stands in the call slot of a module, as a submodule of it. The active adapter's leaf may be missing.

    asked: (those of other modules whose methods need something here, what: the kind of a companion).
    """

    def __init__(self, name: str, choice: Choice, leaves: dict[str, nn.Module], place: Place):
        super().__init__(name, choice, leaves, itself)
        self.place, self.seen = (place,), _Seen()  # in a tuple, as below: no submodule of this one
        self.asked: tuple[tuple[Called, str], ...] = ()
        self.ends: tuple[Called, ...] = ()  # of the model itself: those who forget what they have seen when it is done

    def value(self) -> Any:
        """What the active adapter puts into the call slot; the place, if that is nothing."""
        out = self.forward(self.place[0])
        if isinstance(out, Call):
            out.share(self.seen.found)
        return out

    def run(self, args: Any, kwargs: Any) -> Any:
        """The module's output."""
        place, value = self.place[0], self.value()
        for other, kind in self.asked:
            source = other.value()
            if isinstance(source, Call):
                value = value if isinstance(value, Call) else Call((), place, None, backward_task())
                value.add(*companion(kind, source, self.site))
        try:
            return value.run(place.forward, args, kwargs)
        finally:
            for other in self.ends:
                other.seen.found.clear()


def places_of(model: nn.Module, plans: Sequence[Plan]) -> dict[str, Place]:
    """What methods see of each module with a call slot, while the model has its parameters where it had them."""
    kinds = {s.name: s.kind for plan in plans for s in plan.places}
    kinds |= {c.at: "" for plan in plans for cs in plan.accompanied.values() for c in cs if c.at not in kinds}
    return {at: Place.of(model, at, kind == TOKENS) for at, kind in kinds.items()}


def place_calls(
    model: nn.Module,
    places: Mapping[str, Place],
    leaves: Mapping[str, dict[str, nn.Module]],
    plans: Sequence[Plan],
    choice: Choice,
    classes: Mapping[nn.Module, type],
) -> set[nn.Module]:
    """Give the modules at these places their call slots, and return them.

    leaves: place → adapter's name → its leaf there. classes: what each module's was before its parameters were adapted.
    """
    slots: dict[str, Called] = {}
    for at, place in places.items():
        layer = model.get_submodule(at)
        own = vars(layer).pop("forward", classes[layer])
        like = first_floats(layer, Leaf) or first_floats(model, Leaf)
        slots[at] = Called(at, choice, leaves.get(at, {}), place.within(layer, own, like))
    for plan in plans:
        for s in plan.places:
            method: Any = plan[s.name].method
            method.settle(slots[s.name].place[0])
        for site, companions in plan.accompanied.items():
            for c in companions:
                slots[c.at].asked = tuple(dict.fromkeys([*slots[c.at].asked, (slots[site], c.kind)]))
    sources = tuple(slots[site] for site in dict.fromkeys(site for plan in plans for site in plan.accompanied))
    if sources:
        if "" not in slots:
            place = Place.of(model, "")
            slots[""] = Called("", choice, {}, place.within(model, vars(model).pop("forward", classes[model])))
        slots[""].ends = sources
    for at, slot in slots.items():
        layer = model.get_submodule(at)
        layer.register_module(CALL, slot.train(layer.training))
    return {model.get_submodule(at) for at in slots}


def calling(cls: Any) -> dict[str, Any]:
    """What a class has whose modules look into their call slots."""

    @wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._modules[CALL].run(args, kwargs)

    body: dict[str, Any] = {"forward": forward}
    if issubclass(cls, nn.Sequential):  # which runs all its submodules, and this is none of them
        body["__iter__"] = lambda self: iter([m for k, m in self._modules.items() if k != CALL])
        body["__len__"] = lambda self: len(self._modules) - 1
    return body
