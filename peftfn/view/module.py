"""What a module view holds: its adapters, its base, its plans."""

from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.plan import Adapter, Plan
from peftfn.model.names import near
from peftfn.tensors.sharded import reshard_
from peftfn.tensors.tree import leaves, mapped
from peftfn.view.active import View
from peftfn.view.held import Leaf, bank_tensors, grown
from peftfn.view.view import is_own, leaf_at, owner


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
