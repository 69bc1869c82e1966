"""Why a call failed that has sharded tensors in it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from peftfn.tensors.sharded import is_sharded
from peftfn.tensors.tree import leaves


def misplaced(
    sites: Iterable[str], weights: Mapping[str, Any], adapter: Mapping[str, Any], error: Exception
) -> str | None:
    """What is wrong where a call that failed has sharded tensors in it: the first site concerned, and the cure."""
    for name in sites:
        w: Any = weights.get(name)  # the model may have changed since
        mesh = w.device_mesh if is_sharded(w) else None
        for t in leaves(adapter[name]):
            if mesh is not None and torch._C._functorch.is_functorch_wrapped_tensor(t):
                return (
                    f"{name}: the weight is on {mesh}, and torch's sharded tensors do not run under torch.func. Use "
                    "net.mixed for several adapters, and .backward() or torch.autograd.grad for gradients"
                )
            other = t.device_mesh if is_sharded(t) else None
            if mesh != other:
                cure = "place the adapter with peftfn.distribute(net, peftfn.gather(adapter))"
                if mesh is None:
                    cure = "make the leaf plain with peftfn.gather(adapter), or shard the model first"
                there, here = (f"on {x}" if x is not None else "a plain tensor" for x in (mesh, other))
                return f"{name}: the weight is {there}, and its leaf is {here}. Both must be on one mesh: {cure}"
    sharded = next((name for name in sites if is_sharded(weights.get(name))), None)
    if sharded is not None and "mixed torch.Tensor and DTensor" in str(error):
        return (
            f"{sharded} is sharded, and this call computes with plain tensors too: the rows or gates of a mixed batch, "
            "or a method's own constants. They are the same on every rank, so say so around the call and its backward "
            "pass: with torch.distributed.tensor.experimental.implicit_replication(): …"
        )
    return None
