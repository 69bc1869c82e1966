"""Sharded tensors: leaves placed as their weights are, and gathered again, one tensor at a time.

Under tensor parallelism a weight is a `DTensor`, and a call mixes it with the leaves, so those must be DTensors on the
same mesh. Which way a leaf is sharded changes no result; it follows the weight, so that B [out, r] of a column-wise
layer and A [r, in] of a row-wise one stay local.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from peftfn.core import functions
from peftfn.core.numbers import checks_numbers
from peftfn.model.model import weights_of
from peftfn.tensors.sharded import is_sharded, on_mesh, placed, whole
from peftfn.tensors.tree import mapped

if TYPE_CHECKING:
    from peftfn.core.plan import Adapter
    from peftfn.net.net import Adapted


def distribute(net: "Adapted", adapter: Mapping[str, Any]) -> "Adapter":
    """Place an adapter of plain tensors for a model whose weights are sharded (DTensors).

    Leaves are sharded as their weight is; those of weights that are not DTensors, and of modules, whose hidden states
    are plain tensors, stay as they are. `net.init` and
    `load` return such adapters by themselves. Nothing is sent: each rank takes its part.

    Args:
        net: the net of the sharded model.
        adapter: one of its adapters, with the same values on every rank.

    Returns:
        The adapter, with DTensors.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        a = pf.distribute(net, net.init())  # of a model that is not sharded: the same tensors
    """
    net.plan.check(adapter)
    weights = functions.checked(net.plan, weights_of(net.model, net.plan.places))
    out: dict[str, Any] = {}
    for name, tree in adapter.items():
        entry = net.plan.entries.get(name)
        at = name if entry else next(n for n, e in net.plan.items() if e.bank == name)
        w = weights[at]
        if not is_sharded(w):
            out[name] = tree
        elif entry:
            m = entry.site.canonical(w)
            out[name] = mapped(tree, partial(placed, m=m))
        else:
            out[name] = mapped(tree, partial(on_mesh, w=w))
    return out


@checks_numbers
def gather(tree: Mapping[str, Any] | Iterable[tuple[str, Any]], rank: int | None = None) -> dict[str, Any]:
    """Gather whole tensors on the CPU, one at a time. Every rank of the mesh must call this.

    Args:
        tree: an adapter, merged parameters, or pairs (name, tensor).
        rank: the only rank that keeps them, and the others get {}; None: each does.

    Returns:
        {name: tensor, or a dict of them}.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        whole = pf.gather(net.init())
    """
    keep = rank is None or torch.distributed.get_rank() == rank
    out: dict[str, Any] = {}
    for k, v in tree.items() if isinstance(tree, Mapping) else tree:
        if isinstance(v, Mapping):
            value: Any = gather(v, rank)
        else:
            value = whole(v.detach()).cpu()
        if keep:
            out[k] = value
    return out
