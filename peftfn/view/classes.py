"""The classes of a view's layers, and of the view.

register_parametrization makes one class a module, which cannot be pickled and is compiled anew for each of many equal
layers. So there is one class here for all layers of a class that are parametrized alike.
"""

import types
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from peftfn.net.recompute import CHECKPOINT
from peftfn.tensors.lent import REPLACED
from peftfn.view.active import View, again
from peftfn.view.called import CALL, calling
from peftfn.view.told import listening

CURES = {
    "set_adapter": 'write m.use_("x") for every thread, or `with m.use("x"): …` for this one until the block ends',
    "disable_adapter": "write `with m.use(None): …`, which makes the base active in this thread until the block ends",
    "disable_adapters": "write `with m.use(None): …`, or m.use_(None) for every thread",
    "enable_adapters": 'write m.use_("x")',
    "active_adapters": "print(peftfn.status(m))",
    "get_adapter_state_dict": "peftfn.adapter_of(m) is a dict of tensors; peftfn.state_dict(net, a) has PEFT's names",
    "add_adapter": 'write peftfn.attach_(m, "x", a), or pass all by name, peftfn.as_module(net, x=a, y=b)',
    "load_adapter": 'net, a = peftfn.load(path, model) reads one; peftfn.attach_(m, "x", (net, a)) adds it',
    "delete_adapter": 'write peftfn.detach_(m, "x")',
    "merge_and_unload": "peftfn.merged_model(net, peftfn.adapter_of(m)) returns a merged model",
    "print_trainable_parameters": "print(peftfn.status(m))",
}
"""Methods of PEFT's models, which also transformers' have → what to write instead."""


def _checkpointing(cls: Any) -> Callable[..., None]:
    """transformers' `_set_gradient_checkpointing`, with the adapter of the forward pass in the recomputation."""

    @wraps(cls._set_gradient_checkpointing)
    def set_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        cls._set_gradient_checkpointing(self, *args, **kwargs)
        wrap_checkpoints(self)

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


def wrap_checkpoints(view: Any) -> None:
    for module in view.modules():
        if CHECKPOINT in vars(module):
            vars(module)[CHECKPOINT] = partial(_checkpoint, view, vars(module)[CHECKPOINT])


def _checkpoint(view: View, original: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    active, told = view._peftfn.choice.active, view._peftfn.choice.here.told

    def under(*args: Any, **kwargs: Any) -> Any:
        with again(view, active, told):
            return run(*args, **kwargs)

    return original(under, *args, **kwargs)


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
def derived(cls: Any, names: tuple[str, ...], view: bool, called: bool, told: bool) -> Any:
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
    made = derived(cls, names, view, called, told)
    return made.__new__(made)
