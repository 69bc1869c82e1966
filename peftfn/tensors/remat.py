"""Rematerialisation under every transform of torch.func: time for memory, as jax.checkpoint trades them.

`torch.utils.checkpoint` saves memory by hooks on saved tensors, which torch.func refuses. A hand-written
`autograd.Function` whose backward calls `vjp(f)` is right and saves nothing: `torch.func.grad` runs every backward pass
so that it can be differentiated again, and what that pass computes anew stays in its graph. So here the backward pass
is a rematerialised function itself, and so is its own: at each order, inputs alone are kept.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import Function, forward_ad
from torch.func import jvp, vjp
from torch.utils._pytree import tree_flatten, tree_unflatten

from peftfn.tensors.transform import eager, under_transform

Flat = Callable[..., tuple[Tensor, ...]]
_TENSOR = object()


def remat(f: Callable[..., Any], *inputs: Tensor) -> Any:
    """Return f(*inputs), and keep nothing but the inputs for the backward pass, where f runs again.

    f must be a function of its inputs: whatever else it reads (modes, buffers) must be as it was when it runs again.
    Random numbers are drawn again as they were, and autocast is as it was. Any transform may be active: `grad`, `vjp`,
    `jvp`, `vmap`, in any nesting, and plain autograd.

    Args:
        f: tensors → a tree of tensors and of constants.
        inputs: every tensor that a transform may be over. The floating ones are differentiable.
    """
    if (
        max(_levels(TransformType.Jvp), forward_ad._current_level + 1) > 1
    ):  # torch gives a Function zero tangents of tangents, in silence
        return f(*inputs)
    shape: list[Any] = []

    def flat(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves, spec = tree_flatten(f(*inputs))
        shape[:] = spec, [_TENSOR if isinstance(v, Tensor) else v for v in leaves]
        given = {id(t) for t in inputs}  # autograd takes an output that is an input for a change in place
        return tuple(v.view_as(v) if id(v) in given else v for v in leaves if isinstance(v, Tensor))

    outputs = iter(_remat(flat if torch.compiler.is_compiling() else _Again(flat, inputs))(*inputs))
    spec, leaves = shape
    return tree_unflatten([next(outputs) if v is _TENSOR else v for v in leaves], spec)


def recomputed(f: Callable[..., Tensor], *inputs: Tensor, pull: Callable[..., Any] | None = None) -> Tensor:
    """f(*inputs), a large tensor made of small ones, whose intermediate results are made again in the backward pass.

    Plain where there is nothing to differentiate, and under a compiler, which itself decides what to keep.

    pull: (the gradient, *inputs) ↦ the gradients of the inputs, in operations that have gradients themselves. Where
        plain autograd is all there is, it saves a second run of f.
    """
    graded = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if torch.compiler.is_compiling() or not (graded or under_transform()):
        return f(*inputs)
    if pull is not None and eager(inputs[0]):
        return _Pulled.apply(f, pull, *inputs)  # type: ignore[no-any-return, no-untyped-call]
    return remat(f, *inputs)  # type: ignore[no-any-return]


class _Pulled(Function):
    """f, of which the inputs alone are kept, with its gradient."""

    @staticmethod
    def forward(ctx: Any, f: Any, pull: Any, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(*inputs)
        ctx.pull = pull
        return f(*inputs)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return None, None, *ctx.pull(g, *ctx.saved_tensors)


def _levels(kind: TransformType) -> int:
    """How many transforms of a kind are active, one around the other."""
    if torch.compiler.is_compiling():
        return 0
    return sum(i.key() == kind for i in torch._C._functorch.get_interpreter_stack() or ())


def _remat(f: Flat) -> Flat:
    """f, of which inputs alone are kept; the same holds for its derivatives."""

    class Rematerialised(Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            return f(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            ctx.save_for_backward(*inputs)
            ctx.save_for_forward(*inputs)
            ctx.mark_non_differentiable(*(t for t in output if not t.is_floating_point()))

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            at = [i for i, needed in enumerate(ctx.needs_input_grad) if needed and inputs[i].is_floating_point()]
            out: list[Tensor | None] = [None] * len(inputs)
            floats = [g for g in gradients if g is not None and g.is_floating_point()]

            def pull(*given: Tensor) -> tuple[Tensor, ...]:
                inputs, gradients = given[: len(out)], given[len(out) :]
                _, pulled = vjp(_floats(_at(f, inputs, at)), *[inputs[i] for i in at])  # type: ignore[misc]
                return pulled(gradients)  # type: ignore[no-any-return]

            for i, g in zip(at, _remat(pull)(*inputs, *floats) if at else (), strict=True):
                out[i] = g
            return tuple(out)

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            at = [i for i, t in enumerate(tangents) if t is not None and inputs[i].is_floating_point()]
            given, along = tuple(inputs[i] for i in at), tuple(tangents[i] for i in at)
            primals, out, *_ = jvp(_at(f, inputs, at), given, along)
            return tuple(t if y.is_floating_point() else None for y, t in zip(primals, out, strict=True))

    return Rematerialised.apply  # type: ignore[no-any-return]


def _at(f: Flat, inputs: tuple[Tensor, ...], at: list[int]) -> Flat:
    """f as a function of the inputs numbered `at`, the others being fixed."""

    def g(*some: Tensor) -> tuple[Tensor, ...]:
        new = list(inputs)
        for i, t in zip(at, some, strict=True):
            new[i] = t
        return f(*new)

    return g


def _floats(f: Flat) -> Flat:
    """The differentiable outputs of f."""
    return lambda *inputs: tuple(t for t in f(*inputs) if t.is_floating_point())


class _Again:
    """f, which from its second run on draws the random numbers of the first, under the autocast of the first."""

    def __init__(self, f: Flat, inputs: tuple[Tensor, ...]):
        self.f, self.first = f, True
        devices = dict.fromkeys(t.device for t in inputs if t.device.type not in ("cpu", "meta"))
        self.generators = [(torch.random.get_rng_state, torch.random.set_rng_state)]
        for d in devices:
            module = torch.get_device_module(d)
            self.generators.append((partial(module.get_rng_state, d), partial(module.set_rng_state, device=d)))
        kinds = {"cpu", *(d.type for d in devices)}
        self.autocast = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]
        self.cached = torch.is_autocast_cache_enabled()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.first:
            self.first, self.vmaps, self.states = False, _levels(TransformType.Vmap), self._states()
            out = self.f(*inputs)
            self.draws = not all(map(torch.equal, self.states, self._states()))
            return out
        if self.draws and _levels(TransformType.Vmap) != self.vmaps:
            raise RuntimeError(
                "a rematerialised layer draws random numbers (dropout), and its backward pass runs under a vmap that "
                "its forward pass was not under (jacrev, or vmap over vectors of a vjp), where the same numbers cannot "
                "be drawn again. Turn the dropout or the checkpointing off, or use jacfwd."
            )
        now = self._states()
        with ExitStack() as stack:
            for kind, dtype, on in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype, on, self.cached))
            self._set(self.states)
            try:
                return self.f(*inputs)
            finally:
                self._set(now)

    def _states(self) -> list[Tensor]:
        return [get() for get, _ in self.generators]

    def _set(self, states: list[Tensor]) -> None:
        for (_, put), state in zip(self.generators, states, strict=True):
            put(state)
