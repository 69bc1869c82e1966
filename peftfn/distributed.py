"""Sharded tensors: leaves placed as their weights are, and gathered again, one tensor at a time.

Under tensor parallelism a weight is a `DTensor`, and a call mixes it with the leaves, so those must be DTensors on the
same mesh. Which way a leaf is sharded changes no result; it follows the weight, so that B [out, r] of a column-wise
layer and A [r, in] of a row-wise one stay local.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peftfn.tree import leaves, mapped

if TYPE_CHECKING:
    from peftfn.apply import Adapted
    from peftfn.plan import Adapter


UNTIED = (
    "{name}: it is tied to {other}, and the adapter makes the two different, so a model that ties them would keep only "
    "one of the two. Adapt both alike (TiedTokens does), or say untied=True and put the result into a model that "
    "does not tie them (transformers: tie_word_embeddings=False in its config)"
)


def is_sharded(t: Any) -> bool:
    """Whether t is a DTensor. (Asked by name: importing its module takes a second.)"""
    return isinstance(t, Tensor) and type(t).__name__ == "DTensor"


def placed(t: Tensor, m: Any) -> Tensor:
    """t as a DTensor on the mesh of the canonical weight m, sharded in the dimensions it shares with m.

    A dimension of t is m's if it stands at the same end and has the same size. t is the same on every rank.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def same(p: Any) -> Any:
        if not isinstance(p, Shard):
            return Replicate()
        dim = t.dim() - 1 if p.dim == m.dim() - 1 else p.dim
        return Shard(dim) if 0 <= dim < t.dim() and t.shape[dim] == m.shape[p.dim] else Replicate()

    placements = [same(p) for p in m.placements]
    if is_sharded(t):
        return t.redistribute(m.device_mesh, placements)  # type: ignore[attr-defined, no-any-return]
    return distribute_tensor(t.detach(), m.device_mesh, placements, src_data_rank=None)


def laid_out(t: Tensor, like: Any) -> Tensor:
    """t, which is whole and the same on every rank, as `like` is sharded; t itself if `like` is a plain tensor."""
    if not is_sharded(like) or is_sharded(t):
        return t
    whole = on_mesh(t.to(like.device), like)
    return whole.redistribute(like.device_mesh, like.placements)  # type: ignore[attr-defined, no-any-return]


def whole(t: Tensor) -> Tensor:
    """t with all its numbers on this rank; every rank of its mesh must call this."""
    return t.full_tensor() if is_sharded(t) else t  # type: ignore[attr-defined, no-any-return]


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are, also of sharded tensors; on the meta device, where there are none, they are."""
    return a.is_meta or b.is_meta or bool(whole((a == b).all()))


def on_mesh(t: Tensor, w: Any) -> Tensor:
    """t, which belongs to no single site, whole on every rank of the mesh of w; t itself if w is on none, or t is."""
    if not is_sharded(w) or is_sharded(t):
        return t
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements = [Replicate()] * w.device_mesh.ndim
    return distribute_tensor(t.detach(), w.device_mesh, placements, src_data_rank=None)


def distribute(net: "Adapted", adapter: Mapping[str, Any]) -> "Adapter":
    """An adapter of plain tensors, the same on every rank, for a model whose weights are sharded (DTensors).

    Leaves are sharded as their weight is; leaves of weights that are no DTensors stay as they are. `net.init` gives
    such adapters by itself, and so does `load`. Nothing is sent: each rank takes its part.
    """
    net.plan.check(adapter)
    weights = net._weights()
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


def gather(tree: Mapping[str, Any] | Iterable[tuple[str, Any]], rank: int | None = None) -> dict[str, Any]:
    """Whole tensors on the CPU, gathered one at a time: of an adapter, merged parameters, or pairs (name, tensor).

    Every rank of the mesh must call this.

    Args:
        rank: the only rank that keeps them, and the others get {}; None: each does.
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


def merged(module: nn.Module, *, untied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(name in the base, parameter with the adapter folded in), one at a time, of a module that `as_module` made.

    They are sharded as the module's parameters are: `gather(merged(m), rank=0)` never holds more than one of them
    whole on an accelerator. For a net, `gather(net.merge(adapter))` does the same.

    Args:
        untied: as in `net.merge`: whether tied weights may come out different.

    Raises ValueError in train mode, or where the adapter gives a bias to a layer without one, or makes tied weights
    different.
    """
    from peftfn.module import parameters_of, status
    from peftfn.weight import dense

    if module.training:
        raise ValueError("merged: the module is in train mode, where a method may act otherwise; call m.eval() first")
    reshard_(module)
    sharded = any(is_sharded(p) for p in module.parameters())
    ours = {id(t) for row in status(module).adapters for t in leaves(parameters_of(module, row.name))}
    tied: dict[int, tuple[str, Tensor]] = {}  # id of a parameter that several slots share → what the first made of it
    names = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    for path, layer in module.named_modules(remove_duplicate=False):
        if "parametrizations" in path.split("."):
            continue
        slots: Any = getattr(layer, "parametrizations", {})
        for attr in (*layer._parameters, *slots):
            name = f"{path}.{attr}" if path else attr
            held: Any = slots[attr].original if attr in slots else None
            if is_sharded(held) and not held.is_floating_point():
                raise ValueError(
                    f"{name}: its weight is quantised and sharded, and a part of it cannot be dequantised. Merge "
                    "peftfn.gather(peftfn.adapter_of(m), rank=0) into the model as it is without sharding, net.merge"
                )
            constants = [module, *slots.modules()] if is_sharded(held) else []
            with torch.no_grad(), _plain_constants(sharded), _whole(constants, getattr(held, "device_mesh", None)):
                value = dense(getattr(layer, attr))
            if value is None or id(value) in ours:
                continue
            if attr in slots and getattr(slots[attr][0], "missing", False):
                raise ValueError(f"{name}: the adapter gives this layer a bias, and the base has none to merge it into")
            source = layer._parameters[attr] if held is None else held
            if names[id(source)] > 1 and not untied:
                other, theirs = tied.setdefault(id(source), (name, value))
                if not equal(value, theirs):
                    raise ValueError(UNTIED.format(name=name, other=other))
            yield name, value


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
    """Inside, buffers that are sharded on another mesh are whole: FSDP2 adds a dimension to that of the parameters, and
    leaves buffers on tensor parallelism's."""
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


def reshard_(module: nn.Module) -> None:
    """Have every module that FSDP2 manages hold its own part of the parameters.

    After a forward pass that no backward pass follows, the root keeps whole ones, and what is written to those is lost.
    """
    for m in module.modules():
        if any(c.__name__ == "FSDPModule" for c in type(m).__mro__):
            m.reshard()  # type: ignore[operator]


def refuse_sharded(net: "Adapted", adapter: Mapping[str, Any]) -> None:
    """ValueError unless every tensor of the adapter and of the plan's constants is whole, as a file holds them."""
    for name, tree in adapter.items():
        if any(map(is_sharded, leaves(tree))):
            raise ValueError(
                f"{name}: its leaf is sharded, and a file holds whole tensors. Call a = peftfn.gather(adapter, rank=0) "
                "on every rank, and save a on rank 0"
            )
    for name, e in net.plan.items():
        if any(map(is_sharded, e.frozen.values())):
            raise ValueError(
                f"{name}: its constants are sharded as the model is, and a file holds whole tensors. Save with a net "
                "of the model as it is without sharding, peftfn.adapt(model, rules)"
            )


def misplaced(net: "Adapted", adapter: Mapping[str, Any], error: Exception) -> str | None:
    """What is wrong where a call that failed has sharded tensors in it: the first site concerned, and the cure."""
    weights = net._weights()
    for name in net.plan:
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
    sharded = next((name for name in net.plan if is_sharded(weights.get(name))), None)
    if sharded is not None and "mixed torch.Tensor and DTensor" in str(error):
        return (
            f"{sharded} is sharded, and this call computes with plain tensors too: the rows or gates of a mixed batch, "
            "or a method's own constants. They are the same on every rank, so say so around the call and its backward "
            "pass: with torch.distributed.tensor.experimental.implicit_replication(): …"
        )
    return None
