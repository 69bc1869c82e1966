"""A private copy of a model's Python structure that shares its parameters: the only thing a call ever touches.

The base is an argument, never a patient. A call runs on a skeleton, whose parameter slots are filled from the base at
the start of the call and restored at its end; whatever a forward pass writes (a BatchNorm's statistics, an attribute)
it writes there. One skeleton serves one call at a time, so threads cannot collide.
"""

from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from functools import partial
from threading import RLock
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftfn.model.model import modules_of, quantised_in
from peftfn.model.names import near
from peftfn.model.place import Place
from peftfn.model.site import runs_linear
from peftfn.model.structure import copy_structure, followed, hooks_of, is_plain, reachable
from peftfn.model.written import written_by
from peftfn.net.lending import Lending, constant
from peftfn.net.loading import Loading, Spot
from peftfn.net.recompute import Held, Recompute
from peftfn.net.released import Bypass, Released
from peftfn.net.watch import PLAIN, Watch
from peftfn.slots.call import Gone, hooked
from peftfn.slots.gates import Gates
from peftfn.slots.keeper import NOTHING, Keeper, Made, Views
from peftfn.slots.kept import kept
from peftfn.slots.kept_mixed import index_of, kept_mixed, place
from peftfn.slots.routed import encoders, routed
from peftfn.slots.slot import Slot, plus
from peftfn.slots.unrowed import tables
from peftfn.slots.values import Given
from peftfn.tensors.lent import REPLACED, Lent, beneath
from peftfn.tensors.quantised import Parts, QuantisedWeight
from peftfn.tensors.transform import lasting

_VERSION: Any = Tensor._version.__get__  # type: ignore[attr-defined]


class Skeleton:
    """One copy of `base`, with the slots named in `sites` to be filled by the caller: of parameters, and of modules.

    backbones: those of the modules that stand for backbones. again: modules that keep nothing for the backward pass but
    what goes in. routed: modules through which the rows of a mixed batch are followed. settle: module → its methods.
    """

    def __init__(
        self,
        base: nn.Module,
        sites: list[str],
        backbones: Collection[str] = (),
        again: Sequence[str] = (),
        routed: Sequence[str] = (),
        settle: Mapping[str, Sequence[Any]] = MappingProxyType({}),
    ):
        self.base, self.sites, self.backbones, self.again, self.lock = base, sites, backbones, again, RLock()
        self.routed, self.settle = routed, settle
        self._build()

    def _build(self) -> None:
        with lasting(), beneath():  # what is made now serves later calls, outside of this call's transforms
            self._copy()

    def _copy(self) -> None:
        named = modules_of(self.base)
        modules, loose = reachable(named)
        opaque = quantised_in(named)
        self.called = [n for n in self.sites if n in named]
        weights = [n for n in self.sites if n not in named]
        self._check_sites(weights, named, {id(w.layer) for w in opaque.values()})
        adapted = {id(named[m]._parameters.get(k)): n for n in weights for m, _, k in [n.rpartition(".")]}
        own = {id(p) for m in modules if isinstance(m, nn.RNNBase) for p in m._flat_weights}  # it looks anew each time
        self.loose = [(p, Lent.of(p)) for p in loose if id(p) not in adapted or id(p) in own]
        aliases: dict[int, Any] = {id(p): alias for p, alias in self.loose}
        aliases |= {id(p): Bypass.of(adapted[id(p)]) for p in loose if id(p) not in aliases}
        self.root, copies = copy_structure(self.base, modules, aliases, (self._load, self._unload))
        self.pairs = list(zip(modules, copies, strict=True))
        self._name_slots(named, opaque)
        self._name_calls()
        self._route()
        self._sort_slots()
        self.idle = self.snapshot()
        self.keeper, self.mixed_keeper, self.views = Keeper(kept), Keeper(kept_mixed), Views()
        for _, s in self.pairs:
            if s._parameters:
                vars(s)["_apply"] = partial(self._move, s)
        self.recompute = Recompute(self)
        self.recompute.install([s for _, s in self.pairs], self.again)
        self.watch = Watch(self.pairs, self.loose)

    def _check_sites(self, weights: list[str], named: Mapping[str, nn.Module], opaque: set[int]) -> None:
        for name in weights:
            module, _, key = name.rpartition(".")
            if module not in named or (key not in named[module]._parameters and id(named[module]) not in opaque):
                raise ValueError(f"{name}: the model has no such parameter or module any more. Call adapt again.")

    def _name_calls(self) -> None:
        """Call slots: where an adapted module's forward looks first."""
        self.calls: list[Spot] = []
        for name in self.called:
            module = self.root.get_submodule(name)
            place = Place.of(self.base, name, name in self.backbones).within(module, module.forward)
            for method in self.settle.get(name, ()):
                method.settle(place)
            slots: dict[str, Any] = {"call": Gone(name)}
            vars(module)["forward"] = hooked(slots, place.forward)
            self.slots[name] = (slots, "call")
            self.calls.append(({"call": place}, slots, "call"))
        self.filled = self.parameters + self.calls

    def _route(self) -> None:
        """Routed modules follow the rows of a mixed batch. Each knows the slots of the sites in it."""
        for name in self.routed:
            module, inside = self.root.get_submodule(name), f"{name}." if name else ""
            places = [self.slots[n] for n in self.sites if n == name or n.startswith(inside)]
            for k in ("forward", *encoders(module)):
                vars(module)[k] = routed(name, places, getattr(module, k))

    def _name_slots(self, named: Mapping[str, nn.Module], opaque: Mapping[str, QuantisedWeight]) -> None:
        """Where each parameter and buffer stands in the base and here, and the slots by name, released for now."""
        self.parameters: list[Spot] = [(b._parameters, s._parameters, k) for b, s in self.pairs for k in b._parameters]
        self.buffers: list[Spot] = [(b._buffers, s._buffers, k) for b, s in self.pairs for k in b._buffers]
        self.buffers += [(vars(b), vars(s), k) for b, s in self.pairs for k, t in vars(b).items() if is_plain(t)]
        copied = {id(b): s for b, s in self.pairs}
        self.slots: dict[str, tuple[MutableMapping[str, Any], str]] = {
            f"{prefix}.{k}" if prefix else k: (copied[id(b)]._parameters, k)
            for prefix, b in named.items()
            for k in b._parameters
        }
        self.originals: dict[int, Mapping[str, Any]] = {id(s._parameters): b._parameters for b, s in self.pairs}
        stands = {id(w.layer): self._stand_in(w, copied[id(w.layer)]) for w in opaque.values()}
        for name, w in opaque.items():
            for k, slots in stands[id(w.layer)].items():
                self.slots[f"{name.removesuffix('weight')}{k}"] = (slots, k)
        for name, (slots, k) in self.slots.items():
            if slots[k] is not None or name in self.sites:
                slots[k] = Released.of(name)

    def _sort_slots(self) -> None:
        """Which slots a call fills in which way, and what of the modules it has to look at."""
        owners = {id(s._parameters): s for _, s in self.pairs}
        self.lanes: dict[str, dict[str, Any]] = {  # adapted layers whose forward a slot may stand in for: their vars
            name: vars(layer)
            for name in self.sites
            if name.rpartition(".")[2] == "weight"
            and (layer := owners.get(id(self.slots[name][0]))) is not None
            and runs_linear(layer)
        }
        sites = {(id(slots), k) for slots, k in map(self.slots.__getitem__, self.sites)}
        copied = {(id(s._parameters), k) for b, s in self.pairs for k in written_by(b)}
        self.loading = Loading(self.pairs, self.parameters + self.buffers, self.slots, self.sites, copied)
        late = self.loading.waiting.keys()
        self.constants = [p for p in self.filled if (id(p[1]), p[2]) in sites - late]
        lendable = [p for p in self.parameters if (id(p[1]), p[2]) not in sites | late]
        written = {(id(b._parameters), k) for b, _ in self.pairs for k in written_by(b)}
        embeddings = [s for _, s in self.pairs if isinstance(s, nn.Embedding | nn.EmbeddingBag)]
        writers = [p for p in lendable if (id(p[0]), p[2]) in written]
        self.lending = Lending(lendable, writers, self.buffers, embeddings)
        marked = [(s._parameters, k) for b, s in self.pairs for k in tables(b)]
        self.tables = [(slots, k) for slots, k in marked if (id(slots), k) not in sites]
        self.moved: set[tuple[int, str]] = set()
        self.flags = [
            (b, s, [k for k, v in vars(b).items() if isinstance(v, bool | float | int | str)]) for b, s in self.pairs
        ]

    def _stand_in(self, weight: QuantisedWeight, copied: nn.Module) -> dict[str, MutableMapping[str, Any]]:
        """Slots for a quantised layer: where they are, by the name of what they hold."""
        slots: MutableMapping[str, Any] = copied._parameters
        if weight.own_forward:
            slots = {"weight": None, "bias": None}
            vars(copied)["forward"] = partial(_linear, slots)
        self.parameters = [p for p in self.parameters if p[1] is not slots or p[2] != "weight"]
        names = ["weight", "bias"] if weight.own_forward else ["weight"]
        self.parameters += [(Parts(weight), slots, k) for k in names]
        self.originals.setdefault(id(slots), Parts(weight))
        return dict.fromkeys(names, slots)

    # Freshness: what the owner did to the base between calls is seen by the next one.

    def _take_hooks(self) -> None:
        copies = {id(b): s for b, s in self.pairs}
        for b, s in self.pairs:
            for theirs, ours in zip(hooks_of(b), hooks_of(s), strict=True):
                now = followed(theirs, copies)
                if ours != now:
                    ours.clear()
                    ours.update(now)

    # While compiling it runs as it is: the compiler does not guard hooks either. The mark is what
    # torch.compiler.assume_constant_result makes, which would import the compiler.
    _take_hooks._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def refresh(self) -> None:
        """Take over modes, hooks and plain attributes of the base; copy a base of changed structure anew."""
        if torch.compiler.is_compiling():
            self._take_hooks()
            for b, s, names in self.flags:  # the reads are what the compiled code is guarded by
                for name in names:
                    if getattr(s, name) != getattr(b, name):
                        setattr(s, name, getattr(b, name))
            for children, key, child in self.watch.links:
                if children.get(key) is not child:
                    raise RuntimeError(f"the model's {key} is another module now. Call adapt again, and compile that.")
            return
        if self.watch.same():
            return
        self.watch.clear()
        if not self.watch.alike():
            self._build()
            return
        for b, s in self.pairs:
            vars(s).update({k: v for k, v in vars(b).items() if v.__class__ in PLAIN})
        self._take_hooks()
        self.watch = Watch(self.pairs, self.loose)

    # A call: fill the slots, run, restore.

    def open(self) -> Held:
        """Fill every slot from the base, and tell what they held. Parameters come detached: the base is no input."""
        if not torch.compiler.is_compiling():
            self.lock.acquire()
        before = self.snapshot() if torch.compiler.is_compiling() else self.idle
        self.moved.clear()
        for theirs, ours, k in self.constants:
            p = theirs[k]
            ours[k] = constant(p)
        self.lending.fill_parameters()
        self.loading.begin()
        self.lending.fill_tables()
        self.lending.fill_buffers()
        return before

    def _load(self, layer: nn.Module) -> None:
        """Before the forward of a layer whose tensors a hook puts in place."""
        self.fill(self.loading.load(layer))

    def _unload(self, layer: nn.Module) -> None:
        """After it."""
        for name in self.loading.unload(layer, self.check_in_place):
            if name in self.lanes:
                self.lanes[name].pop("forward", None)

    def close(self, before: Held) -> None:
        self.restore(before)
        if not torch.compiler.is_compiling():
            self.lock.release()

    def versions(self) -> list[int]:
        """How often each of the base's parameters was written to; a forward pass must not."""
        tensors = [theirs[k] for theirs, _, k in self.parameters]
        try:
            return list(map(_VERSION, tensors))
        except (RuntimeError, TypeError):  # an inference tensor, an empty slot
            return [-1 if t is None or t.is_inference() else t._version for t in tensors]

    def written(self, versions: list[int]) -> list[str]:
        """The parameters written to since `versions`."""
        slots = [(id(ours), k) for _, ours, k in self.parameters]
        odd = {slot for slot, old, new in zip(slots, versions, self.versions(), strict=True) if old != new}
        return [name for name, (ours, k) in self.slots.items() if (id(ours), k) in odd]

    def __getitem__(self, name: str) -> Any:
        slots, k = self.slots[name]
        return slots[k]

    def __setitem__(self, name: str, value: Any) -> None:
        slots, k = self.slots[name]
        slots[k] = value

    def fill(self, values: Mapping[str, Any]) -> None:
        """Put what an adapter makes of slots into them. Layers of the fast lane are called on it directly; the compiler
        gets there by torch's functions, as every other layer does."""
        direct = not torch.compiler.is_compiling()
        for name, value in values.items():
            slots, k = self.slots[name]
            slots[k] = value
            if direct and name in self.lanes and isinstance(value, Slot):
                value.held = slots
                self.lanes[name]["forward"] = value.forward

    # What adapters made is kept for their next call.

    def kept(self, given: Sequence[Given], gates: Gates | None, training: bool) -> Made:
        """What stands in the slots when these adapters were the last ones here, and nothing of them or of the base was
        replaced; nothing otherwise."""
        if gates is None:
            return self.keeper.find(given, training, self._theirs)
        made = NOTHING if index_of(gates) is None else self.mixed_keeper.find(given, training, self._theirs)
        if made.values:
            place(made.values, given, gates)
        return made

    def keep(self, given: Sequence[Given], gates: Gates | None, training: bool, made: Mapping[str, Any]) -> None:
        """Keep of `made`, what the call of adapters had in its slots, what their next call can have."""
        keeper = self.keeper if gates is None else self.mixed_keeper
        # of stacks that no row uses, nothing was made
        used = gates is None or (index_of(gates) is not None and all(gates.uses(g.start, g.size) for g in given))
        if used and not self.loading.late:
            keeper.keep(given, training, made, self.lanes, self._theirs)

    def _theirs(self, names: Collection[str]) -> list[Any]:
        """What the base has in these slots of parameters."""
        return [self.originals[id(slots)][k] for slots, k in map(self.slots.__getitem__, names)]

    def check_in_place(self, values: Mapping[str, Any]) -> None:
        """RuntimeError if the forward took one of `values` out of its slot, so that its adapter was not used."""
        for name, value in values.items():
            slots, k = self.slots[name]
            if slots[k] is not value and (id(slots), k) not in self.moved:
                raise RuntimeError(REPLACED.format(name=name))

    def _move(self, module: nn.Module, fn: Callable[[Any], Any], recurse: bool = True) -> nn.Module:
        """`Module._apply`, which `.to(…)` is made of, for a forward that moves a layer (routers do, to fp32): what the
        slots hold is moved, for the length of the call."""
        for child in module.children() if recurse else ():
            child._apply(fn)
        tensors = [(d, k) for d in (module._parameters, module._buffers) for k, t in d.items() if t is not None]
        for slots, k in tensors:
            held: Any = slots[k]
            if isinstance(held, Slot):  # a tensor takes its place then, so the layer runs as it always does
                like = torch.empty(0, dtype=held.dtype, device=held.device)
                moved = fn(like)
                if (moved.dtype, moved.device) == (like.dtype, like.device):
                    continue
                self.moved.add((id(slots), k))
                vars(module).pop("forward", None)
            slots[k] = fn(held)
        return module

    def names(self, name: str) -> list[str]:
        """Every name of the slot `name`: a shared submodule has several."""
        slots, k = self.slots[name]
        return [n for n, (others, key) in self.slots.items() if others is slots and key == k]

    def put(self, params: Mapping[str, Tensor]) -> None:
        """Fill slots with the caller's own parameters; one name of a tied tensor stands for all that are not named."""
        tied = {}
        for name, p in params.items():
            if name not in self.slots or name in self.called:
                raise KeyError(f"params has {name!r}, which is no parameter of the model{near(name, list(self.slots))}")
            slots, k = self.slots[name]
            theirs = self.originals[id(slots)][k]
            tied[id(theirs)] = p
            slots[k] = p
        given = {(id(self.slots[name][0]), self.slots[name][1]) for name in params}
        for theirs, ours, k in self.parameters:
            if id(theirs[k]) in tied and theirs[k] is not None and (id(ours), k) not in given:
                ours[k] = tied[id(theirs[k])]

    def snapshot(self) -> Held:
        """What all slots hold (buffers only while compiling: eager calls leave theirs for the next to check)."""
        buffers = self.buffers if torch.compiler.is_compiling() else []
        return [ours[k] for _, ours, k in self.filled + buffers], [lane.get("forward") for lane in self.lanes.values()]

    def identities(self) -> dict[int, Any]:
        """Every parameter and buffer in the slots now, by identity; while compiling there are no identities.

        The tensors are kept: no other one gets the identity of one that leaves its slot.
        """
        if torch.compiler.is_compiling():
            return {}
        return {id(ours[k]): ours[k] for _, ours, k in self.parameters + self.buffers}

    def restore(self, held: Held) -> None:
        values, forwards = held
        for (_, ours, k), value in zip(self.filled + self.buffers, values, strict=False):
            ours[k] = value
        for lane, forward in zip(self.lanes.values(), forwards, strict=True):
            if forward is None:
                lane.pop("forward", None)
            else:
                lane["forward"] = forward


def _linear(slots: Mapping[str, Any], x: Tensor) -> Tensor:
    """A quantised layer's forward, with its weight and bias as they stand in the slots."""
    return plus(F.linear(x, slots["weight"]), slots["bias"])
