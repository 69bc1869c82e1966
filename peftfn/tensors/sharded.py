"""Sharded tensors (DTensors): asked for, placed as a weight is, and made whole again, one tensor at a time.

Under tensor parallelism a weight is a `DTensor`, and a call mixes it with the leaves, so those must be DTensors on the
same mesh. Which way a leaf is sharded changes no result; it follows the weight, so that B [out, r] of a column-wise
layer and A [r, in] of a row-wise one stay local.
"""

from typing import Any

from torch import Tensor, nn


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


def reshard_(module: nn.Module) -> None:
    """Have every module that FSDP2 manages hold its own part of the parameters.

    After a forward pass that no backward pass follows, the root keeps whole ones, and what is written to those is lost.
    """
    for m in module.modules():
        if any(c.__name__ == "FSDPModule" for c in type(m).__mro__):
            m.reshard()  # type: ignore[operator]
