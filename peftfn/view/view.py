"""What `as_module` builds: a parametrization at each site, which holds the leaves and returns the adapted weight."""

import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial, wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from peftfn.core.plan import Entry, Plan
from peftfn.model.names import near
from peftfn.model.site import Site
from peftfn.net.skeleton import CHECKPOINT
from peftfn.slots.slot import plus
from peftfn.slots.weight import AdaptedWeight
from peftfn.tensors.lent import REPLACED
from peftfn.tensors.quantised import Bare, quantised
from peftfn.tensors.transform import backward_task

EXTRA = "_extra_state"
"""How torch names what a module's get_extra_state gives."""

# A name in the tree of an adapter becomes a parameter's name with "/" between its parts and ":" for dots, which torch
# does not allow there.

Paths = list[tuple[tuple[str, ...], str]]
"""(keys in the adapter's tree, name of the parameter), in order"""


def _flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for k, v in tree.items():
        if isinstance(v, Mapping):
            yield from _flat(v, (*path, k))
        else:
            yield (*path, k), v


def grown(paths: Paths, tensors: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for (*nodes, last), name in paths:
        at = out
        for node in nodes:
            at = at.setdefault(node, {})
        at[last] = tensors[name]
    return out


def _hold(module: nn.Module, tree: Mapping[str, Any], prefix: str = "") -> Paths:
    """Give the tensors of `tree` to `module`, as new parameters."""
    paths = []
    for path, t in _flat(tree):
        name = prefix + "/".join(path).replace(".", ":")
        module.register_parameter(name, nn.Parameter(t.detach().clone()))
        paths.append((path, name))
    return paths


class _Choice(threading.local):
    """Which adapter is active in this thread. pinned: a `use` says so."""

    def __init__(self, default: str, several: bool):
        self.name: str | None = default
        self.default, self.several, self.pinned = default, several, False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Choice, (self.default, self.several)


class Leaf(nn.Module):
    """One adapter at one site."""

    def __init__(self, entry: Entry, tree: Mapping[str, Any], root: nn.Module, names: Mapping[int, str], bank: Paths):
        super().__init__()  # its own attributes have an underscore: the others' names belong to the methods
        self._paths = _hold(self, tree)
        self._plain = all(path == (name,) for path, name in self._paths)
        self._shared = {k: names[id(t)] for k, t in entry.frozen.items() if id(t) in names}
        for k, t in entry.frozen.items():
            if k not in self._shared:
                self.register_buffer(k, t.detach())
        # The entry reads its constants where `.to` and load_state_dict put them.
        self._entry = replace(entry, frozen=self._buffers)  # type: ignore[arg-type]
        self._meant = replace(self._entry, method=entry.method.eval())
        self._bank = bank
        self._root = (root,) if self._shared or bank else ()  # in a tuple: no submodule of this one

    def tree(self) -> dict[str, Any]:
        return self._parameters if self._plain else grown(self._paths, self._parameters)  # type: ignore[return-value]

    def extra_repr(self) -> str:
        return str(self._entry.method)

    def adapted(self, w: Tensor) -> AdaptedWeight:
        entry, common = self._entry if self.training else self._meant, {}
        if self._root:
            buffers = self._root[0]._buffers
            shared = {k: buffers[name] for k, name in self._shared.items()}
            common = _with(grown(self._bank, self._root[0]._parameters), shared)
        return AdaptedWeight(entry, *entry.tensors(self.tree(), common, entry.site.canonical(w)), w)


def _with(bank: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
    """The bank and the shared constants, at every term of a sum or scaling."""
    return shared | {k: _with(v, shared) if isinstance(v, dict) else v for k, v in bank.items()}


class _Site(nn.ModuleDict):
    """The parametrization of an adapted parameter: adapter's name → its leaf here."""

    def __init__(self, name: str, choice: _Choice, leaves: dict[str, nn.Module], read: Callable[[Tensor], Any]):
        super().__init__(leaves)
        self.site, self.choice = name, choice
        self.read: Callable[[Tensor], Any] = read  # the parameter ↦ what methods take for the weight

    def leaf(self) -> Any:
        """The leaf of the active adapter, or None."""
        choice = self.choice
        if choice.several and not choice.pinned and not torch.compiler.is_compiling() and backward_task() != -1:
            raise RuntimeError(
                f"{self.site}: recomputed in a backward pass, which does not know which of the module's adapters was "
                "active in the forward pass. Turn checkpointing on with gradient_checkpointing_enable(), or pass "
                "context_fn=m.checkpoint_context and use_reentrant=False to torch.utils.checkpoint"
            )
        return self._modules.get(choice.name) if choice.name is not None else None

    def forward(self, w: Tensor) -> Any:
        leaf, w = self.leaf(), self.read(w)
        if leaf is None:
            return w
        value = leaf.adapted(w)
        return value.dense() if leaf._entry.site.kind == "other" else value


class _Bias(nn.Module):
    """The parametrization of a bias that the method at its layer's weight changes."""

    def __init__(self, weight: nn.Module, missing: bool):
        super().__init__()
        self.weight, self.missing = (weight,), missing  # in a tuple: no submodule of this one

    def forward(self, b: Tensor | None) -> Tensor | None:
        b = None if self.missing else b
        weight: Any = self.weight[0]
        leaf = weight[0].leaf()
        if leaf is None or not leaf._entry.changes_bias:
            return b
        w = leaf.adapted(weight[0].read(weight.original))
        new = w.entry.new_bias(w.method, w.p, b, w.dtype)
        return b if new is None else new


@dataclass
class _State:
    """What a view stores about its adapters."""

    plans: dict[str, Plan]
    banks: dict[str, dict[str, Paths]]
    choice: _Choice
    offloaded: set[str]


CURES = {
    "set_adapter": 'write `with m.use("x"): …`, which makes the adapter active in this thread until the block ends',
    "disable_adapter": "write `with m.use(None): …`, which makes the base active in this thread until the block ends",
    "add_adapter": "pass all adapters by name when you make the module, peftfn.as_module(net, x=a, y=b)",
    "load_adapter": "net, a = peftfn.load(path, model) reads one; pass all by name, peftfn.as_module(net, x=a, y=b)",
    "merge_and_unload": "peftfn.merged_model(net, peftfn.adapter_of(m)) returns a merged model",
    "print_trainable_parameters": "print(peftfn.status(m))",
}
"""Methods of PEFT's models, which also transformers' have → what to write instead."""


class View:
    """What `as_module` adds to the model's class."""

    _peftfn: _State

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Make the adapter `name` active in this thread, until the block ends; None is the base."""
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"use: {name!r} is not a name; one adapter is active at a time. For a sum of two, make a module of it, "
                "as_module(net, both=peftfn.add(a, b)); for one adapter per row, net.mixed"
            )
        if name is not None and name not in self._peftfn.plans:
            raise KeyError(f"use: the module has no adapter {name!r}{near(name, list(self._peftfn.plans))}")
        if name in self._peftfn.offloaded:
            raise ValueError(f"use: adapter {name!r} is offloaded; bring it back with peftfn.onload_(m, {name!r})")
        choice = self._peftfn.choice
        before = choice.name, choice.pinned
        choice.name, choice.pinned = name, True
        try:
            yield
        finally:
            choice.name, choice.pinned = before

    def checkpoint_context(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """`context_fn` of torch.utils.checkpoint: the recomputation uses the adapter that is active now."""
        return nullcontext(), self.use(self._peftfn.choice.name)


def _unshare(module: Any, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Before a layer loads its part of a state dict, also through a wrapper around the view: a tensor whose values
    differ from the base's gets its own storage, so that the base does not change. ValueError while an adapter of the
    view is offloaded to meta.
    """
    ours: set[str] = set()
    if isinstance(module, View):
        refuse_empty(module, "load_state_dict")
        ours = {name for banks in module._peftfn.banks.values() for paths in banks.values() for _, name in paths}
    for name, t in chain(module._parameters.items(), module._buffers.items()):
        given = state_dict.get(prefix + name)
        if name in ours or t is None or type(t.data) is not Tensor or given is None or _equal(t, given):
            continue
        t.data = t.data.clone()


def refuse_empty(view: Any, what: str) -> None:
    """Raise ValueError if an adapter of the view has no values because it was offloaded to meta."""
    for module in view.modules():
        for name, leaf in module._modules.items() if isinstance(module, _Site) else ():
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


def _saving(cls: Any) -> Callable[..., Any]:
    """transformers' `save_pretrained`, which Trainer writes checkpoints with: everything but the frozen base."""

    @wraps(cls.save_pretrained)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> Any:
        refuse_empty(self, "save_pretrained")
        leaves = {id(p) for leaf in self.modules() if isinstance(leaf, Leaf) for p in leaf.parameters()}
        banks = [name for of in self._peftfn.banks.values() for paths in of.values() for _, name in paths]
        leaves |= {id(self._parameters[name]) for name in banks}
        named = self.named_parameters(remove_duplicate=False)
        ours = {k for k, p in named if p.requires_grad or id(p) in leaves}
        ours |= {k for k, _ in self.named_buffers(remove_duplicate=False)}
        held = self.state_dict() if state_dict is None else state_dict
        # the rest is the frozen base, or what its quantised layers write beside it
        kept = {k: t for k, t in held.items() if k in ours or k.endswith(EXTRA)}
        return cls.save_pretrained(self, save_directory, *args, state_dict=kept, **kwargs)

    return save_pretrained


def _unless_adapted(cls: Any, name: str) -> Callable[..., Any]:
    """transformers' functions that replace the parameters of the embeddings, which an adapted layer cannot allow.

    Tied layers are tied since `as_module`, so `tie_weights` has nothing to do.
    """
    original = getattr(cls, name)

    @wraps(original)
    def function(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers = [m for m in (self.get_input_embeddings(), self.get_output_embeddings()) if m is not None]
        held = next((m for m in layers if parametrize.is_parametrized(m, "weight")), None)
        if held is None:
            return original(self, *args, **kwargs)
        if name == "tie_weights":
            return None
        raise ValueError(
            f"{held.parametrizations.weight[0].site}: {name} would replace this parameter, and it is adapted. Call "
            "it on the model first, and then adapt the model"
        )

    return function


def _wrap_checkpoints(view: Any) -> None:
    for module in view.modules():
        if CHECKPOINT in vars(module):
            vars(module)[CHECKPOINT] = partial(_checkpoint, view, vars(module)[CHECKPOINT])


def _checkpoint(view: View, original: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    name = view._peftfn.choice.name

    def under(*args: Any, **kwargs: Any) -> Any:
        with view.use(name):
            return run(*args, **kwargs)

    return original(under, *args, **kwargs)


def _itself(w: Tensor) -> Tensor:
    return w


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
        value = held._parameters["original"]
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
def _derived(cls: Any, names: tuple[str, ...], view: bool) -> Any:
    """A subclass of `cls` whose attributes `names` are parametrized; the root of a view has the methods of one."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        _, _, state, *items = super(made, self).__reduce_ex__(protocol)
        if "_flat_weights" in state:  # an RNN keeps what its slots gave in the last call, graph and all; it looks anew
            state = state | {"_flat_weights": [torch.empty(0) for _ in state["_flat_weights"]]}
        return _empty, (cls, names, view), state, *items

    def register_parameter(self: nn.Module, name: str, param: Any) -> None:
        if name in names and name not in self._parameters:
            setattr(self, name, None)
        super(made, self).register_parameter(name, param)

    body: dict[str, Any] = {"__module__": cls.__module__, "__doc__": cls.__doc__, "__reduce_ex__": reduce}
    body |= {name: _slot(name) for name in names}
    if names:
        body["register_parameter"] = register_parameter  # what assigning a parameter does
    if view:
        body["__qualname__"] = cls.__qualname__
        body |= {k: v for k, v in vars(View).items() if isinstance(v, types.FunctionType)}  # before the model's own
        body |= {word: _refusal(word, cure) for word, cure in CURES.items()}
        if hasattr(cls, "_set_gradient_checkpointing"):
            body["_set_gradient_checkpointing"] = _checkpointing(cls)
        if hasattr(cls, "save_pretrained"):
            body["save_pretrained"] = _saving(cls)
        for name in ("tie_weights", "resize_token_embeddings"):
            if hasattr(cls, name):
                body[name] = _unless_adapted(cls, name)
    # The class comes first: Python gives a layer another class only if both have one first line of bases.
    bases = (cls, View) if view else (cls,)
    made: Any = type(cls)(cls.__name__ if view else f"Parametrized{cls.__name__}", bases, body)
    return made


def _empty(cls: type, names: tuple[str, ...], view: bool) -> Any:
    made = _derived(cls, names, view)
    return made.__new__(made)


def build(model: Any, given: Mapping[str, tuple[Plan, Mapping[str, Any]]]) -> Any:
    """The view of `model`, which is a copy of ours: parametrized in place."""
    plans = [plan for plan, _ in given.values()]
    choice, names = _Choice(next(iter(given)), len(given) > 1), _share_constants(model, plans)
    banks = {
        name: {bank: _hold(model, a[bank], f"adapter_{name}_{bank}_".replace(".", ":")) for bank in plan.banks}
        for name, (plan, a) in given.items()
    }
    classes: dict[Any, Any] = {layer: type(layer) for layer in model.modules()}
    slots: dict[nn.Module, list[str]] = {model: []}

    def place(slot: str, parametrization: nn.Module) -> None:
        layer, attr = owner(model, slot)
        if attr in slots.setdefault(layer, []):
            parametrize.register_parametrization(layer, attr, parametrization, unsafe=True)
            return
        slots[layer].append(attr)
        original = layer._parameters.get(attr, nn.Parameter(torch.empty(0), requires_grad=False))
        layer._parameters[attr] = nn.Parameter(torch.empty(0), requires_grad=False)  # what is registered is written to
        parametrize.register_parametrization(layer, attr, parametrization, unsafe=True)
        layer.parametrizations[attr]._parameters["original"] = original

    for at in dict.fromkeys(at for plan in plans for at in plan):
        leaves: dict[str, nn.Module] = {}
        for name, (plan, a) in given.items():
            if at in plan:
                leaves[name] = Leaf(plan[at], a[at], model, names, banks[name].get(plan[at].bank or "", []))
        layer, _ = owner(model, at)
        opaque = quantised(layer, at)
        if opaque is not None and opaque.own_forward:
            vars(layer)["forward"] = partial(_linear, layer)
        read = _itself if opaque is None else Bare(layer, classes[layer], at)
        place(at, _Site(at, choice, leaves, read))
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
    for layer, attrs in slots.items():
        layer.__class__ = _derived(classes[layer], tuple(attrs), layer is model)
    # The plans without their constants, which stand in the module now.
    kept = {
        name: Plan({site: replace(e, frozen={}) for site, e in plan.items()}, plan.rules, plan.banks)
        for name, (plan, _) in given.items()
    }
    model._peftfn = _State(kept, banks, choice, set())
    if vars(model).get("is_quantized"):
        # What transformers keeps of a quantised model: Trainer refuses one without PEFT's adapters, and save_pretrained
        # would write all of it. What a view trains and saves is not quantised.
        model.is_quantized, model.hf_quantizer = False, None
    for module in model.modules():
        if not isinstance(module, Leaf):  # whose tensors are the view's own
            module.register_load_state_dict_pre_hook(_unshare)
    _wrap_checkpoints(model)
    return model


def owner(model: nn.Module, slot: str) -> tuple[Any, str]:
    path, _, attr = slot.rpartition(".")
    return model.get_submodule(path), attr


def leaf_at(view: nn.Module, site: str, name: str) -> Leaf:
    layer, attr = owner(view, site)
    leaf: Leaf = layer.parametrizations[attr][0]._modules[name]
    return leaf


def _share_constants(model: nn.Module, plans: list[Plan]) -> dict[int, str]:
    """Constants that several leaves use become buffers of the model: {id of the constant: its name there}.

    So do those of a chain's parts, whose names, with a dot, no buffer could have.
    """
    uses = [(k, t) for plan in plans for entry in plan.values() for k, t in entry.frozen.items()]
    count = Counter(id(t) for _, t in uses)
    names: dict[int, str] = {}
    for k, t in uses:
        if (count[id(t)] > 1 or "." in k) and id(t) not in names:
            base = f"adapter_{k}".replace(".", ":")
            taken = sum(n == base or n.startswith(f"{base}_") for n in names.values())
            names[id(t)] = f"{base}_{taken}" if taken else base
            model.register_buffer(names[id(t)], t.detach())
    return names
