"""An adapter folded in: merged iterates over the parameters of a module view, merged_model makes a model."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.functions import UNTIED
from peftfn.model.structure import lasting_copy
from peftfn.net.net import Adapted
from peftfn.tensors.operand import dense
from peftfn.tensors.sharded import equal, is_sharded, reshard_, whole
from peftfn.tensors.tree import leaves
from peftfn.view.module import parameters_of, plan_of
from peftfn.view.status import status
from peftfn.view.view import is_own, owner


def merged(module: nn.Module, *, untied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the parameters of a module that `as_module` made, with the active adapter folded in.

    They are sharded like the module's parameters: `gather(merged(m), rank=0)` never holds more than one of them whole
    on an accelerator. For a net, `gather(net.merge(adapter))` does the same.

    Args:
        module: what `as_module` returned, or a wrapper around it, in eval mode.
        untied: whether tied weights may become different, as in `net.merge`.

    Returns:
        An iterator of (name in the base, parameter), which computes one at a time.

    Raises:
        ValueError: the module is in train mode, the adapter adds a bias to a layer without one, or it makes tied
            weights different and `untied` is False.

    Example:
        model = torch.nn.Sequential(torch.nn.Linear(8, 4)).eval()
        net = pf.adapt(model, {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init())
        model.load_state_dict(dict(pf.merged(m)))
    """
    if module.training:
        raise ValueError("merged: the module is in train mode, where dropout and the like may act; call m.eval() first")
    for row in status(module).adapters:
        for entry in plan_of(module, row.name).values() if row.active else ():
            entry.check_merge()
    reshard_(module)
    sharded = any(is_sharded(p) for p in module.parameters())
    ours = {id(t) for row in status(module).adapters for t in leaves(parameters_of(module, row.name))}
    tied: dict[int, tuple[str, Tensor]] = {}  # id of a parameter that several slots share → what the first made of it
    names = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    for path, layer in module.named_modules(remove_duplicate=False):
        if is_own(path):
            continue
        slots: Any = getattr(layer, "parametrizations", {})
        for attr in (*layer._parameters, *slots):
            name = f"{path}.{attr}" if path else attr
            held: Any = slots[attr].original if attr in slots else None
            if is_sharded(held) and not held.is_floating_point():
                raise ValueError(
                    f"{name}: its weight is quantised and sharded, and one shard of it cannot be dequantised. Use "
                    "net.merge(peftfn.gather(peftfn.adapter_of(m), rank=0)) with a net on the model without sharding"
                )
            constants = [module, *slots.modules()] if is_sharded(held) else []
            with torch.no_grad(), _plain_constants(sharded), _whole(constants, getattr(held, "device_mesh", None)):
                value = dense(getattr(layer, attr))
            if value is None or id(value) in ours:
                continue
            if attr in slots and getattr(slots[attr][0], "missing", False):
                raise ValueError(
                    f"{name}: the adapter adds a bias, and the layer of the base has none to merge it into"
                )
            source = layer._parameters[attr] if held is None else held
            if names[id(source)] > 1 and not untied:
                other, theirs = tied.setdefault(id(source), (name, value))
                if not equal(value, theirs):
                    raise ValueError(UNTIED.format(name=name, other=other))
            yield name, value


def merged_model(net: Adapted, adapter: Mapping[str, Any], *, check_finite: bool = False, untied: bool = False) -> Any:
    """Return a copy of the model with an adapter folded in: a plain model of the same class, which holds no adapter.

    It takes the memory of a second base and shares nothing with the first, which does not change. Where the first is no
    longer needed, `net.model.load_state_dict(net.merge(adapter), strict=False)` takes less.

    Args:
        net: what `adapt` returned.
        adapter: a tree like that of `net.init`.
        check_finite, untied: as for `net.merge`. With `untied`, weights that become different are no longer tied, and
            the copy's configuration says so.

    Returns:
        The model, with the modes, settings and buffers of `net.model`.

    Raises:
        ValueError: as for `net.merge`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        plain = pf.merged_model(net, net.init())
        assert type(plain) is torch.nn.Sequential and [n for n, _ in plain.named_parameters()] == ["0.weight", "0.bias"]
    """
    if not isinstance(net, Adapted):
        raise TypeError(f"merged_model takes (net, adapter), and the first is a {type(net).__name__}")
    values = net.merge(adapter, check_finite=check_finite, untied=untied)
    model = lasting_copy(net.model, copy_base=True)
    base = dict(net.model.named_parameters(remove_duplicate=False))
    copies = dict(model.named_parameters(remove_duplicate=False))
    made: dict[int, nn.Parameter] = {}  # by the value, which tied names share
    for name, value in values.items():
        p = copies[name]
        if _same_storage(value, base[name]):
            p.requires_grad_(base[name].requires_grad)
        else:
            new = value if isinstance(value, nn.Parameter) else nn.Parameter(value, base[name].requires_grad)
            layer, attr = owner(model, name)
            layer._parameters[attr] = made.setdefault(id(value), new)
    config: Any = getattr(model, "config", None)
    configs: list[Any] = [config, getattr(config, "text_config", None)]
    for c in configs if untied and _came_apart(model, base) else ():
        if getattr(c, "tie_word_embeddings", False):
            c.tie_word_embeddings = False
    return model


def _same_storage(a: Tensor, b: Tensor) -> bool:
    return a is b or a.untyped_storage()._cdata == b.untyped_storage()._cdata


def _came_apart(model: nn.Module, base: Mapping[str, nn.Parameter]) -> bool:
    """Whether a name has a parameter of its own in `model` that shared one in the base."""
    return len({id(p) for p in model.parameters()}) > len({id(p) for p in base.values()})


def _plain_constants(sharded: bool) -> AbstractContextManager[Any]:
    """Where parameters are sharded, plain tensors among them are constants, the same on every rank."""
    if not sharded:
        return nullcontext()
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental import implicit_replication

    # torch's context turns it off when it ends, also inside of one that the caller has entered
    return nullcontext() if DTensor._op_dispatcher._allow_implicit_replication else implicit_replication()


@contextmanager
def _whole(modules: Iterable[nn.Module], mesh: Any) -> Iterator[None]:
    """Replicate buffers that are sharded on another mesh, until the block ends: FSDP2 adds a mesh dimension to
    parameters only, and leaves buffers on the mesh of tensor parallelism."""
    others = [
        (m._buffers, k, t)
        for m in modules
        for k, t in m._buffers.items()
        if is_sharded(t) and t.device_mesh != mesh  # type: ignore[union-attr]
    ]
    try:
        for held, k, t in others:
            held[k] = whole(t)  # type: ignore[arg-type]
        yield
    finally:
        for held, k, t in others:
            held[k] = t
