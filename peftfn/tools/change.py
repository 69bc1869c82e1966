"""What an adapter changes at a site, as two thin factors where its method has them, and LoRAs made of such changes."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core import functions
from peftfn.core.method import MATRIX, Leaf, Method
from peftfn.core.plan import Adapter
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.lora import LoRA
from peftfn.model.site import Site
from peftfn.net.net import Adapted, adapt
from peftfn.tensors.precision import wide

Svd = tuple[Tensor, Tensor, Tensor]
"""U [..., out, k], S [..., k], Vᵀ [..., k, in]"""


@dataclass(frozen=True)
class Change:
    """The change of one canonical weight: up [..., out, r] times down [..., r, in], or `dense`; in fp32 or wider.

    At a site that is no matrix (a norm, a bias) there is `dense` alone, of the parameter's shape. A stack of experts
    has their axis first.
    """

    site: Site
    up: Tensor | None = None
    down: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None  # the change of the layer's bias, None for none

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(up, down), or None."""
        return None if self.up is None or self.down is None else (self.up, self.down)

    def matrix(self) -> Tensor:
        """The change as one tensor."""
        if self.dense is not None:
            return self.dense
        assert self.up is not None and self.down is not None
        return self.up @ self.down

    def svd(self) -> Svd:
        """The singular value decomposition, of the factors alone where there are some."""
        if (pair := self.factors) is None:
            return torch.linalg.svd(self.matrix(), full_matrices=False)  # type: ignore[return-value]
        return svd_of(*pair)


def svd_of(up: Tensor, down: Tensor) -> Svd:
    """The singular value decomposition of up @ down, which is never made."""
    q, r = torch.linalg.qr(up)
    p, t = torch.linalg.qr(down.mT)
    u, s, vh = torch.linalg.svd(r @ t.mT, full_matrices=False)
    return q @ u, s, vh @ p.mT


def singular_values(up: Tensor, down: Tensor | None = None) -> Tensor:
    """The singular values of a matrix, or of up @ down, which is never made; in falling order."""
    if down is None:
        return torch.linalg.svdvals(up)
    return torch.linalg.svdvals(torch.linalg.qr(up)[1] @ torch.linalg.qr(down.mT)[1].mT)


def nothing(site: Site, like: Tensor) -> Change:
    """The change that leaves a site as it is, on the device of `like`."""
    if site.kind not in MATRIX:
        return Change(site, dense=like.new_zeros(site.shape))
    out, in_ = site.matrix_shape()
    lead = site.shape[:1] if site.stacked else ()
    return Change(site, like.new_zeros(*lead, out, 0), like.new_zeros(*lead, 0, in_))


def changes(net: Adapted, adapter: Mapping[str, Any], names: Iterable[str] | None = None) -> Iterator[Change]:
    """Iterate over what the adapter changes, site by site; at the sites `names` only, if given.

    Raises:
        ValueError: a method depends on the input, so that there is no change of a weight; it names the site.
    """
    net.plan.check(adapter)
    for name, entry in net.plan.items():
        if not entry.method.mergeable:
            raise ValueError(
                f"{name}: {entry.method} depends on the input, so it is no change of the weight; leave this site out"
            )
    weights, biases = net.weights, net.bias_deltas(adapter)
    for name in net.plan if names is None else names:
        entry = net.plan.meant[name]
        method, p, w = functions.tensors(entry, weights, adapter)
        bias = biases.get(name)
        if entry.site.kind not in MATRIX:
            yield Change(entry.site, dense=entry.delta(method, p, entry.site.canonical(w)), bias=bias)
            continue
        if method.only_bias():
            none = nothing(entry.site, torch.empty(0, device=w.device))
            yield Change(entry.site, none.up, none.down, bias=bias)
            continue
        low = method.low_rank(p)
        if low is None or low.gain is not None:
            yield Change(entry.site, dense=entry.delta(method, p, entry.site.canonical(w)), bias=bias)
            continue
        up, down = wide(low.up) * low.scale, wide(low.down)
        lead = torch.broadcast_shapes(up.shape[:-2], down.shape[:-2])
        yield Change(entry.site, up.expand(*lead, *up.shape[-2:]), down.expand(*lead, *down.shape[-2:]), bias=bias)


def check_rank(name: str, site: Site, rank: int | None) -> None:
    """ValueError for a rank that a site's matrix does not have."""
    if rank is None or site.kind not in MATRIX:
        return
    shape = site.matrix_shape()
    if not 0 < rank <= min(shape):
        raise ValueError(f"{name}: rank is {rank}, and the weight is {list(shape)}: give 0 < rank <= {min(shape)}")


def check_energy(where: str, energy: float | None) -> None:
    """ValueError for an energy that is no share."""
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"{where}: energy is {energy}; it is a share of Σ σ²: give 0 < energy <= 1")


def leaf_of(change: Change, rank: int | None, energy: float | None) -> Leaf:
    """The leaf of a LoRA of scale 1, or of a `Full`, that makes the change.

    With a rank or an energy it is the nearest: B = U_r √S_r, A = √S_r V_rᵀ. Without, it is the change's own factors.

    Raises:
        ValueError: neither, and the change has no factors; it names the site.
    """
    name = change.site.name
    if change.site.kind not in MATRIX:
        return {"diff": change.matrix().contiguous()}
    if rank is not None or energy is not None:
        u, s, vh = change.svd()
        r = rank if rank is not None else rank_for(s, energy or 1.0)
        root = s[..., :r].sqrt()
        a, b = root[..., :, None] * vh[..., :r, :], u[..., :, :r] * root[..., None, :]
        a, b = filled(a, b, r)
    elif change.factors is None:
        raise ValueError(
            f"{name}: the change has no factors of a small rank, so no LoRA is exact here: give rank=… for the nearest "
            "of a rank, or energy=1.0 for as many ranks as it takes"
        )
    else:
        b, a = change.factors
        a, b = filled(a, b, max(1, a.shape[-2]))
    leaf = {"a": a.contiguous(), "b": b.contiguous()}
    return leaf if change.bias is None else leaf | {"beta": change.bias.contiguous()}


def rank_for(s: Tensor, energy: float) -> int:
    """The smallest rank that holds `energy` of Σ σ², at least 1; the largest over a stack of experts."""
    held = (s * s).cumsum(-1)
    return min(s.shape[-1], int((held < energy * (1 - 1e-6) * held[..., -1:]).sum(-1).max()) + 1)


def filled(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A and B with zeros for further ranks."""
    more = rank - a.shape[-2]
    if more <= 0:
        return a, b
    a = torch.cat([a, a.new_zeros(*a.shape[:-2], more, a.shape[-1])], -2)
    return a, torch.cat([b, b.new_zeros(*b.shape[:-1], more)], -1)


def as_loras(model: nn.Module, leaves: Mapping[str, Leaf]) -> tuple[Adapted, Adapter]:
    """A net of LoRAs of scale 1, and of `Full`, on the model, and the adapter with these leaves."""
    rules: dict[str, Method] = {}
    for name, leaf in leaves.items():
        full = "diff" in leaf
        rules[exactly(name)] = Full() if full else LoRA(rank=leaf["a"].shape[-2], lora_bias="beta" in leaf)
    net = adapt(model, rules)
    return net, {name: dict(leaves[name]) for name in net.plan}


def exactly(name: str) -> str:
    """The pattern of a rule for one site."""
    return f"^{re.escape(name)}$"
