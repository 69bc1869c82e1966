"""Checkpointed layers of a skeleton: they run again in the backward pass, with the tensors of their own call."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peftfn.net.again import rematerialised
from peftfn.slots import track
from peftfn.slots.call import Call
from peftfn.slots.slot import Slot
from peftfn.tensors.transform import backward_task, under_transform

CHECKPOINT = "_gradient_checkpointing_func"  # where transformers' layers keep their torch.utils.checkpoint
Held = tuple[list[Any], list[Any]]  # (what the slots hold, the forwards of the layers in the fast lane)


class Filled(Protocol):
    """What this needs of a skeleton."""

    lock: Any
    root: nn.Module
    slots: dict[str, tuple[MutableMapping[str, Any], str]]

    def snapshot(self) -> Held: ...
    def restore(self, held: Held) -> None: ...
    def fill(self, values: Mapping[str, Any]) -> None: ...
    def __getitem__(self, name: str) -> Any: ...


class Recompute:
    """The checkpoint functions of one skeleton."""

    def __init__(self, skeleton: Filled):
        self.skeleton = skeleton
        self.inside: dict[int, list[str]] = {}  # module → its slots, where it is rematerialised

    def install(self, copies: Sequence[nn.Module], again: Sequence[str]) -> None:
        """In the layers that transformers checkpoints, and in the modules named in `again`."""
        for s in copies:
            if CHECKPOINT in vars(s):
                vars(s)[CHECKPOINT] = partial(self._checkpoint, vars(s)[CHECKPOINT])
        for name in again:
            layer = self.skeleton.root.get_submodule(name)
            vars(layer)["forward"] = partial(self._checkpoint, None, _method(layer, layer.forward))

    def context(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Around a checkpointed forward pass, and around its recomputation."""
        return nullcontext(), self._holding(self.skeleton.snapshot())

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
            return rematerialised(run, args, kwargs, self._slots_of, partial(self._filled, self.skeleton.snapshot()))
        options = {
            k: v for k, v in getattr(original, "keywords", {}).items() if k not in ("use_reentrant", "context_fn")
        }
        return checkpoint(run, *args, use_reentrant=False, context_fn=self.context, **options, **kwargs)

    @contextmanager
    def _holding(self, held: Held) -> Iterator[None]:
        with self.skeleton.lock:
            before = self.skeleton.snapshot()
            self.skeleton.restore(held)
            tasks = [(v, v.task) for v in held[0] if isinstance(v, Slot | Call)]
            for v, _ in tasks:
                v.task = backward_task()
            try:
                yield
            finally:
                self.skeleton.restore(before)
                for v, task in tasks:
                    v.task = task

    @contextmanager
    def _filled(self, held: Held, values: Mapping[str, Any]) -> Iterator[None]:
        """While it lasts, the slots have what they had in a call, with other values in some of them."""
        with self._holding(held):
            self.skeleton.fill(values)
            yield

    def _slots_of(self, layer: nn.Module) -> dict[str, Any]:
        """What the slots of a layer and its parts hold, by one name of each."""
        if id(layer) not in self.inside:
            prefix = next(f"{n}." if n else "" for n, m in self.skeleton.root.named_modules() if m is layer)
            names = {(id(slots), k): n for n, (slots, k) in self.skeleton.slots.items() if n.startswith(prefix)}
            self.inside[id(layer)] = list(names.values())
        return {n: self.skeleton[n] for n in self.inside[id(layer)]}


def _method(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward that a layer has, which may be a function that somebody put there, as a method of the layer."""
    return MethodType(lambda _, *args, **kwargs: forward(*args, **kwargs), layer)
