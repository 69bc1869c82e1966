"""What changes the tensors of an adapter in place, or of those that a module holds: their values, whether they train,
and where they are."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.plan import Adapter
from peftfn.tensors.sharded import is_sharded, laid_out
from peftfn.tensors.tree import leaves
from peftfn.view.module import _view, adapter_of, parameters_of
from peftfn.view.view import weight_at


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
