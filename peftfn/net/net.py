"""adapt: rules on a model → a net, whose functions take the adapter as an argument."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core import functions
from peftfn.core.make import make
from peftfn.core.method import Method
from peftfn.core.plan import Adapter, Plan
from peftfn.model.model import Model, weights_of
from peftfn.net.run import Runner
from peftfn.slots.gates import Index, Weights
from peftfn.slots.values import Given
from peftfn.tensors.quantised import QuantisedWeight
from peftfn.tensors.transform import under_transform


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
            the constraint and the cure. No large tensor has been allocated at that point. Or a layer whose weights
            accelerate keeps elsewhere between calls (offload).
        TypeError: the model cannot be deep-copied.
    """
    return Adapted(model, make(Model.of(model), rules, seed))


class Adapted:
    """A plan bound to a model. All its functions are pure: tensors in, tensors out, the model untouched."""

    def __init__(self, model: nn.Module, plan: Plan):
        self.model, self.plan = model, plan
        self._runner = Runner(model, [plan])

    def __reduce__(self) -> tuple[Any, ...]:
        return Adapted, (self.model, self.plan)

    def __repr__(self) -> str:
        rules = ", ".join(f"{pattern!r}: {method}" for pattern, method in self.plan.rules.items())
        return f"adapt({type(self.model).__name__}, {{{rules}}})  # {len(self.plan)} sites"

    @property
    def weights(self) -> Mapping[str, Any]:
        """The base's parameters as they are now, every name of each, as constants.

        Raises ValueError if an adapted one has another shape than it had in `adapt`.
        """
        return functions.checked(self.plan, weights_of(self.model))

    def init(self, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """A fresh adapter: {site: {name: tensor}}, each on its weight's device.

        A site's values depend on (seed, site name) alone, not on what else is adapted.
        """
        return functions.init(self.plan, self.weights, seed, dtype)

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
        return self._runner.run([Given(self.plan, adapter)], None, args, kwargs, params, method)

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
            common: patterns, as in rules, of sites whose input all rows have in common, [tokens, …] or [1, tokens, …]
                rather than [rows, tokens, …] (positions that the model counts, say); each row has its own output then.
                None: the model's own tables are known to be so; another input that has 1 or the batch's size in its
                first dimension, and cannot be its rows, is an error.
            args, kwargs: as for the model; the first dimension of what reaches any other site must be the rows.

        Raises:
            ValueError: an index out of range, or a site whose input does not have the rows in its first dimension.
        """
        return self._runner.batch(Index, [stacked], index, args, kwargs, params, method, common)

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
        return self._runner.batch(Weights, [stacked], gates, args, kwargs, params, method, common)

    def delta(self, adapter: Mapping[str, Any]) -> dict[str, Tensor]:
        """{site: change of the parameter, in its own shape}, in fp32 or wider."""
        self.plan.check(adapter)
        return functions.delta(self.plan, self.weights, adapter)

    def bias_deltas(self, adapter: Mapping[str, Any]) -> dict[str, Tensor]:
        """{site: change of its layer's bias} where a method changes it, in fp32 or wider; no bias counts as zeros."""
        self.plan.check(adapter)
        return functions.bias_deltas(self.plan, self.weights, adapter)

    def merge(
        self, adapter: Mapping[str, Any], *, check_finite: bool = False, untied: bool = False
    ) -> dict[str, Tensor]:
        """The model's parameters with the adapter folded in: {name: tensor}, to load into, or call, a plain model.

        Adapted parameters are new tensors, computed in fp32 and rounded once to their dtype; the others are the
        model's own. All names of one tensor (a shared submodule, tied weights) get one tensor, so that
        `torch.func.functional_call(model, net.merge(adapter), …)` works on any model.

        Args:
            check_finite: whether to look for a NaN or an infinity.
            untied: whether slots that share a tensor (tied weights) may come out different, for a model that does not
                tie them; one that does would keep only one of the two.

        Raises:
            ValueError: the adapter gives a bias to a layer without one; or makes tied weights different, and `untied`
                is not set; or, with check_finite, a merged parameter has a NaN or an infinity.
        """
        self.plan.check(adapter)
        known = Model.of(self.model)
        weights, held = functions.checked(self.plan, known.weights), known.parameters
        own = {id(p): p.detach() for p in held.values()}  # one tensor for all names of a tied one
        out = {n: own[id(p)] for n, p in held.items()}
        for name, merged in functions.merge(self.plan, weights, adapter):
            if check_finite and not merged.isfinite().all():
                bad = int((~merged.isfinite()).sum())
                raise ValueError(
                    f"{name}: merging gives {bad} values that are not finite; the adapter or the base has them"
                )
            if isinstance(old := weights.get(name), QuantisedWeight):
                merged = old.requantise(merged)
            for alias in self._runner.first.names(name):
                out[alias] = merged
        if not (untied or under_transform() or torch.compiler.is_compiling()):  # there, values cannot be compared
            functions.tie(self.plan, held, out)
        return out

    def prepare(self, adapter: Mapping[str, Any]) -> Adapter:
        """The adapter with everything done that depends on parameters alone (DoRA's norms, OFT's rotations).

        It is used like the adapter it was made from, and is right until that, or the base, changes.
        """
        self.plan.check(adapter)
        return functions.prepare(self.plan, self.weights, adapter)

    def checkpoint_context(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """`context_fn` for a torch.utils.checkpoint in the model's own code, with use_reentrant=False.

        The recomputation, which comes in backward, then sees the tensors of the call that is running now. Outside of a
        call of this net it does nothing, so the bare model may use it too. (Checkpointing that transformers does
        needs no help.)
        """
        skeleton = self._runner.innermost
        return (nullcontext(), nullcontext()) if skeleton is None else skeleton.checkpoint_context()
