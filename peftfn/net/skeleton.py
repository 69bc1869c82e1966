"""A private copy of a model's Python structure that shares its parameters: the only thing a call ever touches.

The base is an argument, never a patient. A call runs on a skeleton, whose parameter slots are filled from the base at
the start of the call and restored at its end; whatever a forward pass writes (a BatchNorm's statistics, an attribute)
it writes there. One skeleton serves one call at a time, so threads cannot collide.
"""

import copy
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import Enum
from functools import partial
from itertools import chain
from threading import RLock
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import RemovableHandle

from peftfn.model.model import modules_of, quantised_in
from peftfn.model.names import near
from peftfn.model.place import Place
from peftfn.model.site import runs_linear
from peftfn.model.structure import HOOKS, STANDARD, copy_structure, followed, hooks_of, is_plain, is_setting, reachable
from peftfn.model.written import written_by
from peftfn.net.again import rematerialised
from peftfn.net.loading import Loading, Spot
from peftfn.net.released import Bypass, Released, Waiting
from peftfn.slots import track
from peftfn.slots.call import Call, Gone, hooked
from peftfn.slots.kept import Keeper
from peftfn.slots.routed import routed
from peftfn.slots.slot import Slot, plus
from peftfn.slots.unrowed import tables
from peftfn.slots.values import Given
from peftfn.tensors.lent import REPLACED, Lent, beneath, lend
from peftfn.tensors.quantised import Parts, QuantisedWeight
from peftfn.tensors.transform import backward_task, lasting, under_transform

Held = tuple[list[Any], list[Any]]  # (what the slots hold, the forwards of the layers in the fast lane)
CHECKPOINT = "_gradient_checkpointing_func"  # where transformers' layers keep their torch.utils.checkpoint
HOOKED = ("_hf_hook", "_diffusers_hook")  # where accelerate's and diffusers' hooks are, which change in each call
_VERSION: Any = Tensor._version.__get__  # type: ignore[attr-defined]
_PLAIN = (bool, int, float, str, type(None))


class Skeleton:
    """One copy of `base`, with the slots named in `sites` to be filled by the caller: of parameters, and of modules.

    backbones: those of the modules that stand for backbones. again: modules that keep nothing for the backward pass but
    what goes in. routed: modules through which the rows of a mixed batch are followed.
    """

    def __init__(
        self,
        base: nn.Module,
        sites: list[str],
        backbones: Collection[str] = (),
        again: Sequence[str] = (),
        routed: Sequence[str] = (),
    ):
        self.base, self.sites, self.backbones, self.again, self.lock = base, sites, backbones, again, RLock()
        self.routed = routed
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
        self.inside: dict[int, list[str]] = {}  # module → its slots, where it is rematerialised
        self.idle = self.snapshot()
        self.keeper = Keeper()
        for _, s in self.pairs:
            if s._parameters:
                vars(s)["_apply"] = partial(self._move, s)
            if CHECKPOINT in vars(s):
                vars(s)[CHECKPOINT] = partial(self._checkpoint, vars(s)[CHECKPOINT])
        for name in self.again:
            layer = self.root.get_submodule(name)
            vars(layer)["forward"] = partial(self._checkpoint, None, _method(layer, layer.forward))
        self._watch()

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
            vars(module)["forward"] = routed(name, places, module.forward)

    def _name_slots(self, named: Mapping[str, nn.Module], opaque: Mapping[str, QuantisedWeight]) -> None:
        """Where each parameter and buffer stands in the base and here, and the slots by name, released for now."""
        self.parameters: list[Spot] = [(b._parameters, s._parameters, k) for b, s in self.pairs for k in b._parameters]
        self.buffers: list[Spot] = [(b._buffers, s._buffers, k) for b, s in self.pairs for k in b._buffers]
        self.buffers += [(vars(b), vars(s), k) for b, s in self.pairs for k, t in vars(b).items() if is_plain(t)]
        self.clones: list[tuple[Any, ...]] = [(None, 0, None, 0)] * len(self.buffers)
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
        self.lendable = [p for p in self.parameters if (id(p[1]), p[2]) not in sites | late]
        written = {(id(b._parameters), k) for b, _ in self.pairs for k in written_by(b)}
        self.written_to = [p for p in self.lendable if (id(p[0]), p[2]) in written]
        marked = [(s._parameters, k) for b, s in self.pairs for k in tables(b)]
        self.tables = [(slots, k) for slots, k in marked if (id(slots), k) not in sites]
        self.moved: set[tuple[int, str]] = set()
        self.embeddings = [s for _, s in self.pairs if isinstance(s, nn.Embedding | nn.EmbeddingBag)]
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

    def _watch(self) -> None:
        """Note what the modules of base and skeleton hold, to see in one pass whether anything is not as it was."""
        own = [[k for k in _own(vars(b)) if k in vars(s)] for b, s in self.pairs]
        watched = [
            (operator.itemgetter(*keys), vars(m)) for pair, keys in zip(self.pairs, own, strict=True) for m in pair
        ]
        self.getters, self.dicts = zip(*watched, strict=True)
        self.children = [b._modules for b, _ in self.pairs]
        self.links = [(children, k, child) for children in self.children for k, child in children.items()]
        self.children += [s._modules for _, s in self.pairs]
        tensors = [d for pair in self.pairs for m in pair for d in (m._parameters, m._buffers)]
        self.named = [*self.children, *tensors]
        ours: list[tuple[dict[str, Any], ...]] = [
            (vars(s), s._modules, s._parameters, s._buffers) for _, s in self.pairs
        ]
        self.initial = [(d, dict(d)) for attributes, modules, _, _ in ours for d in (attributes, modules)]
        self.places = [(d, list(d)) for _, _, *slots in ours for d in slots]
        hooks = [(vars(m), k) for pair in self.pairs for m in pair for k in HOOKS if k in vars(m)]
        self.unhooked = [d[k] for d, k in hooks if not d[k]]
        self.hooked = [(d, k, dict(d[k])) for d, k in hooks if d[k]]
        self.handles = RemovableHandle.next_id
        held = [(vars(m), k) for pair, keys in zip(self.pairs, own, strict=True) for m in pair for k in keys]
        held = [(d, k) for d, k in held if k not in HOOKED and _is_container(d[k])]
        self.data = [(d, k, copy.deepcopy(d[k])) for d, k in held if _is_data(d[k])]
        self.containers = [(d, k, _state(d[k])) for d, k in held if not _is_data(d[k])]
        self.seen = tuple(self._values())
        self.keys, self.size = list(chain.from_iterable(self.named)), sum(map(len, self.dicts))

    def _values(self) -> Iterator[Any]:
        attributes = chain.from_iterable(map(operator.call, self.getters, self.dicts))
        return chain(attributes, chain.from_iterable(map(dict.values, self.children)))

    def _same_structure(self) -> bool:
        return (
            sum(map(len, self.dicts)) == self.size
            and list(chain.from_iterable(self.named)) == self.keys
            and all(_equal(d[k], was) for d, k, was in self.data)
            and all(_equal(_state(d[k]), was) for d, k, was in self.containers)
            and all(p.data_ptr() == alias.data_ptr() and p.dtype == alias.dtype for p, alias in self.loose)
        )

    def _same_hooks(self) -> bool:
        if RemovableHandle.next_id != self.handles:  # a hook was registered somewhere in the process
            if any(self.unhooked):
                return False
            self.handles = RemovableHandle.next_id
        return all(d[k] == was for d, k, was in self.hooked)

    def _clear(self) -> None:
        """Take away what a forward pass left behind in the skeleton."""
        for ours, before in self.initial:
            ours.clear()
            ours.update(before)
        for slots, names in self.places:
            kept = {k: slots.get(k) for k in names}
            slots.clear()
            slots.update(kept)

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
            for children, key, child in self.links:
                if children.get(key) is not child:
                    raise RuntimeError(f"the model's {key} is another module now. Call adapt again, and compile that.")
            return
        if self._same_structure() and self._same_hooks() and not any(map(operator.is_not, self._values(), self.seen)):
            return
        self._clear()
        if not self._same_structure() or any(
            v is not old and v.__class__ not in _PLAIN for v, old in zip(self._values(), self.seen, strict=True)
        ):
            self._build()
            return
        for b, s in self.pairs:
            vars(s).update({k: v for k, v in vars(b).items() if v.__class__ in _PLAIN})
        self._take_hooks()
        self._watch()

    # A call: fill the slots, run, restore.

    def open(self) -> Held:
        """Fill every slot from the base, and tell what they held. Parameters come detached: the base is no input."""
        if not torch.compiler.is_compiling():
            self.lock.acquire()
        before = self.snapshot() if torch.compiler.is_compiling() else self.idle
        self.moved.clear()
        for theirs, ours, k in self.constants:
            p = theirs[k]
            ours[k] = p.detach() if p is not None and p.requires_grad else p
        self._lend()
        self.loading.begin()
        for embedding in self.embeddings:
            waits = isinstance(embedding.weight, Waiting)
            if embedding.max_norm is not None and not waits:  # F.embedding would renormalise the base's rows in place
                embedding._parameters["weight"] = embedding._parameters["weight"].clone()  # type: ignore[union-attr, assignment]
        self._fill_buffers()
        return before

    def _lend(self) -> None:
        """Fill the slots that no rule adapts: a call may write to what it has there. Tied slots hold one tensor."""
        lent: dict[int, Any] = {}
        for theirs, _, k in self.written_to:
            p = theirs[k]
            lent[id(p)] = None if p is None else p.detach().clone()
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():  # a tracer has plain tensors
            for theirs, ours, k in self.lendable:
                p = theirs[k]
                ours[k] = lent[id(p)] if id(p) in lent else _constant(p)
            return
        parameter, kind, others = nn.Parameter, Lent, []
        with beneath():
            for theirs, ours, k in self.lendable:
                p = theirs[k]
                held = lent.get(id(p))
                if held is not None:
                    ours[k] = held
                elif type(p) is parameter:
                    ours[k] = lent[id(p)] = lend(kind, p)
                else:
                    others.append((ours, k, p))
        for ours, k, p in others:
            ours[k] = _constant(p)

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

    # What one adapter made is kept for its next call.

    def kept(self, given: Given, training: bool) -> Mapping[str, Any]:
        """What stands in the slots when this adapter was the last one here, and nothing of it or of the base was
        replaced; nothing otherwise."""
        return self.keeper.find(given, training, self._theirs)

    def keep(self, given: Given, training: bool, made: Mapping[str, Any]) -> None:
        """Keep of `made`, what the call of an adapter had in its slots, what its next call can have."""
        if not self.loading.late:
            self.keeper.keep(given, training, made, self.lanes, self._theirs)

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

    def identities(self) -> frozenset[int]:
        """Every parameter and buffer in the slots now, by identity; while compiling there are no identities."""
        if torch.compiler.is_compiling():
            return frozenset()
        return frozenset(id(ours[k]) for _, ours, k in self.parameters + self.buffers)

    def restore(self, held: Held) -> None:
        values, forwards = held
        for (_, ours, k), value in zip(self.filled + self.buffers, values, strict=False):
            ours[k] = value
        for lane, forward in zip(self.lanes.values(), forwards, strict=True):
            if forward is None:
                lane.pop("forward", None)
            else:
                lane["forward"] = forward

    def _fill_buffers(self) -> None:
        """A copy of each buffer. One of integers (a mask, positions) is copied again only when it was written to; for
        the others versions tell nothing, since BatchNorm's kernel writes its statistics without counting."""
        for i, (theirs, ours, k) in enumerate(self.buffers):
            t = theirs[k]
            if t is None:
                ours[k] = None
            elif torch.compiler.is_compiling() or t.is_inference() or t.is_floating_point():
                ours[k] = t.detach().clone()
            elif not _same(self.clones[i], t, ours[k]):
                with lasting():
                    ours[k] = t.clone()
                self.clones[i] = (t, t._version, ours[k], ours[k]._version)

    @contextmanager
    def _holding(self, held: Held) -> Iterator[None]:
        with self.lock:
            before = self.snapshot()
            self.restore(held)
            tasks = [(v, v.task) for v in held[0] if isinstance(v, Slot | Call)]
            for v, _ in tasks:
                v.task = backward_task()
            try:
                yield
            finally:
                self.restore(before)
                for v, task in tasks:
                    v.task = task

    def _checkpoint(self, original: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Gradient checkpointing whose recomputation, which comes in backward, sees the tensors of this very call."""
        if not under_transform() and not torch.is_grad_enabled():  # nothing is kept
            return run(*args, **kwargs)
        if torch.compiler.is_compiling() and under_transform():  # the compiler decides what it keeps
            return run(*args, **kwargs)
        if (tracking := track.current()) is not None:
            if under_transform():  # what runs again has other tensors, which would have no rows
                return run(*args, **kwargs)
            run = tracking.again(run, args, kwargs)
        if under_transform():  # which has no hooks on saved tensors
            return rematerialised(run, args, kwargs, self._slots_of, partial(self._filled, self.snapshot()))
        options = {
            k: v for k, v in getattr(original, "keywords", {}).items() if k not in ("use_reentrant", "context_fn")
        }
        return checkpoint(run, *args, use_reentrant=False, context_fn=self.checkpoint_context, **options, **kwargs)

    def _slots_of(self, layer: nn.Module) -> dict[str, Any]:
        """What the slots of a layer and its parts hold, by one name of each."""
        if id(layer) not in self.inside:
            prefix = next(f"{n}." if n else "" for n, m in self.root.named_modules() if m is layer)
            names = {(id(slots), k): n for n, (slots, k) in self.slots.items() if n.startswith(prefix)}
            self.inside[id(layer)] = list(names.values())
        return {n: self[n] for n in self.inside[id(layer)]}

    @contextmanager
    def _filled(self, held: Held, values: Mapping[str, Any]) -> Iterator[None]:
        """While it lasts, the slots have what they had in a call, with other values in some of them."""
        with self._holding(held):
            self.fill(values)
            yield

    def checkpoint_context(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around a checkpointed forward pass, and around its recomputation."""
        return nullcontext(), self._holding(self.snapshot())


def _constant(p: Any) -> Any:
    return p.detach() if p is not None and p.requires_grad else p


def _method(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward that a layer has, which may be a function that somebody put there, as a method of the layer."""
    return MethodType(lambda _, *args, **kwargs: forward(*args, **kwargs), layer)


def _linear(slots: Mapping[str, Any], x: Tensor) -> Tensor:
    """A quantised layer's forward, with its weight and bias as they stand in the slots."""
    return plus(F.linear(x, slots["weight"]), slots["bias"])


def _is_container(v: Any) -> bool:
    """Whether v holds what its owner may change without replacing v: a list, say, or an object with attributes."""
    if isinstance(v, list | dict | set):
        return True
    if isinstance(v, Tensor | nn.Module | type | Enum) or callable(v) or is_setting(v):
        return False
    return type(getattr(v, "__dict__", None)) is dict


def _is_data(v: Any) -> bool:
    """Whether v is numbers and texts in lists, dicts and sets: what `==` compares, and quickly."""
    if type(v) in (list, tuple, set):
        return all(map(_is_data, v))
    return v.__class__ in _PLAIN or (type(v) is dict and all(map(_is_data, [*v, *v.values()])))


def _state(v: Any, above: tuple[int, ...] = ()) -> Any:
    """What is in nested lists, dicts, sets and objects now, to compare with what is in them later."""
    if isinstance(v, Tensor):
        return id(v), None if isinstance(v, Released) or v.is_inference() else v._version
    if id(v) in above:
        return id(v)
    above = (*above, id(v))
    if type(v) in (list, tuple):
        return [_state(x, above) for x in v]
    if type(v) is dict:
        return {k: _state(x, above) for k, x in v.items()}
    if isinstance(v, list | dict | set):
        return copy.copy(v)
    return (id(v), _state(vars(v), above)) if _is_container(v) else v


def _equal(v: Any, was: Any) -> bool:
    try:
        return bool(v == was)
    except (RuntimeError, ValueError, TypeError):  # tensors in it, that are not the same objects any more
        return False


def _own(attributes: dict[str, Any]) -> list[str]:
    """The attributes that tell a module from a bare `nn.Module`: settings, state, plain tensors; at least two."""
    return [k for k in attributes if k not in STANDARD]


def _same(clone: tuple[Any, ...], theirs: Tensor, ours: Tensor) -> bool:
    return clone[0] is theirs and clone[1] == theirs._version and clone[2] is ours and clone[3] == ours._version
