"""adapt: rules on a model → a net, whose functions take the adapter as an argument. The only file that runs a model."""

import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.distributed import UNTIED, equal, misplaced, on_mesh
from peftfn.gated import Gates
from peftfn.many import stack_size
from peftfn.method import Method
from peftfn.mixed import MixedWeight
from peftfn.part import Part
from peftfn.plan import Adapter, Entry, Plan, draw, make, prepared, wide
from peftfn.quantised import QuantisedWeight, parameters
from peftfn.rng import Rng
from peftfn.route import Route, Rows
from peftfn.skeleton import Skeleton
from peftfn.transform import moment, under_transform
from peftfn.weight import AdaptedWeight, dense


def adapt(model: nn.Module, rules: Mapping[str, Method], *, seed: int = 0) -> "Adapted":
    """Bind methods to the parameters of a model, without changing it.

    Args:
        model: any module; its parameters stay its own, and are seen as they are at each call.
        rules: name pattern → method, in order; for each parameter the first rule counts that matches its name and
            whose method accepts its kind. A pattern of word characters and dots matches whole dotted components
            ("q_proj" finds "layers.0.q_proj.weight", never "q_proj_norm"); any other is a regular expression, searched
            in the name.
        seed: of the methods' frozen tensors (VeRA's projections, say); trainable ones get theirs in `init`.

    Raises:
        ValueError: a rule that finds nothing its method accepts, or sizes that do not fit; with the site, the value,
            the constraint and the cure. Nothing of size has been allocated then. Or a layer whose weights accelerate
            keeps elsewhere between calls (offload).
        TypeError: the model cannot be deep-copied.
    """
    return Adapted(model, make(model, rules, seed))


class Adapted:
    """A plan bound to a model. All its functions are pure: tensors in, tensors out, the model untouched."""

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.plan = model, plan
        self._biases = {name: e.site.bias for name, e in plan.items() if e.site.bias and e.changes_bias}
        self._slots = list(dict.fromkeys([*plan, *self._biases.values()]))
        self._first = Skeleton(model, self._slots)
        self._idle = [self._first]
        self._running = _Running()
        # what delta, merge and prepare are about, and eval mode: no dropout
        self._meant = {n: replace(e, method=e.method.eval()) for n, e in plan.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        return Adapted, (self.model, self.plan)

    def __repr__(self) -> str:
        rules = ", ".join(f"{pattern!r}: {method}" for pattern, method in self.plan.rules.items())
        return f"adapt({type(self.model).__name__}, {{{rules}}})  # {len(self.plan)} sites"

    def init(self, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """A fresh adapter: {site: {name: tensor}}, each on its weight's device.

        A site's values depend on (seed, site name) alone, not on what else is adapted.
        """
        weights = self._weights()
        adapter: Adapter = {
            n: draw(e.method.init, e.site, weights[n], seed, dtype, e.frozen, weights.get(e.site.bias or ""))
            for n, e in self.plan.items()
        }
        for bank in self.plan.banks:
            mine = {n: e.site.canonical(weights[n]) for n, e in self.plan.items() if e.bank == bank}
            first = next(iter(mine))
            sites = {n: e.site for n, e in self.plan.items()}
            rng = Rng(seed, bank, sites=sites, dtype=dtype, device=weights[first].device)
            adapter[bank] = {k: on_mesh(t, weights[first]) for k, t in self.plan[first].method.bank(rng, mine).items()}
        return adapter

    def apply(
        self,
        adapter: Mapping[str, Any],
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """The adapted model, called as the model is called: model(*args, **kwargs) with `adapter` in it.

        Args:
            adapter: a tree like `init` gives.
            params: the model's parameters by name, where the caller holds them (and may differentiate in them);
                those not named are the model's own, which are constants of the call.
            method: name of another method of the model to call, "generate" for one.
        """
        self.plan.check(adapter)
        return self._run(adapter, None, args, kwargs, params, method)

    def mixed(
        self,
        stacked: Mapping[str, Any],
        index: Tensor | list[int],
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        common: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A batch whose row i uses adapter index[i] of the stack: mixed(...)[i] == apply(a[index[i]], row i).

        Args:
            stacked: `stack` of adapters of this net, each leaf [k, …].
            index: [rows] integers in [−1, k); −1 is the base.
            common: patterns, as in rules, of sites whose input all rows have in common, [tokens, …] rather than
                [rows, tokens, …] (a table of positions, say); what the site gives has the rows then. None: an input
                that has the batch's size in its first dimension, and cannot be its rows, is an error.
            args, kwargs: as for the model; the first dimension of what reaches any other site must be the rows.

        Raises:
            ValueError: an index out of range, or a site whose input does not have the rows in its first dimension.
        """
        self.plan.check(stacked, lead=1)
        rows = Rows.of(index, stack_size(stacked), (args, kwargs), self._copies(method, args, kwargs))
        rows = rows.told(common, self.plan)
        return self._run(stacked, rows, args, kwargs, params, method)

    def gated(
        self,
        stacked: Mapping[str, Any],
        gates: Tensor | list[Any],
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        common: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """A weighted sum of adapters at every site: y = base + Σ_k g_k ⊙ (f_k(x) − base), f_k the site with adapter k.

        Differentiable in the gates, the adapters and the inputs.

        Args:
            stacked: `stack` of K adapters of this net.
            gates: [K] for all rows alike, [rows, K], or [rows, tokens, K]; 1 is the adapter, 0 the base. Rows that
                have one gate of 1 and no other cost what `mixed` costs. In `generate`, later tokens have the gates of
                the last one given.
            common: as for `mixed`.
            args, kwargs: as for the model.

        Raises:
            ValueError: gates that fit neither the stack nor the inputs, or a site whose output does not have the rows
                (and tokens) in its first dimensions.
        """
        self.plan.check(stacked, lead=1)
        copies = self._copies(method, args, kwargs)
        route = Gates.of(gates, stack_size(stacked), (args, kwargs), copies, stepwise=method is not None)
        route = route.told(common, self.plan)
        return self._run(stacked, route, args, kwargs, params, method)

    def _copies(self, method: str | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
        """How often `generate` repeats each row of its inputs: for beams, or for several sampled sequences."""
        if method != "generate":
            return 1
        given = kwargs.get("generation_config") or next((a for a in args if hasattr(a, "num_beams")), None)
        config = given or getattr(self.model, "generation_config", None)
        counts = (kwargs.get(k, getattr(config, k, 1)) for k in ("num_beams", "num_return_sequences"))
        return max(n or 1 for n in counts)

    def delta(self, adapter: Mapping[str, Any]) -> dict[str, Tensor]:
        """{site: change of the parameter, in its own shape}, in fp32 or wider."""
        self.plan.check(adapter)
        weights, out = self._weights(), {}
        for name, entry in self._meant.items():
            m = entry.site.canonical(weights[name])
            method, p = entry.tensors(adapter[name], self._bank(entry, adapter), m)
            out[name] = entry.site.original(entry.delta(method, p, m))
        return out

    def bias_deltas(self, adapter: Mapping[str, Any]) -> dict[str, Tensor]:
        """{site: change of its layer's bias} where a method changes it, in fp32 or wider; no bias counts as zeros."""
        self.plan.check(adapter)
        weights, out = self._weights(), {}
        for name in self._biases:
            entry = self._meant[name]
            method, p = entry.tensors(adapter[name], self._bank(entry, adapter), entry.site.canonical(weights[name]))
            b = weights.get(entry.site.bias or "")
            new = method.bias(p, None if b is None else wide(b))
            if new is not None:
                out[name] = new if b is None else new - wide(b)
        return out

    def merge(
        self, adapter: Mapping[str, Any], *, check_finite: bool = False, untied: bool = False
    ) -> dict[str, Tensor]:
        """The model's parameters with the adapter folded in: {name: tensor}, to load into, or call, a plain model.

        Adapted parameters are new tensors, computed in fp32 and rounded once to their dtype; the others are the
        model's own. Two names of one slot (a shared submodule) get one tensor.

        Args:
            check_finite: whether to look for a NaN or an infinity.
            untied: whether slots that share a tensor (tied weights) may come out different, for a model that does not
                tie them; one that does would keep only one of the two.

        Raises:
            ValueError: the adapter gives a bias to a layer without one; or makes tied weights different, and `untied`
                is not set; or, with check_finite, a merged parameter has a NaN or an infinity.
        """
        self.plan.check(adapter)
        weights = self._weights()
        for name, entry in self.plan.items():
            if entry.adds_bias and weights.get(entry.site.bias or "") is None:
                raise ValueError(
                    f"{name}: {entry.method} adds a bias and this layer has none to merge it into. Use net.apply, or "
                    "give the layer a bias of zeros first."
                )
        out = {n: p.detach() for n, p in self.model.named_parameters(remove_duplicate=False)}
        for name, value in self._adapted(adapter, weights.get).items():
            merged = dense(value)
            if check_finite and not merged.isfinite().all():
                bad = int((~merged.isfinite()).sum())
                raise ValueError(
                    f"{name}: merging gives {bad} values that are not finite; the adapter or the base has them"
                )
            if isinstance(old := weights.get(name), QuantisedWeight):
                merged = old.requantise(merged)
            for alias in self._first.names(name):
                out[alias] = merged
        if not untied:
            self._refuse_untied(out)
        return out

    def _refuse_untied(self, merged: Mapping[str, Tensor]) -> None:
        """ValueError where two slots that share a tensor in the model have different ones in `merged`."""
        if under_transform() or torch.compiler.is_compiling():
            return  # values cannot be compared there, nor loaded into a model
        held = dict(self.model.named_parameters(remove_duplicate=False))
        for name, entry in self.plan.items():
            for other in entry.site.tied:
                if held.get(other) is held.get(name) and not equal(merged[name], merged[other]):
                    raise ValueError(UNTIED.format(name=name, other=other))

    def prepare(self, adapter: Mapping[str, Any]) -> Adapter:
        """The adapter with everything done that depends on parameters alone (DoRA's norms, OFT's rotations).

        It is used like the adapter it was made from, and is right until that, or the base, changes.
        """
        self.plan.check(adapter)
        weights, out = self._weights(), {k: v for k, v in adapter.items() if k in self.plan.banks}
        for name, (method, p) in prepared(self._meant, adapter, weights).items():
            entry = self._meant[name]
            if method != entry.method:
                raise ValueError(f"{name}: a sum or scaling of {entry.method} has no prepared form; prepare before it")
            out[name] = {k: t for k, t in p.items() if k in entry.prepared}
        return out

    def checkpoint_context(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """`context_fn` for a torch.utils.checkpoint in the model's own code, with use_reentrant=False.

        The recomputation, which comes in backward, then sees the tensors of the call that is running now. Outside of a
        call of this net it does nothing, so the bare model may use it too. (Checkpointing that transformers does
        needs no help.)
        """
        if not self._running.calls:
            return nullcontext(), nullcontext()
        return self._running.calls[-1].checkpoint_context()

    @staticmethod
    def _bank(entry: Entry, adapter: Mapping[str, Any]) -> Mapping[str, Any]:
        return adapter[entry.bank] if entry.bank else {}

    def _weights(self) -> dict[str, Tensor]:
        """The base's parameters as they are now, every name of each, as constants. ValueError if one is another than
        was adapted."""
        weights = parameters(self.model)
        for name, entry in self.plan.items():
            current(name, entry, weights.get)
        return weights

    # How a call runs.

    def _run(self, adapter: Any, rows: Route | None, args: Any, kwargs: Any, params: Any, method: str | None) -> Any:
        skeleton = self._acquire()
        if not torch.compiler.is_compiling():
            self._running.calls.append(skeleton)
        try:
            skeleton.refresh()
            before = skeleton.open()
            versions = [] if torch.compiler.is_compiling() else skeleton.versions()
            try:
                if params:
                    skeleton.put(params)
                if rows is not None:
                    rows = replace(rows, fixed=skeleton.identities())
                values = self._adapted(adapter, skeleton.__getitem__, rows, self.model.training)
                for name, value in values.items():
                    skeleton[name] = value
                call = skeleton.root if method is None else getattr(skeleton.root, method)
                out = call(*args, **kwargs)
                if not torch.compiler.is_compiling():
                    skeleton.check_in_place(values)
            finally:
                skeleton.close(before)
            if versions and skeleton.versions() != versions:
                raise RuntimeError(
                    f"{', '.join(skeleton.written(versions))}: the model's own forward writes this parameter in "
                    "place, and so wrote the base's. Have it work on a copy, or pass copies as params=."
                )
            return dense(out)
        except Exception as e:
            if problem := misplaced(self, adapter, e):
                raise ValueError(problem) from e
            raise
        finally:
            if not torch.compiler.is_compiling():
                self._running.calls.pop()
                self._idle.append(skeleton)

    def _acquire(self) -> Skeleton:
        if torch.compiler.is_compiling():
            return self._first  # traced code leaves a skeleton as it found it, so all traces can have the same
        try:
            return self._idle.pop()
        except IndexError:
            return Skeleton(self.model, self._slots)

    def _adapted(self, adapter: Any, weight: Any, rows: Route | None = None, training: bool = False) -> dict[str, Any]:
        """slot → value, for every adapted weight and every bias that a method changes."""
        entries = self.plan.entries if training else self._meant
        now = moment()
        out: dict[str, Any] = {}
        for name, entry in entries.items():
            w = current(name, entry, weight)
            bank = self._bank(entry, adapter)
            if rows is not None:
                out[name] = MixedWeight([Part(entry, adapter[name], bank, w, 0, rows.count)], w, rows)
            else:
                method, p = entry.tensors(adapter[name], bank, entry.site.canonical(w))
                weight_now = AdaptedWeight(entry, method, p, w, now)
                out[name] = weight_now.dense() if entry.site.kind == "other" else weight_now
        for name, slot in self._biases.items():
            b = out[slot] if slot in out else weight(slot)
            new = adapted_bias(out[name], b) if rows is None else out[name].bias(b)
            if new is not None:
                out[slot] = new
            if rows is None and not out[name].method.changes_weight:
                del out[name]
        return out


class _Running(threading.local):
    """The skeletons of the calls that run in this thread, the innermost last."""

    def __init__(self) -> None:
        self.calls: list[Skeleton] = []


def current(name: str, entry: Entry, weight: Any) -> Tensor:
    """The model's parameter at a site, weight(name). ValueError if it is another than was adapted."""
    w: Tensor | None = weight(name)
    if w is None or w.shape != entry.site.shape:
        now = None if w is None else list(w.shape)
        raise ValueError(
            f"{name}: the model's parameter has shape {now} now; it was {list(entry.site.shape)} when it was adapted. "
            "Call adapt again."
        )
    return w


def adapted_bias(weight: AdaptedWeight, b: Any) -> Tensor | None:
    new = weight.method.bias(weight.p, None if b is None else wide(b))
    return None if new is None else new.to(weight.dtype if b is None else b.dtype)
