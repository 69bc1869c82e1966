"""How a call runs: skeletons from a pool, their slots filled, the model called, the slots restored.

There is no other way to run a model with an adapter. `apply` is one plan with one adapter for all rows; `mixed` and
`gated` have a stack of adapters and gates; several nets are several plans in one call.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftfn.core.plan import Plan
from peftfn.model.model import weights_of
from peftfn.model.place import TOKENS, arguments_of
from peftfn.model.structure import check_copy
from peftfn.net.misplaced import misplaced
from peftfn.net.skeleton import Skeleton
from peftfn.net.wider import Wider
from peftfn.slots import acting
from peftfn.slots.gates import Gates
from peftfn.slots.keeper import NOTHING, Made
from peftfn.slots.routed import checked, named, routed_by_default
from peftfn.slots.track import Followed
from peftfn.slots.unrowed import check_output, mark
from peftfn.slots.values import Given, values
from peftfn.tensors.operand import dense
from peftfn.tensors.sequence import Steps
from peftfn.tensors.tree import stack_size, unstacked


class Asked(NamedTuple):
    """A call of the model: what it is called with, and the adapters and gates in it.

    gates: which adapters act on which rows; None for one adapter. params: the caller's own parameters, by name. method:
    another method of the model to call. owners: routed module → the row of each position of its input.
    """

    given: Sequence[Given]
    gates: Gates | None
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    params: Mapping[str, Any] | None = None
    method: str | None = None
    owners: Mapping[str, Tensor] = MappingProxyType({})


class Runner:
    """Runs a model with adapters of some plans. Thread-safe: each call has a skeleton of its own.

    plans: of the nets. again: modules that are rematerialised. routed: modules through which rows are followed.
    """

    def __init__(self, model: nn.Module, plans: Sequence[Plan], again: Sequence[str], routed: Sequence[str]):
        self.model, self.plans, self.again, self.routed = model, plans, again, routed
        self.slots = list(dict.fromkeys(slot for plan in plans for slot in plan.slots))
        at = [(s, plan[s.name].method) for plan in plans for s in plan.places]
        self.backbones = {s.name for s, _ in at if s.kind == TOKENS}
        self.settle = {s.name: [m for o, m in at if o.name == s.name] for s, _ in at}
        self.arguments = arguments_of(model)
        check_copy(model)
        self._idle: list[Skeleton] = []
        self._first: list[Skeleton] = []  # made when a call needs it: many nets are made to be asked, merged or saved
        self._aside: list[Callable[..., Any]] = []  # `run`, which the compiler leaves as it is; made when it is met
        self._running = _Running()
        self.wider = Wider(self)

    @classmethod
    def of(
        cls, model: nn.Module, plans: Sequence[Plan], again: Sequence[str], routed: Sequence[Sequence[str] | None]
    ) -> "Runner":
        """The runner of some nets. routed: for each plan the modules through which rows are followed; None: those
        around experts, and if that is not enough, the whole model."""
        pairs = list(zip(plans, routed, strict=True))
        found = [routed_by_default(model, plan) if names is None else names for plan, names in pairs]
        runner = cls(model, plans, again, list(dict.fromkeys(name for names in found for name in names)))
        runner.wider.told = any(names is not None for _, names in pairs)
        return runner

    def routing(self, more: Sequence[str]) -> "Runner":
        """The same with more routed modules."""
        runner = Runner(self.model, self.plans, self.again, [*self.routed, *more])
        runner._running = self._running
        return runner

    @property
    def innermost(self) -> Skeleton | None:
        """The skeleton of the call that runs in this thread."""
        return self._running.calls[-1] if self._running.calls else None

    def run(self, call: Asked, known: bool = True) -> Any:
        """The model's output. known: whether the adapters are known to fit their plans."""
        plan = call.given[0].plan
        if "adapter_names" in call.kwargs and "adapter_names" not in self.arguments:  # **kwargs would swallow it
            raise TypeError(
                "adapter_names is PEFT's: write net.mixed(peftfn.stack([a, b]), [0, 1, …], …), with an adapter a row, "
                "or peftfn.bank(…).apply(names, …)"
            )
        if call.gates is None and plan.gated:
            ids = acting.Ids(self.model, self.arguments, call.args, call.kwargs, call.method)
            copies = copies_of(self.model, call.method, call.args, call.kwargs)
            call = call._replace(gates=acting.alone(plan, ids, copies))
        if torch.compiler.is_compiling():
            if call.gates is not None and self.routed:
                self._make_aside()
                return self._aside[0](call, known)
            if not known:
                plan.check(call.given[0].adapter)
            skeleton = self._acquire()
            skeleton.refresh()
            return self._call(skeleton, NOTHING, call)
        skeleton = self._acquire()
        self._running.calls.append(skeleton)
        skeleton.lock.acquire()  # a recomputation of an earlier call may be running on it, in another thread
        try:
            skeleton.refresh()
            single = call.gates is None and not call.params
            kept = skeleton.kept(call.given, None, self.model.training) if single else NOTHING
            if not (known or kept.values):
                plan.check(call.given[0].adapter)
            return self._call(skeleton, kept, call)
        finally:
            skeleton.lock.release()
            self._running.calls.pop()
            self._idle.append(skeleton)

    def _call(self, skeleton: Skeleton, kept: Made, call: Asked) -> Any:
        """`run` on a skeleton. kept: what stands in some of its slots already, from the call before."""
        traced, gates = torch.compiler.is_compiling(), call.gates
        try:
            before = skeleton.open()
            versions = [] if traced else skeleton.versions()
            try:
                if call.params:
                    skeleton.put(call.params)
                if gates is not None:
                    gates = self._bound(skeleton, gates, call)
                    if not (traced or call.params):
                        kept = skeleton.kept(call.given, gates, self.model.training)
                made = kept.values if kept.whole else self._values(skeleton, kept.values, call.given, gates)
                skeleton.fill(made)
                function = skeleton.root if call.method is None else getattr(skeleton.root, call.method)
                with nullcontext() if gates is None else gates.during(skeleton.root):
                    out = function(*call.args, **call.kwargs)
                if not traced:
                    skeleton.check_in_place(made)
                    if not (kept.values or call.params):
                        skeleton.keep(call.given, gates, self.model.training, made)
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
            for plan, adapter, *_ in call.given:
                if problem := misplaced(plan, weights_of(self.model, plan.places), adapter, e):
                    raise ValueError(problem) from e
            raise

    def _bound(self, skeleton: Skeleton, gates: Gates, call: Asked) -> Gates:
        """The gates of a call, with what they know of its skeleton."""
        gates = replace(gates, fixed=skeleton.identities(), steps=None if call.method is None else Steps())
        if self.routed:
            gates = replace(gates, call=Followed(gates, call.owners))
        if gates.size is not None and not torch.compiler.is_compiling():
            mark(skeleton.tables, gates)
        return gates

    def _values(
        self, skeleton: Skeleton, kept: Mapping[str, Any], given: Sequence[Given], gates: Gates | None
    ) -> Mapping[str, Any]:
        """What stands in the slots of the call."""
        make = partial(values, given, gates, skeleton.__getitem__, self.model.training)
        if not kept:
            return make(but=skeleton.loading.wait(make))
        return {**kept, **make(but=kept)}

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
            given.append(self._given(plan, stacked, count))
            count += given[-1].size
        inputs = ((), {}) if owners and "" in owners else (args, kwargs)  # which say nothing about rows then
        made = gates_of(gates, count, inputs, copies_of(self.model, method, args, kwargs), method is not None)
        runner = self if self.wider.told or not owners else self.wider.routing(named(self.model, owners))
        held = checked(owners, made, runner.routed) if owners else {}
        made = made.bound(common, dict.fromkeys(name for plan in self.plans for name in plan))
        k = made.only
        part = None if k is None else next(part for part in given if k < part.start + part.size)
        if k is None or part is None or (made.by_token and part.plan.gated):
            if any(plan.gated for plan in self.plans):
                ids = acting.Ids(self.model, self.arguments, args, kwargs, method)
                made = acting.joined(made, [(part.plan, part.start, part.size) for part in given], ids)
            return runner.wider.run(Asked(given, made, args, kwargs, params, method, held))
        i, last = k - part.start, self._last
        adapter = unstacked(part.adapter, i) if last is None else last.views.take(part, i)
        alone = Given(part.plan, adapter)  # it is `apply`, and costs as little
        return self.run(Asked([alone], None, args, kwargs, params, method))

    def _given(self, plan: Plan, stacked: Mapping[str, Any], start: int) -> Given:
        """A plan's stack in a call. ValueError if it does not fit the plan."""
        for keeper in () if (last := self._last) is None else (last.mixed_keeper, last.views):
            if (known := keeper.known(plan, stacked)) is not None:
                return Given(plan, stacked, start, known.size, known.seen)
        plan.check(stacked, lead=1)
        return Given(plan, stacked, start, stack_size(stacked))

    @property
    def _last(self) -> Skeleton | None:
        """The skeleton of the last call, which the next one will have as a rule; None while compiling."""
        idle = [] if torch.compiler.is_compiling() else self._idle[-1:]
        return idle[0] if idle else None

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

    def _make_aside(self) -> None:
        if not self._aside:
            some = ", ".join(name or "the model" for name in self.routed[:2])
            more = f" and {len(self.routed) - 2} more" if len(self.routed) > 2 else ""
            self._aside.append(
                torch.compiler.disable(
                    self.run,
                    reason=f"a mixed batch follows its rows through the routed modules {some}{more}, which cannot be "
                    "traced, so this call runs uncompiled. Leave out fullgraph=True, or leave the sites in these "
                    "modules out of the rules",
                )
            )

    # While compiling these run as they are, before the trace (see `Skeleton._take_hooks`).
    _make_first._dynamo_marked_constant = _make_aside._dynamo_marked_constant = True  # type: ignore[attr-defined]

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


class _Running(threading.local):
    """The skeletons of the calls that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.calls: list[Skeleton] = []
