"""What `as_module` builds: a parametrization at each site, which holds the leaves and returns the adapted weight."""

import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from itertools import chain, count
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from peftfn.core.modules import Companion
from peftfn.core.plan import Entry, Plan
from peftfn.model.names import near
from peftfn.model.place import MODULE, TOKENS
from peftfn.model.site import Site
from peftfn.net.recompute import CHECKPOINT
from peftfn.slots.mixed import MixedWeight
from peftfn.slots.slot import plus
from peftfn.tensors.lent import REPLACED
from peftfn.tensors.quantised import Bare, quantised
from peftfn.view.called import CALL, calling, place_calls, places_of
from peftfn.view.held import Choice, Factors, Held, Leaf, Paths, hold, itself
from peftfn.view.told import listening, telling


class _Bias(nn.Module):
    """The parametrization of a bias that the method at its layer's weight changes."""

    def __init__(self, weight: nn.Module, missing: bool):
        super().__init__()
        self.weight, self.missing = (weight,), missing  # in a tuple: no submodule of this one

    def forward(self, b: Tensor | None) -> Any:
        b = None if self.missing else b
        weight: Any = self.weight[0]
        leaf = weight[0].leaf()
        if leaf is None or not leaf._changes_bias():
            return b
        w = weight[0].made(leaf, weight[0].read(weight.original))
        if isinstance(w, MixedWeight):
            mixed = w.bias(b)
            return b if mixed is None else mixed
        new = w.entry.new_bias(w.method, w.p, b, w.dtype)
        return b if new is None else new


@dataclass
class _State:
    """What a view stores about its adapters."""

    plans: dict[str, Plan]
    banks: dict[str, dict[str, Paths]]
    choice: Choice
    offloaded: set[str]
    buffers: dict[str, Tensor]  # the base's own, that a checkpoint has and training may change
    constants: set[str]  # names of the root's buffers that hold constants of several leaves
    # The slots that the view was made with: what adapters may come in later.
    sites: dict[str, Site]
    companions: set[tuple[str, Companion]]  # (site, what its methods put at another module)


CURES = {
    "set_adapter": 'write m.use_("x") for every thread, or `with m.use("x"): …` for this one until the block ends',
    "disable_adapter": "write `with m.use(None): …`, which makes the base active in this thread until the block ends",
    "add_adapter": 'write peftfn.attach_(m, "x", a), or pass all by name, peftfn.as_module(net, x=a, y=b)',
    "load_adapter": 'net, a = peftfn.load(path, model) reads one; peftfn.attach_(m, "x", (net, a)) adds it',
    "delete_adapter": 'write peftfn.detach_(m, "x")',
    "merge_and_unload": "peftfn.merged_model(net, peftfn.adapter_of(m)) returns a merged model",
    "print_trainable_parameters": "print(peftfn.status(m))",
}
"""Methods of PEFT's models, which also transformers' have → what to write instead."""


class View:
    """What `as_module` adds to the model's class."""

    _peftfn: _State
    saver: ClassVar[Callable[..., None] | None] = None
    """What save_pretrained calls. The package sets it: this room may not import the one that writes files."""

    @contextmanager
    def use(self, names: str | Sequence[str] | None) -> Iterator[None]:
        """Make an adapter active in this thread, or the sum of several, until the block ends; None is the base."""
        active = _checked(self, names, "use")
        choice = self._peftfn.choice
        here = choice.here
        before = here.active, here.pinned
        choice.blocks.append(active)
        here.active, here.pinned = active, True
        try:
            yield
        finally:
            here.active, here.pinned = before
            choice.blocks.remove(active)

    def use_(self, names: str | Sequence[str] | None) -> None:
        """Make an adapter active in every thread, or the sum of several, where no `use` says otherwise; None is the
        base."""
        self._peftfn.choice.default = _checked(self, names, "use_")

    def checkpoint_context(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """`context_fn` of torch.utils.checkpoint: the recomputation uses the adapter that is active now."""
        return nullcontext(), _as_now(self)


def _as_now(view: View) -> AbstractContextManager[None]:
    """In whose block the adapter that is active now is so again, and the sites know what they know now of the call."""
    choice = view._peftfn.choice
    return _again(view, choice.active, choice.here.told)


@contextmanager
def _again(view: View, active: tuple[str, ...], told: Any) -> Iterator[None]:
    with view.use(active), telling(view._peftfn.choice, told):
        yield


def _checked(view: View, names: Any, what: str) -> tuple[str, ...]:
    """The adapters that a `use` makes active. Raises if they cannot be."""
    state = view._peftfn
    active = () if names is None else (names,) if isinstance(names, str) else names
    if not isinstance(active, (list, tuple)) or not all(isinstance(name, str) for name in active):
        raise TypeError(
            f"{what}: {names!r} is neither a name nor a list of names. For a weighted sum, attach_ a sum of "
            "peftfn.scale(a, s); for one adapter per row, net.mixed"
        )
    for name in active:
        if name not in state.plans:
            raise KeyError(f"{what}: the module has no adapter {name!r}{near(name, list(state.plans))}")
        if name in state.offloaded:
            raise ValueError(f"{what}: adapter {name!r} is offloaded; bring it back with peftfn.onload_(m, {name!r})")
    if len(active) > 1:
        _check_sum(state, active, what)
    return tuple(active)


def _check_sum(state: _State, active: Sequence[str], what: str) -> None:
    """ValueError unless these adapters have a sum at every site."""
    if len(set(active)) < len(active):
        raise ValueError(f"{what}: {list(active)} has a name twice; attach_ peftfn.scale(a, 2.0) for twice an adapter")
    first: dict[str, tuple[str, Entry]] = {}
    for name in active:
        for at, e in state.plans[name].items():
            other, f = first.setdefault(at, (name, e))
            if name != other and not _have_sum(e, f):
                raise ValueError(
                    f"{what}: {e.site.label}: {f.method} of {other!r} and {e.method} of {name!r} have no sum; make one "
                    "of them active at a time"
                )


def _have_sum(e: Entry, f: Entry) -> bool:
    """Whether leaves of these entries of one site can be active together."""
    one = e.method == f.method
    if e.site.kind in (MODULE, TOKENS):
        return one and e.method.combines
    if one and e.method.overrides("summed"):  # it has a closed form
        return True
    # W + Σ delta, or Σ of what each gives; methods name for themselves which tensors the experts of a stack share
    if one and not e.method.mergeable:
        return e.method.combines
    each = ((e, e.method), (f, f.method))
    return all(m.combines and (m.mergeable or at.gated) for at, m in each) and (one or not e.site.stacked)


def _unshare(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before a layer loads its part of a state dict, also through a wrapper around the view: a tensor whose values
    differ from the base's gets its own storage, so that the base does not change. ValueError while an adapter of the
    view is offloaded to meta.
    """
    ours: set[str] = set()
    if isinstance(module, View):
        refuse_empty(module, "load_state_dict")
        ours = {name for banks in module._peftfn.banks.values() for paths in banks.values() for _, name in paths}
        for name in _stand_ins(module, state_dict, prefix):
            del state_dict[name]  # of torch's own dictionary
    for name, t in chain(module._parameters.items(), module._buffers.items()):
        given = state_dict.get(prefix + name)
        if name in ours or t is None or type(t.data) is not Tensor or given is None or _equal(t, given):
            continue
        t.data = t.data.clone()


def _stand_ins(view: Any, state_dict: Mapping[str, Any], prefix: str) -> list[str]:
    """The empty tensors in a state that stand for a parameter of the base, which `save_pretrained` left out."""
    empty = [k for k, t in state_dict.items() if k.startswith(prefix) and getattr(t, "shape", None) == (0,)]
    held = {prefix + k: p.shape for k, p in view.named_parameters(remove_duplicate=False)} if empty else {}
    held |= {prefix + site: None for plan in view._peftfn.plans.values() for site in plan}
    return [k for k in empty if k in held and held[k] != (0,)]


def refuse_empty(view: Any, what: str) -> None:
    """Raise ValueError if an adapter of the view has no values because it was offloaded to meta."""
    for module in view.modules():
        for name, leaf in module._modules.items() if isinstance(module, Held) else ():
            if name in view._peftfn.offloaded and any(p.is_meta for p in leaf.parameters()):
                raise ValueError(
                    f"{what}: adapter {name!r} is offloaded to meta and has no values at {module.site}; bring it back "
                    f"first, peftfn.onload_(m, {name!r}, what offload_ returned)"
                )


def _equal(t: Tensor, given: Any) -> bool:
    same = isinstance(given, Tensor) and given.shape == t.shape and given.dtype == t.dtype and given.device == t.device
    return same and not t.is_meta and torch.equal(t, given)


def _checkpointing(cls: Any) -> Callable[..., None]:
    """transformers' `_set_gradient_checkpointing`, with the adapter of the forward pass in the recomputation."""

    @wraps(cls._set_gradient_checkpointing)
    def set_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        cls._set_gradient_checkpointing(self, *args, **kwargs)
        _wrap_checkpoints(self)

    return set_checkpointing


def _save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
    """Write the module's adapters into a folder, and its state without the frozen base, which Trainer resumes from.

    An adapter named "default" is in the folder itself, others are in folders below, as PEFT has them. They are PEFT's
    files where the method has such a form, and else native ones: `peftfn.load` and `load_all` read both.

    Args:
        save_directory: the folder.
        is_main_process, state_dict: as for the model's own method. Options that say how a large model is written have
            no effect.

    Raises:
        ValueError: an adapter has no values, tensors are sharded, or `push_to_hub` is asked for.
        TypeError: another option.
    """
    assert View.saver is not None
    View.saver(self, save_directory, *args, **kwargs)


def _unless_adapted(cls: Any, name: str) -> Callable[..., Any]:
    """transformers' functions that replace the parameters of the embeddings, which an adapted layer cannot allow.

    Tied layers are tied since `as_module`, so `tie_weights` has nothing to do.
    """
    original = getattr(cls, name)

    @wraps(original)
    def function(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers: list[Any] = [m for m in (self.get_input_embeddings(), self.get_output_embeddings()) if m is not None]
        sites = [m.parametrizations.weight[0].site for m in layers if parametrize.is_parametrized(m, "weight")]
        if name == "tie_weights":
            return None if sites else original(self, *args, **kwargs)
        sites += [m._modules[CALL].site for m in layers if CALL in m._modules]
        if not sites:
            return original(self, *args, **kwargs)
        raise ValueError(
            f"{sites[0]}: {name} would replace this parameter, and it is adapted. Call "
            "it on the model first, and then adapt the model"
        )

    return function


def _wrap_checkpoints(view: Any) -> None:
    for module in view.modules():
        if CHECKPOINT in vars(module):
            vars(module)[CHECKPOINT] = partial(_checkpoint, view, vars(module)[CHECKPOINT])


def _checkpoint(view: View, original: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    active, told = view._peftfn.choice.active, view._peftfn.choice.here.told

    def under(*args: Any, **kwargs: Any) -> Any:
        with _again(view, active, told):
            return run(*args, **kwargs)

    return original(under, *args, **kwargs)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """The forward of a quantised layer, by what stands for its weight."""
    return plus(F.linear(x, layer.weight), getattr(layer, "bias", None))


# Classes. register_parametrization makes one class a module, which cannot be pickled and is compiled anew for each of
# many equal layers. So we make one class for all layers of a class that are parametrized alike.


@cache
def _slot(name: str) -> property:
    """The attribute `name`: what its ParametrizationList gives, read without the list's own call, which would cost more
    than all the rest."""

    def get(self: nn.Module) -> Any:
        held: Any = self._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        value = held._parameters["original"] if "original" in held._parameters else held.original  # noqa: SIM401 (FSDP1)
        for parametrization in held._modules.values():
            value = parametrization.forward(value)
        return value

    def refuse(self: nn.Module, value: Any) -> None:
        held: Any = self._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]
        raise RuntimeError(REPLACED.format(name=getattr(held[0], "site", name)))

    return property(get, refuse)


def _refusal(word: str, cure: str) -> Callable[..., Any]:
    """A method of PEFT's models, which a view does not have."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise AttributeError(f"a module that as_module made has no {word}, which is PEFT's: {cure}")

    return refuse


@cache
def _derived(cls: Any, names: tuple[str, ...], view: bool, called: bool, told: bool) -> Any:
    """A subclass of `cls` whose attributes `names` are parametrized; the root of a view has the methods of one.

    called: its forward looks into its call slot first. told: it tells the sites what it is called with.
    """

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, _, state, *items = super(made, self).__reduce_ex__(protocol)
        if "_flat_weights" in state:  # an RNN keeps what its slots gave in the last call, graph and all; it looks anew
            state = state | {"_flat_weights": [torch.empty(0) for _ in state["_flat_weights"]]}
        return _empty, (cls, names, view, called, told), state, *items

    def register_parameter(self: nn.Module, name: str, param: Any) -> None:
        if name in names and name not in self._parameters:
            setattr(self, name, None)
        super(made, self).register_parameter(name, param)

    body: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce_ex__": reduce}
    body["_adapted_class"] = cls
    body |= {name: _slot(name) for name in names}
    if names:
        body["register_parameter"] = register_parameter  # what assigning a parameter does
    body["_derived"] = (cls, names, view, called)
    if called:
        body |= calling(cls)
    if told:
        body |= listening(cls, body.get("forward", cls.forward))
    if view:
        body["__qualname__"] = cls.__qualname__
        body |= {k: v for k, v in vars(View).items() if isinstance(v, types.FunctionType)}  # before the model's own
        body |= {word: _refusal(word, cure) for word, cure in CURES.items()}
        if hasattr(cls, "_set_gradient_checkpointing"):
            body["_set_gradient_checkpointing"] = _checkpointing(cls)
        if hasattr(cls, "save_pretrained"):
            body["save_pretrained"] = _save_pretrained
        for name in ("tie_weights", "resize_token_embeddings"):
            if hasattr(cls, name):
                body[name] = _unless_adapted(cls, name)
    # The class comes first: Python gives a layer another class only if both have one first line of bases.
    bases = (cls, View) if view else (cls,)
    made: Any = type(cls)(cls.__name__ if view else f"Parametrized{cls.__name__}", bases, body)
    return made


def _empty(cls: type, names: tuple[str, ...], view: bool, called: bool, told: bool) -> Any:
    made = _derived(cls, names, view, called, told)
    return made.__new__(made)


def build(
    model: Any, given: Mapping[str, tuple[Plan, Mapping[str, Any]]], buffers: dict[str, Tensor], trainable: bool
) -> Any:
    """The view of `model`, which is a copy of ours: parametrized in place. buffers: see `_State`."""
    plans = [plan for plan, _ in given.values()]
    choice, names = Choice((next(iter(given)),), len(given) > 1), share_constants(model, plans)
    banks = {
        name: {bank: hold_bank(model, name, bank, a[bank], trainable) for bank in plan.banks}
        for name, (plan, a) in given.items()
    }
    places = places_of(model, plans)
    classes: dict[Any, Any] = {layer: type(layer) for layer in model.modules()}
    slots: dict[nn.Module, list[str]] = {model: []}

    def place(slot: str, parametrization: nn.Module) -> None:
        layer, attr = owner(model, slot)
        if attr in slots.setdefault(layer, []):
            parametrize.register_parametrization(layer, attr, parametrization, unsafe=True)
            return
        slots[layer].append(attr)
        if attr not in layer._parameters:  # what a quantised layer's forward has kept there (INC's do)
            vars(layer).pop(attr, None)
        original = layer._parameters.get(attr, nn.Parameter(torch.empty(0), requires_grad=False))
        layer._parameters[attr] = nn.Parameter(torch.empty(0), requires_grad=False)  # what is registered is written to
        parametrize.register_parametrization(layer, attr, parametrization, unsafe=True)
        layer.parametrizations[attr]._parameters["original"] = original

    calls: dict[str, dict[str, nn.Module]] = {}
    sites = {at: e.site for plan in plans for at, e in plan.items()}
    # Asked while the layers are as they were; of a quantised layer, a bias is a site like any other.
    opaque = {at: quantised(owner(model, at)[0], at) if site.quantised else None for at, site in sites.items()}
    for at in sites:
        leaves: dict[str, nn.Module] = {}
        for name, (plan, a) in given.items():
            if at in plan:
                bank = banks[name].get(plan[at].bank or "", [])
                leaves[name] = Leaf(plan[at], a[at], model, names, bank, trainable)
        if at in places:
            calls[at] = leaves
            continue
        layer, _ = owner(model, at)
        weight = opaque[at]
        if weight is not None and weight.own_forward:
            vars(layer)["forward"] = partial(_linear, layer)
        read = itself if weight is None else Bare(layer, classes[layer], at)
        place(at, Held(at, choice, leaves, read))
    biases: dict[Site, bool] = {}  # layers whose bias a method changes: whether it also gives one to a layer without
    for entry in (e for plan in plans for e in plan.values()):
        if entry.site.bias is not None and entry.changes_bias:
            biases[entry.site] = biases.get(entry.site, False) or entry.adds_bias
    for site, adds in biases.items():
        layer, attr = owner(model, site.name)
        weight = layer.parametrizations[attr]
        bias = str(site.bias).rpartition(".")[-1]
        if bias not in layer._parameters and bias not in slots[layer]:  # a buffer, or an attribute without a value
            b = vars(layer).pop(bias, None) if bias in vars(layer) else layer._buffers.pop(bias, None)
            layer._parameters[bias] = None if b is None else nn.Parameter(b, requires_grad=False)
        missing = bias not in slots[layer] and layer._parameters[bias] is None
        if missing and not adds:
            continue
        if missing:
            w = weight[0].read(weight.original)
            zeros = torch.zeros(site.matrix_shape()[0], dtype=w.dtype, device=w.device)
            layer._parameters[bias] = nn.Parameter(zeros, requires_grad=False)
        place(str(site.bias), _Bias(weight, missing))
    called = place_calls(model, places, calls, plans, choice, classes)
    for layer in {**slots, **dict.fromkeys(called)}:
        told = layer is model and any(plan.gated for plan in plans)
        layer.__class__ = _derived(classes[layer], tuple(slots.get(layer, ())), layer is model, layer in called, told)
    bare = {id(plan): without_constants(plan) for plan in plans}  # adapters of one net have one plan
    model._peftfn = _State(
        plans={name: bare[id(plan)] for name, (plan, _) in given.items()},
        banks=banks,
        choice=choice,
        offloaded=set(),
        buffers=buffers,
        constants=set(names.values()),
        sites={at: e.site for plan in plans for at, e in plan.items()},
        companions={(at, c) for plan in plans for at, cs in plan.accompanied.items() for c in cs},
    )
    if vars(model).get("is_quantized"):
        # What transformers keeps of a quantised model: Trainer refuses one without PEFT's adapters, and save_pretrained
        # would write all of it. What a view trains and saves is not quantised.
        model.is_quantized, model.hf_quantizer = False, None
    for module in model.modules():
        if not isinstance(module, (Leaf, Factors)):  # whose tensors are the view's own
            module.register_load_state_dict_pre_hook(_unshare)
    _wrap_checkpoints(model)
    return model


def tell_(view: Any) -> None:
    """Let a view tell its sites what it is called with."""
    view.__class__ = _derived(*type(view)._derived, True)


def hold_bank(view: nn.Module, name: str, bank: str, tree: Mapping[str, Any], trainable: bool) -> Paths:
    return hold(view, view, tree, trainable, f"adapter_{name}_{bank}_".replace(".", ":"))


def owner(model: nn.Module, slot: str) -> tuple[Any, str]:
    path, _, attr = slot.rpartition(".")
    return model.get_submodule(path), attr


def leaves_of(view: nn.Module) -> list[Leaf]:
    return [m for m in view.modules() if isinstance(m, Leaf)]


def held_at(view: nn.Module, site: Site) -> Any:
    """What holds the leaves of a site."""
    if site.kind in (MODULE, TOKENS):
        return view.get_submodule(site.name)._modules[CALL]
    layer, attr = owner(view, site.name)
    return layer.parametrizations[attr][0]


def leaf_at(view: Any, site: str, name: str) -> Leaf:
    leaf: Leaf = held_at(view, view._peftfn.plans[name][site].site)._modules[name]
    return leaf


def changes_bias_at(view: nn.Module, site: Site, adds: bool) -> bool:
    """Whether a method at this weight can change the layer's bias, or has none to change. adds: it makes one."""
    layer, _ = owner(view, site.name)
    attr = str(site.bias).rpartition(".")[-1]
    if attr in layer.parametrizations:
        return any(isinstance(p, _Bias) for p in layer.parametrizations[attr])
    return not adds and layer._parameters.get(attr) is None


def constants_of(view: Any, leaf: Leaf) -> dict[str, Any]:
    """The constants of a leaf: its own buffers, and those that it shares."""
    return {**leaf._buffers, **{k: view._buffers[name] for k, name in leaf._shared.items()}}


def without_constants(plan: Plan) -> Plan:
    """The plan of an adapter in a view, whose constants are buffers."""
    return Plan({site: replace(e, frozen={}) for site, e in plan.items()}, plan.rules, plan.banks)


def weight_at(view: Any, site: Site) -> Any:
    """The base's parameter at a site of a view, or the place of its module."""
    if site.kind in (MODULE, TOKENS):
        return view.get_submodule(site.name)._modules[CALL].place[0]
    layer, attr = owner(view, site.name)
    return layer.parametrizations[attr].original


def is_own(path: str) -> bool:
    """Whether the module of a view at this path is one that `as_module` put there."""
    return not {"parametrizations", CALL}.isdisjoint(path.split("."))


def share_constants(model: nn.Module, plans: list[Plan], known: Mapping[int, str] | None = None) -> dict[int, str]:
    """Constants that several leaves use become buffers of the model: {id of the constant: its name there}.

    So do those of a chain's parts, whose names, with a dot, no buffer could have. known: those that are there.
    """
    uses = [(k, t) for plan in plans for entry in plan.values() for k, t in entry.frozen.items()]
    number = Counter(id(t) for _, t in uses)
    names = dict(known or {})
    for k, t in uses:
        if (number[id(t)] > 1 or "." in k) and id(t) not in names:
            base = f"adapter_{k}".replace(".", ":")
            free = (f"{base}_{i}" if i else base for i in count())
            names[id(t)] = next(n for n in free if n not in model._buffers)
            model.register_buffer(names[id(t)], t.detach())
    return names
