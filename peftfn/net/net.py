"""adapt: bind rules to a model. The functions of the resulting net take the adapter as an argument."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from peftfn.core import functions
from peftfn.core.make import make
from peftfn.core.method import Method, Weight
from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Adapter, Plan
from peftfn.model.model import Model, weights_of
from peftfn.net.again import layers_of
from peftfn.net.run import Asked, Runner
from peftfn.net.words import unknown
from peftfn.slots import pertoken, routes
from peftfn.slots.routed import routed_of
from peftfn.slots.routes import Gating
from peftfn.slots.values import Given
from peftfn.tensors.quantised import QuantisedWeight
from peftfn.tensors.transform import outside, under_transform


@checks_numbers
def adapt(
    model: nn.Module, rules: Mapping[str, Method], *, seed: int = 0, routed: Sequence[str] | None = None
) -> "Adapted":
    """Bind methods to the parameters of a model, without changing it.

    Args:
        model: any module. Each call reads its parameters anew.
        rules: {name pattern: method}, in order. A parameter gets the first rule that matches its name and whose method
            supports its kind. A pattern of word characters and dots matches whole dotted components ("q_proj" matches
            "layers.0.q_proj.weight", never "q_proj_norm"); any other is a regular expression, searched in the name.
        seed: seed of the methods' frozen tensors (VeRA's projections, say); `init` has the seed of the trainable ones.
        routed: patterns, as in rules, of modules through which a mixed batch follows its rows, because they move tokens
            (experts, windows, sequences that are packed or flattened); "" is the whole model. None: the parent of each
            module that holds an adapted stack, and of each that is called `experts` if something in it is adapted; if
            another site loses its rows, the whole model from then on.

    Returns:
        A net: the plan bound to the model.

    Raises:
        ValueError: a rule matches no parameter that its method supports, or sizes do not fit; it names the site, the
            value, the constraint and the cure. No large tensor has been allocated at that point.
        TypeError: the model cannot be deep-copied, or `rules` is not a dict of methods.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2), "2": pf.Full()})
        y = net.apply(net.init(seed=0), torch.randn(3, 8))
    """
    with outside():
        plan = make(Model.of(model), rules, seed)
        return Adapted(model, plan, routed=None if routed is None else routed_of(model, routed))


def check_net(where: str, net: Any) -> None:
    """TypeError unless it is a net: what else is given first is an adapter, a model or a module view."""
    if not isinstance(net, Adapted):
        raise TypeError(f"{where}: give a net first, which peftfn.adapt returns, not {type(net).__name__}")


class Adapted:
    """A plan bound to a model: what `adapt` returns. Its functions are pure and do not change the model.

    Attributes:
        model: the base.
        plan: {site: entry}, what is adapted and how.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        assert isinstance(net, pf.Adapted) and list(net.plan) == ["0.weight"]
    """

    def __init__(self, model: nn.Module, plan: Plan, again: Sequence[str] = (), routed: Sequence[str] | None = None):
        """again: modules that are rematerialised (`checkpointed`). routed: modules through which rows are followed;
        None: as in `adapt`."""
        self.model, self.plan, self.again = model, plan, tuple(again)
        self.routed = None if routed is None else tuple(routed)
        self._runner = Runner.of(model, [plan], self.again, [self.routed])

    def __reduce__(self) -> tuple[Any, ...]:
        return Adapted, (self.model, self.plan, self.again, self.routed)

    def __repr__(self) -> str:
        rules = ", ".join(f"{pattern!r}: {method}" for pattern, method in self.plan.rules.items())
        return f"adapt({type(self.model).__name__}, {{{rules}}})  # {len(self.plan)} sites"

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a net has no call of its own: the adapter is an argument. Write net.apply(adapter, *args)")

    if not TYPE_CHECKING:  # to a type checker, every name would exist

        def __getattr__(self, name: str) -> NoReturn:
            raise AttributeError(unknown(name), name=name, obj=self)

    @property
    def weights(self) -> Mapping[str, Any]:
        """The base's current parameters, under every name of each, detached. Offloaded ones are loaded when asked for.

        Raises:
            ValueError: an adapted parameter has another shape than it had in `adapt`.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            assert net.weights["0.weight"].shape == (4, 8)
        """
        functions.checked(self.plan, weights_of(self.model, self.plan.places))
        return weights_of(self.model)

    @property
    def _seen(self) -> Mapping[str, Any]:
        """What the methods see at their sites: the base's parameters as they are now, and the places of modules."""
        return functions.checked(self.plan, weights_of(self.model, self.plan.places))

    def init(self, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Adapter:
        """Return a fresh adapter, each tensor on the device of its weight.

        The values of a site depend on (seed, site name) alone, not on the other sites, nor on a transform around them.

        Args:
            seed: seed of the trainable tensors.
            dtype: their dtype.

        Returns:
            {site: {name: tensor}}: exactly what is trained.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            a = net.init(seed=0)
            assert a["0.weight"]["a"].shape == (2, 8) and a["0.weight"]["b"].shape == (4, 2)
        """
        with outside():
            return functions.init(self.plan, self._seen, seed, dtype)

    def apply(
        self,
        adapter: Mapping[str, Any],
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call the adapted model: model(*args, **kwargs) with `adapter`.

        Args:
            adapter: a tree like that of `init`.
            args, kwargs: as for the model.
            params: parameters of the model by name, to use in place of its own; they may require gradients. The
                parameters that `params` does not name are constants of the call.
            method: name of another method of the model to call, such as "generate".

        Returns:
            The model's output.

        Raises:
            KeyError, ValueError, TypeError: the adapter does not fit the plan; it names the site.
            ValueError: a method acts on some tokens alone (`ALoRA`), and the call's token ids do not say on which.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            a, x = net.init(), torch.randn(3, 8)
            y = net.apply(a, x)
            g = torch.func.grad(lambda a: net.apply(a, x).sum())(a)
        """
        if not isinstance(adapter, Mapping):
            raise TypeError(
                f"apply: the first argument is the adapter, a dict of site name → dict of tensors, not "
                f"{type(adapter).__name__}: write net.apply(adapter, *args), with an adapter such as net.init()"
            )
        return self._runner.run(Asked([Given(self.plan, adapter)], None, args, kwargs, params, method), known=False)

    def mixed(
        self,
        stacked: Mapping[str, Any],
        index: Tensor | list[int],
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        common: Sequence[str] | None = None,
        owners: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a batch whose row i uses adapter index[i] of the stack: mixed(...)[i] == apply(a[index[i]], row i).

        Args:
            stacked: `stack` of k adapters of this net; each tensor is [k, …].
            index: [rows] integers in [−1, k), −1 being the base; or [rows, tokens], one for each token (of sequences
                packed into one row, say). In `generate`, later tokens use the last one's.
            args, kwargs: as for the model. At every site that `common` does not name and that is in no routed module,
                the first dimension of the input must be the rows; where it is not, rows are followed (see `adapt`).
            params, method: as for `apply`.
            common: patterns, as in rules, of sites whose input is the same for all rows: [tokens, …] or [1, tokens, …]
                rather than [rows, tokens, …] (position indices that the model computes, say). The output of such a
                site has rows. None: detect the model's own tables; any other input whose first dimension is 1 or the
                batch size, and which cannot be the batch, raises an error.
            owners: {name of a module: the row of each of the leading positions of its input}, where that does not have
                the rows in its first dimension: patches of images of several sizes, say. "" is the model. If `adapt`
                was told which modules are routed, it must be one of them.

        Returns:
            The model's output, differentiable in the stack.

        Raises:
            ValueError: an index is out of range or does not fit the inputs; owners do not fit; or it is not known whose
                the positions of a site's input are. It names the site, and in a routed module what lost the rows.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            many = pf.stack([net.init(seed=0), net.init(seed=1)])
            y = net.mixed(many, [1, -1, 0], torch.randn(3, 8))
        """
        return self._runner.batch(pertoken.of, [stacked], index, args, kwargs, params, method, common, owners)

    def gated(
        self,
        stacked: Mapping[str, Any],
        gates: Gating,
        *args: Any,
        params: Mapping[str, Tensor] | None = None,
        method: str | None = None,
        common: Sequence[str] | None = None,
        owners: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a weighted sum of adapters at every site: y = base + Σ_k g_k ⊙ (f_k(x) − base), f_k having adapter k.

        Args:
            stacked: `stack` of K adapters of this net; each tensor is [K, …].
            gates: [K] for all rows, [rows, K], or [rows, tokens, K]. 1 is the adapter, 0 the base. A batch whose rows
                each have one gate of 1 and otherwise 0 costs as much as `mixed`. In `generate`, tokens after the given
                ones use the gates of the last one. Gates of tokens say where a method acts that acts on some alone
                (`ALoRA`); other gates weigh it where it acts. Or {pattern: gates}, each site having those of the first
                pattern that matches its name; or a function (site, the site's input) ↦ gates; or a `PerForward`, whose
                function makes gates anew for each forward pass.
            args, kwargs: as for the model.
            params, method, common, owners: as for `mixed`.

        Returns:
            The model's output, differentiable in the gates, the adapters and the inputs.

        Raises:
            ValueError: the gates do not fit the stack or the inputs, or the output of a site does not have the rows
                (and tokens) in its first dimensions.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            many = pf.stack([net.init(seed=0), net.init(seed=1)])
            y = net.gated(many, torch.tensor([0.3, 0.7]), torch.randn(3, 8))
        """
        return self._runner.batch(routes.of, [stacked], gates, args, kwargs, params, method, common, owners)

    def delta(self, adapter: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the change of each adapted parameter.

        Args:
            adapter: a tree like that of `init`.

        Returns:
            {site: tensor in the parameter's shape}, in fp32 or wider.

        Raises:
            ValueError: a method whose change depends on the input.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            assert net.delta(net.init())["0.weight"].shape == (4, 8)
        """
        self.plan.check(adapter)
        return functions.delta(self.plan, self._seen, adapter)

    def bias_deltas(self, adapter: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the change of each bias that a method at its layer's weight changes.

        Args:
            adapter: a tree like that of `init`.

        Returns:
            {site: tensor [out]}, in fp32 or wider. A missing bias counts as zeros.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0": pf.LoRA(rank=2, lora_bias=True)})
            assert net.bias_deltas(net.init())["0.weight"].shape == (4,)
        """
        self.plan.check(adapter)
        return functions.bias_deltas(self.plan, self._seen, adapter)

    def merge(
        self, adapter: Mapping[str, Any], *, check_finite: bool = False, untied: bool = False
    ) -> dict[str, Tensor]:
        """Return the model's parameters with the adapter folded in, for `load_state_dict` or `functional_call`.

        Adapted parameters are new tensors, computed in fp32 and rounded once to their dtype; the others are the
        model's own. All names of one tensor (a shared submodule, tied weights) map to one tensor, so that
        `torch.func.functional_call(model, net.merge(adapter), …)` works on any model.

        Args:
            adapter: a tree like that of `init`.
            check_finite: whether to raise if a merged parameter has a NaN or an infinity.
            untied: whether slots that share a tensor (tied weights) may become different, for a model that does not
                tie them; one that ties them would keep only one of the two.

        Returns:
            {name: tensor} for every name of every parameter.

        Raises:
            ValueError: the adapter adds a bias to a layer without one; or it makes tied weights different and `untied`
                is False; or, with check_finite, a merged parameter is not finite.

        Example:
            model = torch.nn.Sequential(torch.nn.Linear(8, 4))
            net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
            y = torch.func.functional_call(model, net.merge(net.init()), (torch.randn(3, 8),))
        """
        self.plan.check(adapter)
        known = Model.of(self.model)
        held = known.parameters
        weights = known.weights | known.at(self.plan.places)
        functions.checked(self.plan, weights)
        own = {id(p): p.detach() for p in held.values()}  # one tensor for all names of a tied one
        out = {n: weights.kept(n) if n in weights.sources else own[id(p)] for n, p in held.items()}
        for name, merged in functions.merge(self.plan, weights, adapter):
            if check_finite and not merged.isfinite().all():
                bad = int((~merged.isfinite()).sum())
                raise ValueError(
                    f"{name}: the merged parameter has {bad} values that are not finite; so has the adapter or the base"
                )
            if isinstance(old := weights.get(name), QuantisedWeight):
                merged = old.requantise(merged)
            if name in weights.sources:
                merged = merged.to(out[name].device)
            site = known.named[name]
            for alias in (site.name, *site.aliases):
                out[alias] = merged
        if not (untied or under_transform() or torch.compiler.is_compiling()):  # there, values cannot be compared
            functions.tie(self.plan, held, out)
        return out

    def prepare(self, adapter: Mapping[str, Any]) -> Adapter:
        """Compute in advance what depends on parameters alone (DoRA's norms, OFT's rotations).

        Args:
            adapter: a tree like that of `init`.

        Returns:
            A prepared adapter. Use it in place of `adapter`. It is valid until the adapter or the base changes.

        Raises:
            ValueError: a sum or scaling without a closed form.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.DoRA(rank=2)})
            p = net.prepare(net.init())
            y = net.apply(p, torch.randn(3, 8))
        """
        self.plan.check(adapter)
        return functions.prepare(self.plan, self._seen, adapter)

    def checkpointed(self, pattern: str) -> "Adapted":
        """Return the net that keeps of some modules nothing but their inputs: backward passes run them again.

        This is rematerialisation (gradient checkpointing) under every transform: `grad`, `vmap(grad)`, gradients of
        single samples, `jvp`, Hessian-vector products, any nesting of them, and `.backward()`. Outputs and gradients
        are those of the net without it, dropout's masks too. A transformers model with `gradient_checkpointing_enable`
        does the same without it. While compiling, the compiler decides what is kept.

        Args:
            pattern: names of modules, as in rules. Of modules in one another the outermost is taken, so "layers" finds
                each layer of a transformer.

        Returns:
            A net of the same model and plan: adapters of one are adapters of the other.

        Raises:
            ValueError: no module that has parts matches.
            TypeError: the pattern is not a string.

        Example:
            layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh()) for _ in range(4))
            net = pf.adapt(torch.nn.Sequential(*layers), {r"0\\.weight": pf.LoRA(rank=2)})
            less = net.checkpointed(r"^\\d$")
            a, x = net.init(), torch.randn(3, 8)
            g = torch.func.grad(lambda a: less.apply(a, x).sum())(a)
        """
        if not isinstance(pattern, str):
            raise TypeError(f"checkpointed: pattern is {pattern!r}; give names of modules as a regular expression")
        return Adapted(self.model, self.plan, [*self.again, *layers_of(self.model, pattern)], self.routed)

    def in_fp32(self) -> "Adapted":
        """Return the net whose adapters compute in fp32 on half-precision inputs, as PEFT's do.

        In other nets, products with an adapter's factors run in the input's dtype, which is faster. In this one, each
        adapted layer widens its input for the adapter's own products, takes the base's product in half precision, and
        rounds their sum to the input's dtype; so too under autocast. A method that makes a new weight (`Full`, `HiRA`)
        multiplies by it in fp32. The backward pass keeps the widened inputs.

        Deltas and merges are computed in fp32 in every net. Files do not say it: call this on the net from `load`.

        Returns:
            A net of the same model and plan: adapters of one are adapters of the other.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)).bfloat16(), {"0.weight": pf.LoRA(rank=2)})
            y = net.in_fp32().apply(net.init(), torch.randn(3, 8).bfloat16())
            assert y.dtype == torch.bfloat16
        """
        plan = self.plan
        entries = {name: replace(e, fp32=e.family is Weight) for name, e in plan.items()}
        return replanned(self, Plan(entries, plan.rules, plan.banks))

    def checkpoint_context(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Return the `context_fn` for torch.utils.checkpoint in the model's own code, with use_reentrant=False.

        The recomputation in the backward pass then uses the tensors of the call that is running now. Outside a call of
        this net it does nothing, so the base may use it too. (The checkpointing of transformers does not need it.)

        Returns:
            Two context managers.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            forward, recomputation = net.checkpoint_context()
        """
        skeleton = self._runner.innermost
        return (nullcontext(), nullcontext()) if skeleton is None else skeleton.recompute.context()


def replanned(net: Adapted, plan: Plan) -> Adapted:
    """The net of another plan on the same model, rematerialised and routed as this one is."""
    return Adapted(net.model, plan, net.again, net.routed)
