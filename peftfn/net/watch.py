"""What a base and its copy held when the copy was made, to see in one pass whether anything is not as it was."""

import copy
import operator
from collections.abc import Iterator, Sequence
from enum import Enum
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peftfn.model.structure import HOOKS, STANDARD, is_setting
from peftfn.net.released import Released

HOOKED = ("_hf_hook", "_diffusers_hook")  # where accelerate's and diffusers' hooks are, which change in each call
PLAIN = (bool, int, float, str, type(None))


class Watch:
    """Watches over the modules of a base and of its copy.

    pairs: (module, its copy). loose: parameters that the base keeps in lists and objects, each with what stands for it
    in the copy.
    """

    def __init__(self, pairs: Sequence[tuple[nn.Module, nn.Module]], loose: Sequence[tuple[Tensor, Any]]):
        self.loose = loose
        own = [[k for k in _own(vars(b)) if k in vars(s)] for b, s in pairs]
        watched = [(operator.itemgetter(*keys), vars(m)) for pair, keys in zip(pairs, own, strict=True) for m in pair]
        self.getters, self.dicts = zip(*watched, strict=True)
        theirs = [b._modules for b, _ in pairs]
        self.links = [(children, k, child) for children in theirs for k, child in children.items()]
        self.children = [*theirs, *(s._modules for _, s in pairs)]
        tensors = [d for pair in pairs for m in pair for d in (m._parameters, m._buffers)]
        self.named = [*self.children, *tensors]
        ours: list[tuple[dict[str, Any], ...]] = [(vars(s), s._modules, s._parameters, s._buffers) for _, s in pairs]
        self.initial = [(d, dict(d)) for attributes, modules, _, _ in ours for d in (attributes, modules)]
        self.places = [(d, list(d)) for _, _, *slots in ours for d in slots]
        hooks = [(vars(m), k) for pair in pairs for m in pair for k in HOOKS if k in vars(m)]
        self.unhooked = [d[k] for d, k in hooks if not d[k]]
        self.hooked = [(d, k, dict(d[k])) for d, k in hooks if d[k]]
        self.handles = RemovableHandle.next_id
        held = [(vars(m), k) for pair, keys in zip(pairs, own, strict=True) for m in pair for k in keys]
        held = [(d, k) for d, k in held if k not in HOOKED and _is_container(d[k])]
        self.data = [(d, k, copy.deepcopy(d[k])) for d, k in held if _is_data(d[k])]
        self.containers = [(d, k, _state(d[k])) for d, k in held if not _is_data(d[k])]
        self.seen = tuple(self._values())
        self.keys, self.size = list(chain.from_iterable(self.named)), sum(map(len, self.dicts))

    def same(self) -> bool:
        """Whether nothing was changed: no structure, hook or attribute."""
        if not (self._same_structure() and self._same_hooks()):
            return False
        return not any(map(operator.is_not, self._values(), self.seen))

    def alike(self) -> bool:
        """Whether nothing was changed but hooks and attributes that are plain values."""
        return self._same_structure() and all(
            v is old or v.__class__ in PLAIN for v, old in zip(self._values(), self.seen, strict=True)
        )

    def clear(self) -> None:
        """Take away what a forward pass left behind in the copy."""
        for ours, before in self.initial:
            ours.clear()
            ours.update(before)
        for slots, names in self.places:
            kept = {k: slots.get(k) for k in names}
            slots.clear()
            slots.update(kept)

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


def _own(attributes: dict[str, Any]) -> list[str]:
    """The attributes that tell a module from a bare `nn.Module`: settings, state, plain tensors; at least two."""
    return [k for k in attributes if k not in STANDARD]


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
    return v.__class__ in PLAIN or (type(v) is dict and all(map(_is_data, [*v, *v.values()])))


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
