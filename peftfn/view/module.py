"""as_module: an adapter in an `nn.Module`, for the tools that want one. Trainer, generate, DDP, FSDP, export.

The module is a copy of the model's structure that shares the storage of its parameters. Each site has a
`torch.nn.utils.parametrize` parametrization, which holds the leaves of the site and returns the adapted weight
(`view.py`). Functions whose names end in `_` change the module, or the adapter, that they are passed.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from peftfn.core import functions
from peftfn.core.plan import Adapter, Plan
from peftfn.model.model import weights_of
from peftfn.model.names import near
from peftfn.model.structure import lasting_buffers, lasting_copy
from peftfn.net.net import Adapted
from peftfn.tensors.sharded import is_sharded, laid_out, reshard_
from peftfn.tensors.tree import leaves, mapped
from peftfn.view.active import View
from peftfn.view.held import TAKEN, Leaf, bank_tensors, grown
from peftfn.view.view import build, is_own, leaf_at, owner, weight_at

DEFAULT = "default"


def as_module(
    net: Adapted,
    adapter: Mapping[str, Any] | None = None,
    /,
    *,
    copy_base: bool = False,
    trainable: bool = True,
    **named: Any,
) -> Any:
    """The adapted model as an `nn.Module` of the model's own class: isinstance, generate, config, signature.

    It shares the storage of the base's parameters, which do not require gradients in it. The leaves are its own
    parameters, copies of the adapter's tensors, and the only ones that train. It also has its own buffers, hooks,
    settings and modes, so adapter dropout follows its train() and eval(). The base does not change and stays usable.
    The factor of `scale(adapter, s)` is a buffer, and a parameter if s is a tensor that requires a gradient.

    Methods that act on some tokens alone (`ALoRA`) find them in the `input_ids` of each call, of the module itself or
    of its `generate`.

    Two names of one tied tensor are two sites, as in `adapt`: adapting an embedding does not change the head it is
    tied to, unless a rule takes both.

    Writing to the module's base parameters writes to the base, and so to every other module made of it. Tools that
    average all parameters do so: an EMA, a target or reference network. Make such a module with `copy_base=True`.

    Args:
        net: what `adapt` returned.
        adapter: the adapter to hold; its name in the module is "default".
        named: instead of `adapter`, several by name: an adapter of `net`, or a pair (another net of the same model, its
            adapter). The first is active until `use` or `use_` says otherwise.
        copy_base: whether the module copies the base's parameters instead of sharing them; it then takes the memory of
            a second base.
        trainable: whether the leaves require gradients; `trainable_` changes it later.

    Returns:
        The module, with three methods more than the model has. `with m.use(name): …` makes the adapter `name` active
        in this thread; None is the base, and a list of names the sum of these adapters, each times its number in
        `weights=[…]`. `m.use_(name)` makes it active in every thread, where no `use` says otherwise.
        `m.checkpoint_context` is the `context_fn` for your own calls of torch.utils.checkpoint.

    Raises:
        ValueError: no adapter, an invalid name, a net of another model, of such a module, or of a model whose
            parameters have other shapes now, or a layer that cannot hold an adapter: parametrized already, or with
            weights that a hook loads for each call (offload).
        TypeError: the model cannot be copied, or `net` is not a net.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4))
        net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, one=net.init(seed=1), two=net.init(seed=2))
        with m.use("two"):
            y = m(torch.randn(3, 8))
    """
    if not isinstance(net, Adapted):
        raise TypeError(f"as_module takes (net, adapter), and the first is a {type(net).__name__}; call adapt first")
    if (adapter is None) == (not named):
        raise ValueError("as_module: give an adapter, as_module(net, a), or several by name, as_module(net, x=a, y=b)")
    if isinstance(net.model, View):
        raise ValueError(
            "as_module: the net's model is a module that as_module made. Several adapters of one model are passed by "
            "name, as_module(net, x=a, y=(another net, b)); to adapt an adapted model again, merge its adapter first"
        )
    pairs = named if adapter is None else {DEFAULT: adapter}
    given = {name: v if isinstance(v, tuple) else (net, v) for name, v in pairs.items()}
    every = [other for other, _ in given.values() if isinstance(other, Adapted)]
    weights = weights_of(net.model, {s.name: s for other in every for s in other.plan.places}.values())
    for name, (other, a) in given.items():
        check_name("as_module", name)
        if other.model is not net.model:
            raise ValueError(f"as_module: the net of {name!r} adapts another model; call adapt on this one")
        other.plan.check(a)
        functions.checked(other.plan, weights)
    for site in dict.fromkeys(site for other, _ in given.values() for site in other.plan):
        _check_layer(net.model, site)
    pairs = {name: (other.plan, a) for name, (other, a) in given.items()}
    return build(lasting_copy(net.model, copy_base), pairs, lasting_buffers(net.model), trainable)


def adapter_of(module: nn.Module, name: str | None = None, *, buffers: bool = False) -> Adapter:
    """Return the leaves in a module as a plain adapter, whose tensors share the module's storage.

    An adapter has no buffers. Where training changed buffers in `module` (BatchNorm's running statistics), the adapter
    alone does not do what the module does: see `buffers_of`.

    Args:
        module: what `as_module` returned, or a wrapper around it (DDP, torch.compile, …).
        name: which adapter; None is the active one.
        buffers: whether you look after changed buffers yourself. If False, there must be none.

    Returns:
        {site: {name: tensor}}, detached.

    Raises:
        KeyError: the module has no adapter of this name.
        ValueError: there is no module view in `module`; no adapter is active and `name` is None; or a buffer differs
            from the base's and `buffers` is False.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init())
        y = net.apply(pf.adapter_of(m), torch.randn(3, 8))
    """
    if not buffers and (changed := list(buffers_of(module))):
        raise ValueError(
            f"adapter_of: {changed[0]} differs from the base's, by what training wrote there (running statistics), and "
            "an adapter has no buffers. Save both, pf.save(path, net, pf.adapter_of(m, buffers=True), "
            "buffers=pf.buffers_of(m)); put them into the base, net.model.load_state_dict(pf.buffers_of(m), "
            "strict=False); or train with such layers in eval mode"
        )
    return mapped(parameters_of(module, name), Tensor.detach)


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in a module that differ from the base's: what training changed beside the adapter.

    BatchNorm's running statistics are such buffers. Only persistent buffers count, which a checkpoint has.

    Args:
        module: what `as_module` returned, or a wrapper around it.

    Returns:
        {name in the model: buffer}, copies; {} where there are none.

    Raises:
        ValueError: there is no module view in `module`.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init()).train()
        m(torch.randn(5, 8))
        assert set(pf.buffers_of(m)) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    """
    view, _ = _view(module, None, any_name=True)
    out: dict[str, Tensor] = {}
    for name, base in view._peftfn.buffers.items():
        layer, attr = owner(view, name)
        now = layer._buffers.get(attr)
        if now is not None and not (now.is_meta or base.is_meta) and not torch.equal(now, base.to(now)):
            out[name] = now.detach().clone()
    return out


def parameters_of(module: nn.Module, name: str | None = None) -> dict[str, Any]:
    """Like `adapter_of`, with the module's tensors themselves: `nn.Parameter`s, and the factors of scalings."""
    view, name = _view(module, name)
    reshard_(module)
    state = view._peftfn
    out: dict[str, Any] = {site: dict(leaf_at(view, site, name).tree()) for site in state.plans[name]}
    return out | {bank: grown(ps, bank_tensors(view, ps)) for bank, ps in state.banks[name].items()}


def base_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the base in a module: {name in the model: parameter or persistent buffer}, sharing storage.

    Each tensor occurs once, under the name that a checkpoint of the model has. Use it to load a checkpoint into a
    module that was made on the meta device: `copy_(base_of(m), load_file("model.safetensors"))`.

    Args:
        module: what `as_module` returned, or a wrapper around it.

    Returns:
        {name: tensor}, detached.

    Raises:
        ValueError: there is no module view in `module`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init())
        assert list(pf.base_of(m)) == ["0.bias", "0.weight"]
    """
    view, _ = _view(module, None, any_name=True)
    reshard_(module)
    seen = {id(t) for name in view._peftfn.plans for t in leaves(parameters_of(view, name))}
    constants = {name for leaf in view.modules() if isinstance(leaf, Leaf) for name in leaf._shared.values()}
    out: dict[str, Tensor] = {}
    for path, layer in view.named_modules():
        if is_own(path):
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
    """The plan of one adapter in a module, without its constants, which are buffers of the module."""
    view, name = _view(module, name)
    plan: Plan = view._peftfn.plans[name]
    return plan


def copy_(dst: Any, src: Mapping[str, Any], name: str | None = None) -> None:
    """Overwrite an adapter with another, in place: no new storage, and no compiled function compiles again.

    Args:
        dst: an adapter, any other tree of tensors (`base_of(m)`, say), or a module with adapters.
        src: a tree of the same structure, shapes and dtypes. Where `dst` is sharded and `src` is not, `src` must be
            the same on every rank, and each rank takes its part.
        name: which adapter, if `dst` is a module; None is the active one.

    Raises:
        KeyError, ValueError, TypeError: the two do not match. Nothing has been written.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init(seed=0))
        pf.copy_(m, net.init(seed=1))
    """
    if isinstance(dst, nn.Module):
        dst = adapter_of(dst, name, buffers=True)
    elif name is not None:
        raise TypeError(f"copy_: dst is a plain adapter, so it has no adapter {name!r}: leave name out")
    pairs = list(_pairs(dst, src, "copy_"))
    for where, to, value in pairs:
        if to.is_meta or value.is_meta:
            raise ValueError(
                f"{where}: no data (it is on meta). Bring an offloaded adapter back with onload_; give a module "
                "that was made on meta storage with to_empty"
            )
        if is_sharded(value) and not is_sharded(to):
            raise ValueError(f"{where}: the source is sharded, and the destination is not: pass peftfn.gather(source)")
    with torch.no_grad():
        for _, to, value in pairs:
            to.copy_(laid_out(value, to))


def trainable_(module: nn.Module, name: str | None = None, flag: bool = True) -> None:
    """Make the leaves of one adapter require gradients, or not.

    Args:
        module: what `as_module` returned, or a wrapper around it.
        name: which adapter; None is the active one.
        flag: whether they require gradients.

    Raises:
        KeyError: the module has no adapter of this name.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, one=net.init(seed=1), two=net.init(seed=2))
        pf.trainable_(m, "two", False)
    """
    for p in leaves(parameters_of(module, name)):
        if isinstance(p, nn.Parameter):
            p.requires_grad_(flag)


def offload_(module: nn.Module, name: str, device: torch.device | str = "cpu") -> Adapter:
    """Move the leaves of an idle adapter to another device, until `onload_`.

    Args:
        module: what `as_module` returned, or a wrapper around it.
        name: which adapter.
        device: "cpu", or "meta", which keeps no data.

    Returns:
        The adapter with its former tensors. Pass it to `onload_` after "meta".

    Raises:
        ValueError: the adapter is active in some thread, or is the module's default.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, one=net.init(seed=1), two=net.init(seed=2))
        kept = pf.offload_(m, "two", "meta")
        pf.onload_(m, "two", kept)
    """
    view, name = _view(module, name)
    if view._peftfn.choice.has(name):
        raise ValueError(f"offload_: adapter {name!r} is active, or is the default; offload an idle one")
    before = adapter_of(view, name, buffers=True)
    view._peftfn.offloaded.add(name)
    for p in leaves(parameters_of(view, name)):
        _set(p, p.detach().to(device))
    return before


def onload_(module: nn.Module, name: str, adapter: Mapping[str, Any] | None = None) -> None:
    """Move an offloaded adapter back to the device of the weights it changes.

    Args:
        module: what `as_module` returned, or a wrapper around it.
        name: which adapter.
        adapter: its values, needed if it was offloaded to "meta"; None keeps those it has.

    Raises:
        ValueError: the module has no values for it, and `adapter` is None.
        KeyError, ValueError, TypeError: `adapter` does not match. Nothing has been written.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, one=net.init(seed=1), two=net.init(seed=2))
        pf.offload_(m, "two")
        pf.onload_(m, "two")
    """
    view, name = _view(module, name)
    plan, held = view._peftfn.plans[name], parameters_of(view, name)
    pairs = list(_pairs(held, held if adapter is None else adapter, "onload_"))
    for where, _, value in pairs:
        if value.is_meta:
            raise ValueError(f"{where}: no data (it was offloaded to meta): pass the adapter that offload_ returned")
    home = {name: weight_at(view, e.site).device for name, e in plan.items()}
    home |= {bank: next(home[n] for n in plan if plan[n].bank == bank) for bank in plan.banks}
    devices = [home[entry] for entry, tree in held.items() for _ in leaves(tree)]
    for p, (_, _, value), device in zip(leaves(held), pairs, devices, strict=True):
        value = value.detach().to(device)
        _set(p, value if adapter is None else value.clone())
    view._peftfn.offloaded.discard(name)


def _pairs(dst: Any, src: Any, where: str) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(place, tensor, tensor) of two adapters of the same structure."""
    if isinstance(dst, Mapping) and isinstance(src, Mapping):
        if dst.keys() != src.keys():
            odd = min(dst.keys() ^ src.keys())
            who = "the source has no" if odd in dst else "only the source has"
            raise KeyError(f"{where}: {who} {odd!r}; both must be adapters of the same net")
        for k in dst:
            yield from _pairs(dst[k], src[k], f"{where}{'/' if ': ' in where else ': '}{k}")
        return
    if not isinstance(dst, Tensor) or not isinstance(src, Tensor):
        raise TypeError(
            f"{where}: the source has a {type(src).__name__}, and the destination a {type(dst).__name__}; "
            "adapters are dicts of tensors"
        )
    if dst.shape != src.shape or dst.dtype != src.dtype:
        raise ValueError(
            f"{where}: {src.dtype} {list(src.shape)} does not fit {dst.dtype} {list(dst.shape)}. Cast another dtype "
            "first; for another rank, make another module, as_module(net, …)"
        )
    yield where, dst, src


def _set(p: Tensor, value: Tensor) -> None:
    """p keeps its identity, which optimizers know it by."""
    if torch._has_compatible_shallow_copy_type(p, value):
        p.data = value
    else:  # to or from meta
        like = nn.Parameter(value, requires_grad=p.requires_grad) if isinstance(p, nn.Parameter) else value
        torch.utils.swap_tensors(p, like)


def _view(module: nn.Module, name: str | None, any_name: bool = False) -> tuple[Any, str]:
    """The one view in a module, and the name of an adapter of it."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"give the module that as_module(net, adapter) returned, not {type(module).__name__}")
    found: list[Any] = [m for m in module.modules() if isinstance(m, View)]
    if len(found) != 1:
        raise ValueError(
            f"this {type(module).__name__} holds {len(found)} modules that as_module made; pass one that it returned"
        )
    state = found[0]._peftfn
    active = state.choice.active.names
    if name is None and len(active) != 1 and not any_name:
        many = f"{len(active)} adapters are active" if active else "no adapter is active (use(None) says so)"
        raise ValueError(f"{many}; say which one you mean: name=…")
    name = active[0] if name is None and active else name
    if name is not None and name not in state.plans:
        raise KeyError(f"the module has no adapter {name!r}{near(name, list(state.plans))}")
    return found[0], name or ""


def check_name(what: str, name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{what}: an adapter's name is a string, not {name!r}")
    if not name or "." in name or hasattr(nn.ModuleDict(), name) or name in TAKEN:
        raise ValueError(f"{what}: an adapter cannot be named {name!r}, which torch does not allow for a module")


def _check_layer(model: nn.Module, site: str) -> None:
    layer, attr = owner(model, site)
    if attr in layer._modules or not attr:  # a module
        return
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"{site}: its layer is parametrized already ({', '.join(layer.parametrizations)}). Make that permanent "
            "with torch.nn.utils.parametrize.remove_parametrizations, or leave this site out of the rules"
        )
