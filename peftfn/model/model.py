"""A model as a value: its modules, sites, parameters and buffers by name, read in one walk."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from peftfn.model.place import TOKENS, Place, backbones_in, places_in
from peftfn.model.site import Site, sites_in
from peftfn.tensors.loaded import Source, Weights, source_of, sources_in
from peftfn.tensors.quantised import QuantisedWeight, quantised


@dataclass(frozen=True)
class Model:
    """What a model has at one moment. Whoever needs it reads it once, with `Model.of`, and hands it down: a walk over
    a large model takes milliseconds. It is not kept between calls, since the model's owner may change the model.

    The mappings have every name of what they hold (a submodule that the model has twice has two), in the model's order;
    `sites` alone has each site once, by its first name.
    """

    modules: Mapping[str, nn.Module]
    sites: Mapping[str, Site]
    parameters: Mapping[str, nn.Parameter]  # as the modules hold them; tied ones are one, also where they are offloaded
    weights: Weights
    """As constants of a calculation: detached, quantised ones by what stands for them, and those that a hook puts in
    place for each call (offload) loaded when they are asked for."""
    buffers: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> "Model":
        """TypeError if it is not a module, ValueError if it has parameters that are not initialised (lazy modules)."""
        if not isinstance(model, nn.Module):
            cure = "give it first"
            if isinstance(model, str):
                cure = f"load it first, as transformers' AutoModelForCausalLM.from_pretrained({model!r}) does"
            elif isinstance(getattr(model, "model", None), nn.Module):
                cure = "give its .model"
            raise TypeError(f"the model must be a torch.nn.Module, not {type(model).__name__}: {cure}")
        modules = modules_of(model)
        stand_ins, sources = quantised_in(modules), sources_in(modules)
        parameters = dict(_held(modules, "_parameters"))
        parameters |= _tied(model, parameters, sources)
        sites = sites_in(modules, stand_ins, parameters)
        buffers = dict(_held(modules, "_buffers"))
        return cls(modules, sites, parameters, _weights(parameters, stand_ins, sources), buffers)

    @property
    def root(self) -> nn.Module:
        return self.modules[""]

    @cached_property
    def distinct(self) -> dict[str, nn.Module]:
        """Each module once, by its first name, as `named_modules` gives them."""
        first: dict[nn.Module, str] = {}
        for name, module in self.modules.items():
            first.setdefault(module, name)
        return {name: module for module, name in first.items()}

    @cached_property
    def places(self) -> dict[str, Site]:
        """The modules as sites, each once, by its first name."""
        return places_in(self.modules)

    @cached_property
    def backbones(self) -> dict[str, Site]:
        """The backbones as sites, each once, by its first name."""
        return backbones_in(self.modules)

    def at(self, places: Iterable[Site]) -> dict[str, Place]:
        """What methods see of the modules at these sites; of those that the model still has."""
        return _at(self.root, self.modules, places)

    @cached_property
    def named(self) -> dict[str, Site]:
        """The sites by every name."""
        return {n: s for s in self.sites.values() for n in (s.name, *s.aliases)}


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every name of every module of the model → the module. The one walk."""
    return dict(model.named_modules(remove_duplicate=False))


def quantised_in(modules: Mapping[str, nn.Module]) -> dict[str, QuantisedWeight]:
    """What stands for the weights of the quantised layers, by every name; one for each layer."""
    known: dict[nn.Module, QuantisedWeight | None] = {}
    out = {}
    for prefix, module in modules.items():
        name = f"{prefix}.weight" if prefix else "weight"
        if module not in known:
            known[module] = _stand_in(module, name)
        if (w := known[module]) is not None:
            out[name] = w
    return out


def _tied(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], sources: Mapping[str, tuple[Source, str]]
) -> dict[str, nn.Parameter]:
    """Offloaded parameters that transformers ties, by the one that they are tied to: each layer has a tensor of its own
    without values then."""
    known = getattr(model, "all_tied_weights_keys", None) if sources else None
    pairs = known.items() if isinstance(known, Mapping) else ()
    return {n: parameters[of] for n, of in pairs if n in sources and of in parameters and n in parameters}


def _stand_in(module: nn.Module, name: str) -> QuantisedWeight | None:
    source = source_of(module)
    if source is not None and source.stored is None:
        return None  # its dtype between calls is not the one that it computes in
    w = quantised(module, name)
    if source is not None and w is not None:
        raise ValueError(
            f"{name}: accelerate's offload puts this layer's tensors in place for each call, and it is quantised "
            f"({type(module).__name__}). Load the model with a device_map that keeps quantised layers on devices"
        )
    return w


def weights_of(model: nn.Module, places: Iterable[Site] = ()) -> Weights:
    """The `weights` of `Model.of(model)` alone: the model's parameters as they are now, as constants; and the `Place`
    of each of these sites that the model still has."""
    modules = modules_of(model)
    weights = _weights(dict(_held(modules, "_parameters")), quantised_in(modules), sources_in(modules))
    return weights | _at(model, modules, places)


def sites(model: nn.Module) -> dict[str, Site]:
    """Return every parameter of the model as a site, one for each slot, in the model's own order.

    Args:
        model: any module.

    Returns:
        {name: Site}.

    Raises:
        ValueError: a parameter of a lazy module is not initialised yet.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        assert list(pf.sites(model)) == ["0.weight", "0.bias"]
    """
    return dict(Model.of(model).sites)


def places(model: nn.Module, *, backbones: bool = False) -> dict[str, Site]:
    """Return every module of the model that is called as a site, in the model's own order; the model itself is "".

    Args:
        model: any module.
        backbones: whether to return the backbones alone: the innermost modules whose forward takes inputs_embeds and
            attention_mask, where methods on a model's inputs stand.

    Returns:
        {name: Site}. A site's shape is the width of the hidden states that come out of the module, as far as its
        weights tell it; 0 if they do not.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh())
        assert pf.places(model)["0"].shape == (4,)
    """
    known = Model.of(model)
    return dict(known.backbones if backbones else known.places)


def _held(modules: Mapping[str, nn.Module], kind: str) -> list[tuple[str, Any]]:
    return [
        (f"{prefix}.{k}" if prefix else k, t)
        for prefix, module in modules.items()
        for k, t in getattr(module, kind).items()
        if t is not None
    ]


def _at(model: nn.Module, modules: Mapping[str, nn.Module], places: Iterable[Site]) -> dict[str, Place]:
    return {s.name: Place.of(model, s.name, s.kind == TOKENS) for s in places if s.name in modules}


def _weights(
    parameters: Mapping[str, nn.Parameter],
    stand_ins: Mapping[str, QuantisedWeight],
    sources: Mapping[str, tuple[Source, str]],
) -> Weights:
    """Parameters as constants; quantised weights by what stands for them, and the bias of such a layer also where it
    is a buffer; those with a source are loaded from there."""
    out: dict[str, Any] = {n: p.detach() for n, p in parameters.items()}
    for name, w in stand_ins.items():
        out[name] = w
        bias = w.bias()
        if bias is not None:
            out.setdefault(name.removesuffix("weight") + "bias", bias.detach())
    return Weights(out, {n: s for n, s in sources.items() if n not in stand_ins})
