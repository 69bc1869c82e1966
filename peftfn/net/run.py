"""How a call runs: skeletons from a pool, their slots filled, the model called, the slots restored.

There is no other way to run a model with an adapter. `apply` is one plan with one adapter for all rows; `mixed` and
`gated` have a stack of adapters and gates; several nets are several plans in one call.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from peftfn.core.plan import Plan
from peftfn.model.model import weights_of
from peftfn.model.place import TOKENS, arguments_of
from peftfn.model.structure import check_copy
from peftfn.net.misplaced import misplaced
from peftfn.net.skeleton import Skeleton
from peftfn.net.wider import Before
from peftfn.slots import acting
from peftfn.slots.gates import Gates
from peftfn.slots.routed import checked, named, routed_by_default, routed_of
from peftfn.slots.tags import RowsLost
from peftfn.slots.track import Followed
from peftfn.slots.unrowed import check_output, mark
from peftfn.slots.values import Given, values
from peftfn.tensors.operand import dense
from peftfn.tensors.sequence import Steps
from peftfn.tensors.tree import stack_size, unstacked


class Runner:
    """Runs a model with adapters of some plans. Thread-safe: each call has a skeleton of its own."""

    def __init__(
        self,
        model: nn.Module,
        plans: Sequence[Plan],
        again: Sequence[str] = (),
        routed: Sequence[Sequence[str] | None] = (),
    ):
        """again: modules that are rematerialised. routed: for each plan the modules through which rows are followed;
        None: those around experts, and if that is not enough, the whole model."""
        self.model, self.plans, self.again = model, plans, again
        pairs = list(zip(plans, routed or [None] * len(plans), strict=True))
        found = [routed_by_default(model, plan) if names is None else names for plan, names in pairs]
        self.routed = list(dict.fromkeys(name for names in found for name in names))
        self._told = any(names is not None for _, names in pairs)
        self._wider: dict[tuple[str, ...], Runner] = {}  # more routed modules → what runs with them
        self._whole: dict[Any, Sequence[str]] = {}  # calls in which a site has lost its rows ↦ all modules
        self.slots = list(dict.fromkeys(slot for plan in plans for slot in plan.slots))
        at = [(s, plan[s.name].method) for plan in plans for s in plan.places]
        self.backbones = {s.name for s, _ in at if s.kind == TOKENS}
        self.settle = {s.name: [m for o, m in at if o.name == s.name] for s, _ in at}
        self.arguments = arguments_of(model)
        check_copy(model)
        self._idle: list[Skeleton] = []
        self._first: list[Skeleton] = []  # made when a call needs it: many nets are made to be asked, merged or saved
        self._running = _Running()

    @property
    def innermost(self) -> Skeleton | None:
        """The skeleton of the call that runs in this thread."""
        return self._running.calls[-1] if self._running.calls else None

    def run(
        self,
        given: Sequence[Given],
        gates: Gates | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        params: Mapping[str, Any] | None,
        method: str | None,
        owners: Mapping[str, Tensor] | None = None,
        known: bool = True,
    ) -> Any:
        """model(*args, **kwargs) with the adapters in it. gates: which of them act on which rows; None for one adapter.

        params: the caller's own parameters, by name. method: another method of the model to call. owners: routed module
        → the row of each position of its input. known: whether the adapters are known to fit their plans.
        """
        if gates is None and given[0].plan.gated:
            ids = acting.Ids(self.model, self.arguments, args, kwargs, method)
            gates = acting.alone(given[0].plan, ids, copies_of(self.model, method, args, kwargs))
        if gates is not None and self.routed and torch.compiler.is_compiling():
            return _uncompiled(self.run, given, gates, args, kwargs, params, method, owners)
        skeleton = self._acquire()
        if torch.compiler.is_compiling():
            if not known:
                given[0].plan.check(given[0].adapter)
            return self._call(skeleton, {}, given, gates, args, kwargs, params, method, owners)
        self._running.calls.append(skeleton)
        skeleton.lock.acquire()  # a recomputation of an earlier call may be running on it, in another thread
        try:
            skeleton.refresh()
            single = gates is None and not params
            kept = skeleton.kept(given[0], self.model.training) if single else {}
            if not (known or kept):
                given[0].plan.check(given[0].adapter)
            return self._call(skeleton, kept, given, gates, args, kwargs, params, method, owners)
        finally:
            skeleton.lock.release()
            self._running.calls.pop()
            self._idle.append(skeleton)

    def _call(
        self,
        skeleton: Skeleton,
        kept: Mapping[str, Any],
        given: Sequence[Given],
        gates: Gates | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        params: Mapping[str, Any] | None,
        method: str | None,
        owners: Mapping[str, Tensor] | None,
    ) -> Any:
        """`run` on a skeleton. kept: what stands in some of its slots already, from the call before."""
        traced = torch.compiler.is_compiling()
        if traced:
            skeleton.refresh()
        try:
            before = skeleton.open()
            versions = [] if traced else skeleton.versions()
            try:
                if params:
                    skeleton.put(params)
                if gates is not None:
                    steps = None if method is None else Steps()
                    gates = replace(gates, fixed=skeleton.identities(), steps=steps)
                    if self.routed:
                        gates = replace(gates, call=Followed(gates, owners or {}))
                    if gates.size is not None and not traced:
                        mark(skeleton.tables, gates)
                made = self._values(skeleton, kept, given, gates)
                skeleton.fill(made)
                call = skeleton.root if method is None else getattr(skeleton.root, method)
                with (
                    nullcontext() if gates is None else gates.during(skeleton.root),
                    nullcontext() if gates is None or gates.steps is None else gates.steps.during(skeleton.root),
                ):
                    out = call(*args, **kwargs)
                if not traced:
                    skeleton.check_in_place(made)
                    if gates is None and not params and not kept:
                        skeleton.keep(given[0], self.model.training, made)
                if gates is not None:
                    check_output(out)
            finally:
                skeleton.close(before)
            if versions and skeleton.versions() != versions:
                raise RuntimeError(
                    f"{', '.join(skeleton.written(versions))}: the model's own forward writes this parameter in "
                    "place, and so wrote the base's. Have it work on a copy, or pass copies as params=. (If you wrote "
                    "one of the methods: peftfn.testing.check_method tells whether a function of it does so.)"
                )
            return dense(out)
        except Exception as e:
            for plan, adapter, *_ in given:
                if problem := misplaced(plan, weights_of(self.model, plan.places), adapter, e):
                    raise ValueError(problem) from e
            raise

    def _values(
        self, skeleton: Skeleton, kept: Mapping[str, Any], given: Sequence[Given], gates: Gates | None
    ) -> Mapping[str, Any]:
        """What stands in the slots of the call."""
        make = partial(values, given, gates, skeleton.__getitem__, self.model.training)
        if not kept:
            return make(but=skeleton.loading.wait(make))
        return {**kept, **make(but=kept)} if len(kept) < len(given[0].plan) else kept

    def batch(
        self,
        gates_of: Callable[..., Gates],
        stacks: Sequence[Mapping[str, Any]],
        gates: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        params: Mapping[str, Any] | None,
        method: str | None,
        common: Sequence[str] | None,
        owners: Mapping[str, Any] | None = None,
    ) -> Any:
        """`run` with a stack of adapters of each plan, and gates over all of them. gates_of: what makes them of what
        the caller gave."""
        given, count = [], 0
        for plan, stacked in zip(self.plans, stacks, strict=True):
            plan.check(stacked, lead=1)
            given.append(Given(plan, stacked, count, stack_size(stacked)))
            count += given[-1].size
        inputs = ((), {}) if owners and "" in owners else (args, kwargs)  # which say nothing about rows then
        made = gates_of(gates, count, inputs, copies_of(self.model, method, args, kwargs), method is not None)
        runner = self if self._told or not owners else self._with(named(self.model, owners))
        held = checked(owners, made, runner.routed) if owners else None
        made = made.bound(common, dict.fromkeys(name for plan in self.plans for name in plan))
        k = made.only
        part = None if k is None else next(part for part in given if k < part.start + part.size)
        if k is None or part is None or (made.by_token and part.plan.gated):
            if any(plan.gated for plan in self.plans):
                ids = acting.Ids(self.model, self.arguments, args, kwargs, method)
                made = acting.joined(made, [(part.plan, part.start, part.size) for part in given], ids)
            return runner._followed(given, made, args, kwargs, params, method, held)
        plan, stacked, start, _ = part
        alone = Given(plan, unstacked(stacked, k - start))  # it is `apply`, and costs as little
        return self.run([alone], None, args, kwargs, params, method)

    def _followed(
        self,
        given: Sequence[Given],
        gates: Gates,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        params: Mapping[str, Any] | None,
        method: str | None,
        owners: Mapping[str, Tensor] | None,
    ) -> Any:
        """`run`. If a site loses its rows and nobody said which modules move them, the call runs once more with rows
        followed through the whole model, and so do later ones of that method."""
        call = method, gates.common is None
        if call in self._whole:
            return self._with(self._whole[call]).run(given, gates, args, kwargs, params, method, owners)
        if self._told or torch.compiler.is_compiling():
            return self.run(given, gates, args, kwargs, params, method, owners)
        before = Before(args, kwargs)
        try:
            return self.run(given, gates, args, kwargs, params, method, owners)
        except RowsLost as e:
            whole = routed_of(self.model, [""])
            if (wider := self._with(whole)) is self or not before.again():
                raise
            try:
                out = wider.run(given, gates, args, kwargs, params, method, owners)
            except RowsLost as more:
                raise RowsLost(f"{e.text} Followed through the whole model, they are lost too: {more}") from more
        self._whole[call] = whole
        return out

    def _with(self, modules: Sequence[str]) -> "Runner":
        """What runs with these modules routed too."""
        key = tuple(name for name in dict.fromkeys(modules) if name not in self.routed)
        if not key:
            return self
        if key not in self._wider:
            wider = Runner(self.model, self.plans, self.again, [[*self.routed, *key]] * len(self.plans))
            wider._told, wider._running = False, self._running
            self._wider.setdefault(key, wider)
        return self._wider[key]

    def _acquire(self) -> Skeleton:
        if torch.compiler.is_compiling():
            self._make_first()
            return self._first[0]  # traced code leaves a skeleton as it found it, so all traces can have the same
        try:
            return self._idle.pop()
        except IndexError:
            return self._skeleton()

    def _make_first(self) -> None:
        if not self._first:
            self._first.append(self._skeleton())

    # While compiling it runs as it is, before the trace (see `Skeleton._take_hooks`).
    _make_first._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _skeleton(self) -> Skeleton:
        return Skeleton(self.model, self.slots, self.backbones, self.again, self.routed, self.settle)


def copies_of(model: nn.Module, method: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """How often `generate` repeats each row of its inputs: for beams, or for several sampled sequences."""
    if method != "generate":
        return 1
    given = kwargs.get("generation_config") or next((a for a in args if hasattr(a, "num_beams")), None)
    config = given or getattr(model, "generation_config", None)
    counts = (kwargs.get(k, getattr(config, k, 1)) for k in ("num_beams", "num_return_sequences"))
    return max(n or 1 for n in counts)


@_disable_dynamo
def _uncompiled(run: Callable[..., Any], *args: Any) -> Any:
    """A call that follows rows through modules: the compiler leaves it as it is, whole. (fullgraph=True says so.)"""
    return run(*args)


class _Running(threading.local):
    """The skeletons of the calls that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.calls: list[Skeleton] = []
