"""A private copy of a model's Python structure that shares its parameters: the only thing a call ever touches.

The base is an argument, never a patient. A call runs on a skeleton, whose parameter slots are filled from the base at
the start of the call and restored at its end; whatever a forward pass writes (a BatchNorm's statistics, an attribute)
it writes there. One skeleton serves one call at a time, so threads cannot collide.
"""

import copy
import operator
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from peftfn.plan import near
from peftfn.transform import under_transform

Slot = tuple[MutableMapping[str, Any], MutableMapping[str, Any], str]  # (the base's dict, the skeleton's, key)
_CHECKPOINT = "_gradient_checkpointing_func"  # where transformers' layers keep their torch.utils.checkpoint
_PLAIN = (bool, int, float, str, type(None))


class Skeleton:
    """One copy of `base`, with the slots named in `sites` to be filled by the caller."""

    def __init__(self, base: nn.Module, sites: list[str]):
        self.base, self.sites, self.lock = base, sites, RLock()
        self._build()

    def _build(self) -> None:
        base = list(self.base.modules())
        self.root = _copy(self.base)
        self.pairs = list(zip(base, self.root.modules(), strict=True))
        self.parameters: list[Slot] = [(b._parameters, s._parameters, k) for b, s in self.pairs for k in b._parameters]
        self.buffers: list[Slot] = [
            (b._buffers, s._buffers, k) for b, s in self.pairs for k, t in b._buffers.items() if t is not None
        ]
        self.buffers += [
            (vars(b), vars(s), k) for b, s in self.pairs for k, t in vars(b).items() if isinstance(t, Tensor)
        ]
        self.clones: list[tuple[Any, ...]] = [(None, 0, None, 0)] * len(self.buffers)
        self.renormed: list[MutableMapping[str, Any]] = [
            s._parameters for _, s in self.pairs if getattr(s, "max_norm", None) is not None
        ]
        self.flags = [(b, s, [k for k, v in vars(b).items() if isinstance(v, bool | float)]) for b, s in self.pairs]
        modules = dict(self.root.named_modules(remove_duplicate=False))
        self.slots: dict[str, tuple[MutableMapping[str, Any], str]] = {
            n: (m._parameters, k) for p, m in modules.items() for k in m._parameters for n in [f"{p}.{k}" if p else k]
        }
        self.originals: dict[int, Mapping[str, Any]] = {id(s._parameters): b._parameters for b, s in self.pairs}
        for name in self.sites:
            slots, k = self.slots[name]
            slots[k] = _Released.of(name)
        for _, s in self.pairs:
            if _CHECKPOINT in vars(s):
                vars(s)[_CHECKPOINT] = partial(self._checkpoint, vars(s)[_CHECKPOINT])
        self._watch()

    # Freshness: what the owner did to the base between calls is seen by the next one.

    def _watch(self) -> None:
        """Note what the modules of base and skeleton hold, to see in one pass whether anything is not as it was."""
        own = [_own(vars(b)) for b, _ in self.pairs]
        watched = [
            (operator.itemgetter(*keys), vars(m)) for pair, keys in zip(self.pairs, own, strict=True) for m in pair
        ]
        self.getters, self.dicts = zip(*watched, strict=True)
        self.counted = [d for b, s in self.pairs for d in (vars(b), vars(s), b._modules, b._parameters, b._buffers)]
        self.initial = [(vars(s), dict(vars(s))) for _, s in self.pairs]
        self.seen, self.size = tuple(self._now()), sum(map(len, self.counted))

    def _now(self) -> Iterator[Any]:
        yield from chain.from_iterable(map(operator.call, self.getters, self.dicts))
        yield from chain.from_iterable(b._modules.values() for b, _ in self.pairs)

    def refresh(self) -> None:
        """Take over modes and plain attributes of the base; copy a base of changed structure anew."""
        if torch.compiler.is_compiling():  # the reads are what the compiled code is guarded by
            for b, s, names in self.flags:
                for name in names:
                    if getattr(s, name) != getattr(b, name):
                        setattr(s, name, getattr(b, name))
            return
        if sum(map(len, self.counted)) == self.size and not any(map(operator.is_not, self._now(), self.seen)):
            return
        for ours, before in self.initial:  # what a forward pass left behind
            ours.clear()
            ours.update(before)
        same = sum(map(len, self.counted)) == self.size
        if not same or any(
            v is not old and v.__class__ not in _PLAIN for v, old in zip(self._now(), self.seen, strict=True)
        ):
            self._build()
            return
        for b, s in self.pairs:
            theirs, ours = vars(b), vars(s)
            ours.update({k: v for k, v in theirs.items() if v.__class__ in _PLAIN})
        self._watch()

    # A call: fill the slots, run, restore.

    def open(self) -> list[Any]:
        """Fill every slot from the base, and tell what they held. Parameters come detached: the base is no input."""
        if not torch.compiler.is_compiling():
            self.lock.acquire()
        before = self.snapshot()
        for theirs, ours, k in self.parameters:
            p = theirs[k]
            ours[k] = p.detach() if p is not None and p.requires_grad else p
        for slots in self.renormed:  # F.embedding would renormalise the base's rows in place
            if slots["weight"] is not None:
                slots["weight"] = slots["weight"].clone()
        self._fill_buffers()
        return before

    def close(self, before: list[Any]) -> None:
        self.restore(before)
        if not torch.compiler.is_compiling():
            self.lock.release()

    def __getitem__(self, name: str) -> Any:
        slots, k = self.slots[name]
        return slots[k]

    def __setitem__(self, name: str, value: Any) -> None:
        slots, k = self.slots[name]
        slots[k] = value

    def names(self, name: str) -> list[str]:
        """Every name of the slot `name`: a shared submodule has several."""
        slots, k = self.slots[name]
        return [n for n, (others, key) in self.slots.items() if others is slots and key == k]

    def put(self, params: Mapping[str, Tensor]) -> None:
        """Fill slots with the caller's own parameters; one name of a tied tensor stands for all that are not named."""
        tied = {}
        for name, p in params.items():
            if name not in self.slots:
                raise KeyError(f"params has {name!r}, which is no parameter of the model{near(name, list(self.slots))}")
            slots, k = self.slots[name]
            theirs = self.originals[id(slots)][k]
            tied[id(theirs)] = p
            slots[k] = p
        given = {(id(self.slots[name][0]), self.slots[name][1]) for name in params}
        for theirs, ours, k in self.parameters:
            if id(theirs[k]) in tied and theirs[k] is not None and (id(ours), k) not in given:
                ours[k] = tied[id(theirs[k])]

    def snapshot(self) -> list[Any]:
        """What all slots hold (buffers only while compiling: eager calls leave theirs for the next to check)."""
        buffers = self.buffers if torch.compiler.is_compiling() else []
        return [ours[k] for _, ours, k in self.parameters + buffers]

    def restore(self, values: list[Any]) -> None:
        for (_, ours, k), value in zip(self.parameters + self.buffers, values, strict=False):
            ours[k] = value

    def _fill_buffers(self) -> None:
        """A copy of each buffer that changed since it was last copied, in the base or by an earlier call."""
        for i, (theirs, ours, k) in enumerate(self.buffers):
            t = theirs[k]
            if torch.compiler.is_compiling() or t.is_inference():
                ours[k] = t.clone()
            elif not _same(self.clones[i], t, ours[k]):
                ours[k] = t.detach().clone()
                self.clones[i] = (t, t._version, ours[k], ours[k]._version)

    @contextmanager
    def _holding(self, values: list[Any]) -> Iterator[None]:
        with self.lock:
            before = self.snapshot()
            self.restore(values)
            try:
                yield
            finally:
                self.restore(before)

    def _checkpoint(self, original: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Gradient checkpointing whose recomputation, which comes in backward, sees the tensors of this very call."""
        if under_transform():  # torch.func differentiates without saved-tensor hooks: nothing to save, nothing to redo
            return run(*args, **kwargs)
        options = {
            k: v for k, v in getattr(original, "keywords", {}).items() if k not in ("use_reentrant", "context_fn")
        }
        values = self.snapshot()
        contexts = lambda: (nullcontext(), self._holding(values))  # noqa: E731
        return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **options, **kwargs)


_STANDARD = frozenset(vars(nn.Module())) - {"training", "_is_full_backward_hook"}


def _own(attributes: dict[str, Any]) -> list[str]:
    """The attributes that tell a module from a bare `nn.Module`: settings, state, plain tensors; at least two."""
    return [k for k in attributes if k not in _STANDARD]


class _Released(Tensor):
    """Stands in an adapted slot between calls: whatever computes with it has outlived its call.

    An empty tensor on the meta device rather than any object, because the compiler takes stock of all parameters.
    """

    site: str

    @staticmethod
    def of(name: str) -> "_Released":
        t = torch.empty(0, device="meta").as_subclass(_Released)
        t.site = name
        return t

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _LOOKS or torch.compiler.is_compiling():
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        name = next(
            (t.site for t in [*args, *(kwargs or {}).values()] if isinstance(t, _Released)), "an adapted weight"
        )
        raise RuntimeError(
            f"{name}: used after its call was over. torch.utils.checkpoint recomputes during backward, when the "
            "adapter has left the model again: turn checkpointing on with the model's gradient_checkpointing_enable(), "
            "which peftfn follows, or wrap the whole of net.apply in torch.utils.checkpoint."
        )


_LOOKS = frozenset(
    ["__get__", "__set__", "size", "stride", "dim", "storage_offset", "is_floating_point", "is_complex", "numel"]
)


def _same(clone: tuple[Any, ...], theirs: Tensor, ours: Tensor) -> bool:
    return clone[0] is theirs and clone[1] == theirs._version and clone[2] is ours and clone[3] == ours._version


def _shared(module: nn.Module) -> Iterator[Any]:
    """What a copy shares with its original: tensors, hooks (they are the owner's) and settings."""
    yield from (t for t in module._parameters.values() if t is not None)
    yield from (t for t in module._buffers.values() if t is not None)
    for name, value in vars(module).items():
        if (
            isinstance(value, Tensor)
            or name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
            or type(value).__name__.endswith("Config")
        ):
            yield value


def _copy(model: nn.Module) -> nn.Module:
    keep = [value for module in model.modules() for value in _shared(module)]
    try:
        return copy.deepcopy(model, {id(value): value for value in keep})
    except Exception as e:
        raise TypeError(
            f"the model cannot be copied, and calls run on a copy of its structure: {_culprit(model, keep)} raises "
            f"{type(e).__name__}: {e}. Keep such objects out of the module, or give their class a __deepcopy__."
        ) from e


def _culprit(model: nn.Module, keep: list[Any]) -> str:
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers", "_modules"):
                continue
            try:
                copy.deepcopy(value, {id(v): v for v in [*keep, *model.modules()]})
            except Exception:
                return f"{name}.{key}" if name else key
    return type(model).__name__
