"""Layers whose tensors a hook puts in place when they are called, and takes away after: offload, layerwise casting.

In a skeleton, their slots hold `Waiting` until the layer's forward begins. Then the tensors come as the hook would put
them in place, adapted where they are sites; after the forward the slots wait again.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from peftfn.net.released import Waiting
from peftfn.tensors.lent import Lent, beneath, lend
from peftfn.tensors.loaded import Source, source_of

Spot = tuple[Mapping[str, Any], MutableMapping[str, Any], str]  # (the base's dict, the skeleton's, key)
Slots = Mapping[str, tuple[MutableMapping[str, Any], str]]
Load = tuple[str, Mapping[str, Any], MutableMapping[str, Any], str]  # (its name for a hook, the base's dict, ours, key)


class Loading:
    """The layers of one skeleton whose tensors come late.

    Attributes:
        waiting: (slot's dict, key) → that dict, and what stands there until its layer is called.
        late: the sites among them.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[nn.Module, nn.Module]],
        spots: Iterable[Spot],
        slots: Slots,
        sites: Sequence[str],
        copied: Collection[tuple[int, str]],
    ):
        """pairs: (module of the base, its copy). spots: where each parameter and buffer stands. slots: by name.
        copied: slots whose parameter its own layer writes, so that it needs a copy."""
        self.slots, self.copied = slots, copied
        self.loads: dict[int, tuple[Source, list[Load], list[Load]]] = {}
        self.waiting: dict[tuple[int, str], tuple[MutableMapping[str, Any], Waiting]] = {}
        self.within: dict[int, tuple[list[Any], Mapping[str, Any]]] = {}  # layer → its slots before, what was made
        ours: dict[int, Any] = {id(theirs): held for theirs, held, _ in spots}
        names = {(id(held), k): n for n, (held, k) in reversed(list(slots.items()))}
        for b, s in pairs:
            if (source := source_of(b)) is None:
                continue
            parameters: list[Load] = [(n, d, ours[id(d)], k) for n, d, k in source.spots(b)]
            buffers: list[Load] = [(n, d, ours[id(d)], k) for n, d, k in source.spots(b, buffers=True)]
            self.loads[id(s)] = source, parameters, buffers
            for _, theirs, held, k in parameters:
                at = id(held), k
                self.waiting[at] = held, Waiting.like(names[at], theirs[k], source.dtype_of(theirs[k]))
        self.late = [n for n in sites if (id(slots[n][0]), slots[n][1]) in self.waiting]

    def begin(self) -> None:
        """At the start of a call: all of these slots wait."""
        if not self.waiting:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{next(iter(self.waiting.values()))[1].site}: a hook puts this parameter in place when its layer is "
                "called, which the compiler cannot follow. Call the net without torch.compile, or load the model "
                "without offload"
            )
        self.within.clear()
        for (_, k), (slots, waiting) in self.waiting.items():
            slots[k] = waiting

    def wait(self, make: Callable[..., dict[str, Any]]) -> Collection[str]:
        """The adapted sites whose parameters come later, of which make(only=sites) makes the values then."""
        names = set()
        for name in self.late:
            slots, k = self.slots[name]
            held = slots[k]
            if isinstance(held, Waiting):  # it may be the caller's own parameter
                slots[k] = waits = Waiting.like(held.site, held, held.dtype)
                waits.make = make
                names.add(name)
        return names

    def load(self, layer: nn.Module) -> Mapping[str, Any]:
        """Before a layer's forward: its tensors as the hook would put them in place. Returns the values of its sites,
        for the caller to fill in."""
        source, parameters, buffers = self.loads[id(layer)]
        before: list[Any] = []
        makes: dict[str, Any] = {}
        with beneath():
            for key, theirs, ours, k in parameters:
                held = ours[k]
                if not isinstance(held, Waiting):  # the caller's own, or put in place around a layer above
                    continue
                before.append((ours, k, held))
                t = source.load(key, theirs[k])
                if held.make is not None:
                    ours[k], makes[held.site] = t, held.make
                else:
                    ours[k] = t.clone() if (id(ours), k) in self.copied else lend(Lent, t)
            for key, theirs, ours, k in buffers:
                before.append((ours, k, ours[k]))
                ours[k] = source.load(key, theirs[k]).clone()
        made = next(iter(makes.values()))(only=makes.keys()) if makes else {}
        self.within[id(layer)] = before, made
        return made

    def unload(self, layer: nn.Module, check: Callable[[Mapping[str, Any]], None]) -> Iterable[str]:
        """After a layer's forward: its slots wait again. Returns the sites among them. check: what looks at the values
        that `load` returned, before they are gone."""
        before, made = self.within.pop(id(layer))
        check(made)
        for slots, k, held in before:
            slots[k] = held
        return made
