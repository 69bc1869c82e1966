"""as_module: an adapter in an `nn.Module`, for the tools that want one. Trainer, generate, DDP, FSDP, export.

The module is a copy of the model's structure that shares the storage of its parameters. At each site stands a
`torch.nn.utils.parametrize` parametrization, which holds the leaves of the site and gives the adapted weight
(`view.py`). Functions whose names end in `_` change the module, or the adapter, that they are given.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peftfn.core import functions
from peftfn.core.plan import Adapter, Plan
from peftfn.model.model import weights_of
from peftfn.model.names import near
from peftfn.model.structure import lasting_copy
from peftfn.net.net import Adapted
from peftfn.tensors.sharded import is_sharded, laid_out, reshard_
from peftfn.tensors.tree import leaves, mapped
from peftfn.view.view import Leaf, View, build, grown, leaf_at, owner

DEFAULT = "default"


def as_module(
    net: Adapted, adapter: Mapping[str, Any] | None = None, /, *, copy_base: bool = False, **named: Any
) -> Any:
    """The adapted model as an `nn.Module` of the model's own class: isinstance, generate, config, signature.

    It shares the storage of the base's parameters, which do not require gradients in it. The leaves are parameters of
    its own, copies of the adapter's tensors, and the only ones that train. Its buffers, hooks, settings and modes are
    its own too, so adapter dropout follows its train() and eval(). The base stays as it is, and usable.

    Two names of one tied tensor are two sites, as in `adapt`: an adapted embedding leaves the head it is tied to as it
    is, unless a rule takes both.

    Whoever writes to the module's base parameters writes to the base, and so to every other module made of it. Tools
    that average all parameters do: an EMA, a target or reference network. Give such a module `copy_base=True`.

    Args:
        adapter: what stands in the module; its name there is "default".
        named: in its place, several by name: an adapter of `net`, or a pair (another net of the same model, its
            adapter). The first is in force until `use` says otherwise.
        copy_base: whether the module has parameters of its own, which nobody shares, for the memory of a second base.

    Returns:
        The module, with two methods more than the model has:
        `with m.use(name): …`: for this thread, the adapter `name` is in force; None is the base.
        `m.checkpoint_context`: `context_fn` for a torch.utils.checkpoint of your own.

    Raises:
        ValueError: no adapter, a name that cannot be one, a net of another model, of such a module, or of a model whose
            parameters have other shapes now, or a layer that cannot hold an adapter: parametrized already, or with
            weights that a hook puts there for each call (offload).
        TypeError: the model cannot be copied.
    """
    if (adapter is None) == (not named):
        raise ValueError("as_module: give an adapter, as_module(net, a), or several by name, as_module(net, x=a, y=b)")
    if isinstance(net.model, View):
        raise ValueError(
            "as_module: the net's model is a module that as_module made. Several adapters of one model are given by "
            "name, as_module(net, x=a, y=(another net, b)); to build on what one of them does, merge it first"
        )
    pairs = named if adapter is None else {DEFAULT: adapter}
    given = {name: v if isinstance(v, tuple) else (net, v) for name, v in pairs.items()}
    weights = weights_of(net.model)
    for name, (other, a) in given.items():
        if not name or "." in name or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"as_module: an adapter cannot be named {name!r}, which torch does not allow for a module")
        if other.model is not net.model:
            raise ValueError(f"as_module: the net of {name!r} adapts another model; call adapt on this one")
        other.plan.check(a)
        functions.checked(other.plan, weights)
    for site in dict.fromkeys(site for other, _ in given.values() for site in other.plan):
        _check_layer(net.model, site)
    return build(lasting_copy(net.model, copy_base), {name: (other.plan, a) for name, (other, a) in given.items()})


def adapter_of(module: nn.Module, name: str | None = None) -> Adapter:
    """The leaves in a module, as a plain adapter whose tensors share their storage.

    Args:
        module: what `as_module` gave, or a wrapper around it (DDP, torch.compile, …).
        name: which adapter; None is the one in force.
    """
    return mapped(parameters_of(module, name), Tensor.detach)


def parameters_of(module: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Like `adapter_of`, with the `nn.Parameter`s themselves."""
    view, name = _view(module, name)
    reshard_(module)
    state = view._peftfn
    out: dict[str, Any] = {site: dict(leaf_at(view, site, name).tree()) for site in state.plans[name]}
    return out | {bank: grown(paths, view._parameters) for bank, paths in state.banks[name].items()}


def base_of(module: nn.Module) -> dict[str, Tensor]:
    """The base in a module: {name in the model: parameter or persistent buffer}, each tensor once, sharing storage.

    These are the names that a checkpoint of the model has, for loading one into a module that was made on the meta
    device: `copy_(base_of(m), load_file("model.safetensors"))`.
    """
    view, _ = _view(module, None, any_name=True)
    reshard_(module)
    seen = {id(t) for name in view._peftfn.plans for t in leaves(parameters_of(view, name))}
    constants = {name for leaf in view.modules() if isinstance(leaf, Leaf) for name in leaf._shared.values()}
    out: dict[str, Tensor] = {}
    for path, layer in view.named_modules():
        if "parametrizations" in path.split("."):
            continue
        held: dict[str, Any] = dict(layer._parameters)
        for attr, slot in getattr(layer, "parametrizations", {}).items():
            held[attr] = None if getattr(slot[0], "missing", False) else slot.original
        skipped = layer._non_persistent_buffers_set | (constants if layer is view else set())
        held |= {k: t for k, t in layer._buffers.items() if k not in skipped}
        for attr, t in held.items():
            if t is not None and id(t) not in seen:
                seen.add(id(t))
                out[f"{path}.{attr}" if path else attr] = t.detach()
    return out


def plan_of(module: nn.Module, name: str | None = None) -> Plan:
    """The plan of one adapter in a module, without the constants, which are buffers there."""
    view, name = _view(module, name)
    plan: Plan = view._peftfn.plans[name]
    return plan


def copy_(dst: Any, src: Mapping[str, Any], name: str | None = None) -> None:
    """Overwrite an adapter with another, in place: no new storage, and nothing is compiled anew.

    Args:
        dst: an adapter, or a module with adapters (then `name` says which; None is the one in force). Any other tree
            of tensors will do, `base_of(m)` for one.
        src: a tree of the same structure, shapes and dtypes. Whole tensors for sharded ones must be the same on every
            rank: each takes its part.

    Raises:
        KeyError, ValueError, TypeError: the two do not match. Nothing has been written then.
    """
    if isinstance(dst, nn.Module):
        dst = adapter_of(dst, name)
    elif name is not None:
        raise TypeError(f"copy_: a plain adapter has no names, and name is {name!r}")
    pairs = list(_pairs(dst, src, "copy_"))
    for where, to, value in pairs:
        if to.is_meta or value.is_meta:
            raise ValueError(
                f"{where}: no data (it is on meta). An offloaded adapter comes back with onload_, a module that was "
                "made on meta with to_empty"
            )
        if is_sharded(value) and not is_sharded(to):
            raise ValueError(f"{where}: the source is sharded, and what it goes to is not: give peftfn.gather(source)")
    with torch.no_grad():
        for _, to, value in pairs:
            to.copy_(laid_out(value, to))


def trainable_(module: nn.Module, name: str | None = None, flag: bool = True) -> None:
    """Have the leaves of one adapter (None: the one in force) require gradients, or not."""
    for p in leaves(parameters_of(module, name)):
        p.requires_grad_(flag)


def offload_(module: nn.Module, name: str, device: torch.device | str = "cpu") -> Adapter:
    """Move the leaves of an idle adapter to "cpu", or to "meta", which keeps no data, until `onload_`.

    Returns the adapter as it was, which `onload_` wants after "meta".

    Raises ValueError for the adapter in force in this thread, and for the module's default.
    """
    view, name = _view(module, name)
    if name in (view._peftfn.choice.name, view._peftfn.choice.default):
        raise ValueError(f"offload_: adapter {name!r} is in force, or will be after a use; offload an idle one")
    before = adapter_of(view, name)
    view._peftfn.offloaded.add(name)
    for p in leaves(parameters_of(view, name)):
        _set(p, p.detach().to(device))
    return before


def onload_(module: nn.Module, name: str, adapter: Mapping[str, Any] | None = None) -> None:
    """Bring an offloaded adapter back to the device of the weights it changes.

    adapter: its values, where the module has none ("meta") or they should be others.
    """
    view, name = _view(module, name)
    plan, held = view._peftfn.plans[name], parameters_of(view, name)
    pairs = list(_pairs(held, held if adapter is None else adapter, "onload_"))
    for where, _, value in pairs:
        if value.is_meta:
            raise ValueError(f"{where}: no data (it was offloaded to meta): give the adapter that offload_ returned")
    home = {site: _weight(view, site).device for site in plan}
    home |= {bank: next(home[n] for n in plan if plan[n].bank == bank) for bank in plan.banks}
    devices = [home[entry] for entry, tree in held.items() for _ in leaves(tree)]
    for p, (_, _, value), device in zip(leaves(held), pairs, devices, strict=True):
        value = value.detach().to(device)
        _set(p, value if adapter is None else value.clone())
    view._peftfn.offloaded.discard(name)


@dataclass(frozen=True)
class AdapterStatus:
    """One adapter of a module."""

    name: str
    in_force: bool  # in this thread
    trainable: bool | None  # None: some leaves are, some not
    sites: int
    numbers: int  # of all its leaves
    devices: tuple[str, ...]
    dtypes: tuple[str, ...]
    offloaded: bool
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Status:
    """What a module holds; prints as a table."""

    model: str
    base: int  # numbers of the base
    base_trainable: int
    adapters: tuple[AdapterStatus, ...]

    def __str__(self) -> str:
        lines = [f"{self.model}: base of {self.base:,} numbers, {self.base_trainable:,} of them trainable"]
        for a in self.adapters:
            marks = [
                {True: "trainable", False: "frozen", None: "partly trainable"}[a.trainable],
                *(["in force"] if a.in_force else []),
                *(["offloaded"] if a.offloaded else []),
            ]
            lines.append(
                f"  {a.name}: {', '.join(marks)}; {a.numbers:,} numbers at {a.sites} sites, "
                f"{'/'.join(a.dtypes)} on {'/'.join(a.devices)}; {', '.join(a.methods)}"
            )
        return "\n".join(lines)


def status(module: nn.Module) -> Status:
    """What adapters a module holds, which is in force in this thread, which train, and where they are."""
    view, _ = _view(module, None, any_name=True)
    state = view._peftfn
    rows, ours = [], set()
    for name, plan in state.plans.items():
        ts = list(leaves(parameters_of(view, name)))
        ours |= {id(t) for t in ts}
        flags = {t.requires_grad for t in ts}
        rows.append(
            AdapterStatus(
                name=name,
                in_force=name == state.choice.name,
                trainable=flags.pop() if len(flags) == 1 else None,
                sites=len(plan),
                numbers=sum(t.numel() for t in ts),
                devices=tuple(sorted({str(t.device) for t in ts})),
                dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in ts})),
                offloaded=name in state.offloaded,
                methods=tuple(dict.fromkeys(str(e.method) for e in plan.values())),
            )
        )
    base = [p for p in view.parameters() if id(p) not in ours]
    trainable = sum(p.numel() for p in base if p.requires_grad)
    return Status(type(view).__name__, sum(p.numel() for p in base), trainable, tuple(rows))


def _pairs(dst: Any, src: Any, where: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(place, tensor, tensor) of two adapters of one structure."""
    if isinstance(dst, Mapping) and isinstance(src, Mapping):
        if dst.keys() != src.keys():
            odd = min(dst.keys() ^ src.keys())
            who = "the source lacks" if odd in dst else "only the source has"
            raise KeyError(f"{where}: {who} {odd!r}; both must be adapters of one net")
        for k in dst:
            yield from _pairs(dst[k], src[k], f"{where}{'/' if ': ' in where else ': '}{k}")
        return
    if not isinstance(dst, Tensor) or not isinstance(src, Tensor):
        raise TypeError(f"{where}: {type(src).__name__} for {type(dst).__name__}; adapters are dicts of tensors")
    if dst.shape != src.shape or dst.dtype != src.dtype:
        raise ValueError(
            f"{where}: {src.dtype} {list(src.shape)} does not fit {dst.dtype} {list(dst.shape)}. Cast another dtype "
            "first; another rank needs a module of its own, as_module(net, …)"
        )
    yield where, dst, src


def _set(p: nn.Parameter, value: Tensor) -> None:
    """p keeps its identity, which optimizers know it by."""
    if torch._has_compatible_shallow_copy_type(p, value):
        p.data = value
    else:  # to or from meta
        torch.utils.swap_tensors(p, nn.Parameter(value, requires_grad=p.requires_grad))


def _weight(view: Any, site: str) -> Tensor:
    layer, attr = owner(view, site)
    return layer.parametrizations[attr].original


def _view(module: nn.Module, name: str | None, any_name: bool = False) -> tuple[Any, str]:
    """The one view in a module, and the name of an adapter of it."""
    found: list[Any] = [m for m in module.modules() if isinstance(m, View)]
    if len(found) != 1:
        raise ValueError(f"this {type(module).__name__} holds {len(found)} modules that as_module made; give one")
    state = found[0]._peftfn
    name = state.choice.name if name is None else name
    if name is None and not any_name:
        raise ValueError("no adapter is in force here, use(None); say which one is meant: name=…")
    if name is not None and name not in state.plans:
        raise KeyError(f"the module has no adapter {name!r}{near(name, list(state.plans))}")
    return found[0], name or ""


def _check_layer(model: nn.Module, site: str) -> None:
    layer, _ = owner(model, site)
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"{site}: its layer is parametrized already ({', '.join(layer.parametrizations)}). Make that permanent "
            "with torch.nn.utils.parametrize.remove_parametrizations, or leave this site out of the rules"
        )
