"""A bank that fits given adapters: a slot for each, and nets that several share."""

from collections.abc import Mapping
from typing import Any

from peftfn.many.bank import Bank
from peftfn.many.homes import fits, size
from peftfn.net.net import Adapted


def bank(adapters: Mapping[str, tuple[Adapted, Mapping[str, Any]]], *, prepared: bool = False) -> Bank:
    """Return a bank with a slot for each of these adapters.

    Adapters share a stack where one net can hold them all and its padding at most doubles their size.

    Args:
        adapters: {"a": (net_a, a), "b": (net_b, b), …}, all nets on one model.
        prepared: as for `Bank`.

    Returns:
        A `Bank` in which they are registered.

    Raises:
        ValueError: no adapters, or nets on different models.
        TypeError: not a dict of (net, adapter).

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        bank = pf.bank({"a": (net, net.init(seed=0)), "b": (net, net.init(seed=1))})
        y = bank.apply(["b", "a", "__base__"], torch.randn(3, 8))
    """
    if not adapters:
        raise ValueError("bank: give at least one adapter, as {name: (net, adapter)}")
    if not isinstance(adapters, Mapping) or not all(
        isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], Adapted) for v in adapters.values()
    ):
        raise TypeError("bank: give a dict of name → (net, adapter), with the net that the adapter belongs to")
    nets: list[Adapted] = []
    counts: list[int] = []
    for net in sorted((net for net, _ in adapters.values()), key=size, reverse=True):
        for i, other in enumerate(nets):
            if net is other or (size(other) <= 2 * size(net) and fits(net, other)):
                counts[i] += 1
                break
        else:
            nets.append(net)
            counts.append(1)
    out = Bank(nets, counts, prepared=prepared)
    for name, (net, adapter) in adapters.items():
        out.put(name, net, adapter)
    return out
