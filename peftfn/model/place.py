"""Modules as sites: which modules a model has, and what a method that acts on one sees of it."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Size, Tensor, nn

from peftfn.model.site import Site, is_conv1d
from peftfn.tensors.loaded import source_of
from peftfn.tensors.transform import building

MODULE, TOKENS = "module", "tokens"
"""Kinds of site that are no parameters: any module, and a backbone, which embeds tokens."""
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_BYPASSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""torch's modules that compute with the weights of their parts, without calling them."""


class Place:
    """What a method sees of the module that it acts on: its sizes, its settings and, to read only, the module itself.

    It stands where methods for weights have w: `init(rng, m)`, `frozen(rng, m)`, `prepare(p, m)`. In a call, the
    module is the one that runs, so the weights that it holds are those of this call: adapted where the net adapts them.

    Attributes:
        name: the module's dotted name; "" is the model itself.
        module: the module.
        arguments: the names of the arguments of its forward.
        made_of: the module's class, in the model.
        config: the configuration of the module, or of the nearest module around it that has one; None if none has.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        place = pf.Place.of(model, "0")
        assert (place.width_in, place.width) == (8, 4)
    """

    requires_grad = False  # as callers ask of a weight

    def __init__(self, name: str, module: nn.Module, config: Any, widths: tuple[int, int], like: "Where | None"):
        self.name, self.module, self.config, self._widths = name, module, config, widths
        self.shape, self._like, self.arguments = Size((widths[1],)), like, arguments_of(module)
        self._forward: Any = module.forward
        self.made_of, self._networks = type(module), dict[Any, nn.Module]()

    @classmethod
    def of(cls, model: nn.Module, name: str, tokens: bool = False) -> "Place":
        """The place of a module of the model. tokens: as a backbone, whose width is that of its embeddings."""
        module, config = model, getattr(model, "config", None)
        for part in name.split(".") if name else ():
            module = getattr(module, part)
            config = getattr(module, "config", None) or config
        like = first_floats(module) or first_floats(model)
        like = None if like is None else _in_call(like, model, name)
        return cls(name, module, config, _embedded(module) if tokens else widths(module, config), like)

    def within(self, module: nn.Module, forward: Any, like: "Where | None" = None) -> "Place":
        """The same place of a copy of the model. forward: the module's own, or the class that has it. like: where to
        look for dtype and device."""
        out = copy.copy(self)
        out.module, out._forward, out._like, out._networks = module, forward, like or self._like, {}
        return out

    @property
    def forward(self) -> Callable[..., Any]:
        """The module's own forward, without any adapter at this place."""
        own = self._forward
        is_class = inspect.isclass(own) and issubclass(own, nn.Module)
        return partial(own.forward, self.module) if is_class else own  # the compiler knows no MethodType

    @property
    def dtype(self) -> torch.dtype:
        """Of the module's first floating-point parameter; if it has none, of the model's."""
        return torch.float32 if self._like is None else self._like[0][self._like[1]].dtype

    @property
    def device(self) -> torch.device:
        """As `dtype`."""
        return torch.device("cpu") if self._like is None else self._like[0][self._like[1]].device

    @property
    def is_meta(self) -> bool:
        return self.device.type == "meta"

    @property
    def label(self) -> str:
        """The name, for messages."""
        return self.name or "the model"

    @property
    def width(self) -> int:
        """The size of the hidden states that come out. ValueError if it cannot be told from the module."""
        return self._known(1, "that come out of")

    @property
    def width_in(self) -> int:
        """The size of the hidden states that go in. ValueError if it cannot be told from the module."""
        return self._known(0, "that go into")

    @property
    def sizes(self) -> tuple[int, int]:
        """(width_in, width); 0 for one that is not known."""
        return self._widths

    def _known(self, which: int, what: str) -> int:
        if not self._widths[which]:
            raise ValueError(
                f"the size of the hidden states {what} this {type(self.module).__name__} cannot be told from its "
                "weights: give the method dim=…, if it has this field, or name another module"
            )
        return self._widths[which]

    def get(self, path: str) -> Any:
        """A part of the module, by its dotted name; it may be called, and has the weights of this call."""
        return self.module.get_submodule(path)

    def embedding(self) -> nn.Module:
        """The module that embeds a backbone's tokens."""
        found: nn.Module = self.module.get_input_embeddings()  # type: ignore[operator]
        return found

    def again(self, params: Mapping[str, Tensor], args: Any, kwargs: Any) -> Any:
        """The module's own forward once more, with other tensors for some of its parameters, by name."""
        with swapped(self.module, params):
            return self.forward(*args, **kwargs)

    def network(self, key: Any, make: Callable[[], nn.Module]) -> nn.Module:
        """A module without values that a method runs here with tensors of its leaf: made once for each copy of the
        model, since calls at the same time have different ones."""
        if key not in self._networks:
            with building():
                self._networks[key] = make()
        return self._networks[key]

    def run(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What stands in a call slot has this method; without an adapter the module's own forward is all there is."""
        return forward(*args, **kwargs)

    def is_floating_point(self) -> bool:
        return True

    def dim(self) -> int:
        return 1


Where = tuple[Mapping[str, Any], str]
"""(the parameters of a module, the name of one)"""


def _in_call(where: Where, model: nn.Module, name: str) -> Where:
    """As a parameter is in a call, where a hook puts it in place then; name: of a module of the model around it."""
    slots, k = where
    path = [model]
    for part in name.split(".") if name else ():
        path.append(getattr(path[-1], part))
    owner = next((m for m in model.modules() if m._parameters is slots), model)
    source = next((s for m in (owner, *reversed(path)) if (s := source_of(m)) is not None), None)
    if source is None:
        return where
    p = slots[k]
    device = source.device or p.device
    return {k: torch.empty(0, dtype=source.dtype_of(p), device=device)}, k


def first_floats(module: nn.Module, but: type | tuple[type, ...] = ()) -> Where | None:
    """Where a module's first floating-point parameter is; those of parts of the classes `but` do not count."""
    layers = (layer for layer in module.modules() if not isinstance(layer, but))
    held = ((m._parameters, k, p) for m in layers for k, p in m._parameters.items())
    return next(((slots, k) for slots, k, p in held if p is not None and p.is_floating_point()), None)


@contextmanager
def swapped(module: nn.Module, params: Mapping[str, Tensor]) -> Iterator[None]:
    """While it lasts, parameters and buffers of a private module are these."""
    held: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for name, t in params.items():
            path, _, k = name.rpartition(".")
            layer = module.get_submodule(path)
            slots: Any = next((d for d in (layer._parameters, layer._buffers) if k in d), None)
            if slots is None:
                raise ValueError(f"{type(module).__name__} has no parameter {name} that could be another for a call")
            for where, key in ((vars(layer), "forward"), (slots, k)):  # the forward may be that of its adapted weight
                if key in where:
                    held.append((where, key, where[key]))
            vars(layer).pop("forward", None)
            slots[k] = t
        yield
    finally:
        for where, key, value in reversed(held):
            where[key] = value


def arguments_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward, as its class has it."""
    return _arguments(type(module).forward)


@cache
def _arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(n for n in inspect.signature(forward).parameters if n != "self")


def places_in(modules: Mapping[str, nn.Module]) -> dict[str, Site]:
    """Every module that is called as a site, by its first name; modules: every name of each."""
    names: dict[nn.Module, list[str]] = {}
    configs: dict[str, Any] = {}
    hidden: set[str] = set()  # modules inside of those that do not call their parts
    for name, module in modules.items():
        names.setdefault(module, []).append(name)
        above = name.rpartition(".")[0]
        configs[name] = getattr(module, "config", None) or (configs.get(above) if name else None)
        if name and (above in hidden or isinstance(modules[above], _BYPASSED)):
            hidden.add(name)
    return {
        name: Site(name, MODULE, Size((widths(module, configs[name])[1],)), aliases=tuple(others))
        for module, (name, *others) in names.items()
        if name not in hidden and not isinstance(module, _CONTAINERS)
    }


def backbones_in(modules: Mapping[str, nn.Module]) -> dict[str, Site]:
    """The backbones, by their first name: the innermost modules whose forward takes inputs_embeds and attention_mask.

    modules: every name of each module.
    """
    wants = {"inputs_embeds", "attention_mask"}
    takes = [n for n, m in modules.items() if wants <= set(arguments_of(m)) and _embedded(m)[1]]
    names: dict[nn.Module, list[str]] = {}
    for name in takes:
        if not any(other != name and (not name or other.startswith(f"{name}.")) for other in takes):
            names.setdefault(modules[name], []).append(name)
    return {
        name: Site(name, TOKENS, Size((_embedded(module)[1],)), aliases=tuple(others))
        for module, (name, *others) in names.items()
    }


def _embedded(module: nn.Module) -> tuple[int, int]:
    """The width of a backbone's embeddings, which may be narrower than its hidden states; 0 if it has none."""
    try:
        weight = module.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    except (AttributeError, NotImplementedError):
        return 0, 0
    return weight.shape[-1], weight.shape[-1]


def is_causal(module: nn.Module) -> bool:
    """Whether no token of a backbone attends to later ones."""
    decoder = getattr(getattr(module, "config", None), "is_decoder", False)
    return bool(decoder) or any(getattr(m, "is_causal", False) is True for m in module.modules())


def is_encoder_of_two(module: nn.Module, config: Any) -> bool:
    """Whether a backbone is one that a decoder attends to. config: its own, or the nearest.

    A decoder is told by its attention: in some models (BART's) both have one configuration, which is no decoder's.
    """
    return bool(getattr(config, "is_encoder_decoder", False)) and not is_causal(module)


def widths(module: nn.Module, config: Any = None) -> tuple[int, int]:
    """The sizes of the hidden states that go into a module and come out of it, as far as its weights tell; 0: unknown.

    A layer's weight says both. Of a module of several layers, the first weight says what goes in and the last what
    comes out; but a module with a configuration, or of experts (whose last weight is the router's), has the
    configuration's hidden_size, if a weight of it has this size.

    config: the nearest configuration.
    """
    sizes = [s for m in module.modules() if (s := _sizes(m)) is not None]
    if not sizes:
        return 0, 0
    if _sizes(module) is None:
        own = getattr(module, "config", None)
        experts = any(p.dim() == 3 for p in module.parameters())
        size = getattr(own if own is not None else config if experts else None, "hidden_size", None)
        if size is not None and any(size in p.shape for p in module.parameters()):
            return int(size), int(size)
    return sizes[0][0], sizes[-1][1]


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of one layer; None if it has no weight of its own."""
    w = module._parameters.get("weight")
    if hasattr(module, "in_features") and hasattr(module, "out_features"):  # also of quantised layers
        return module.in_features, module.out_features  # type: ignore[return-value]
    if w is None:
        return None
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return 0, module.embedding_dim
    if is_conv1d(module):
        return w.shape[0], w.shape[1]
    if w.dim() == 1:
        return w.shape[0], w.shape[0]
    return (w.shape[1], w.shape[0]) if w.dim() == 2 else (0, 0)  # a convolution has its channels first
