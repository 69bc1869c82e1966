"""Intruder dimensions: singular vectors of an adapted weight that the base's weight does not have."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.core.method import MATRIX, Leaf
from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Adapter
from peftfn.methods.parts.lowrank import Ranked
from peftfn.net.net import Adapted, check_net
from peftfn.tensors.precision import wide
from peftfn.tools.change import Change, as_loras, changes, check_rank, leaf_of


@checks_numbers
def intruders(net: Adapted, adapter: Mapping[str, Any], *, top: int = 10, epsilon: float = 0.5) -> dict[str, int]:
    """Return how many intruder dimensions an adapter makes at each site that is a matrix.

    Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024, arXiv:2410.21228. An intruder is
    one of the `top` left singular vectors of W + Δ whose cosine with every left singular vector of W is below
    `epsilon`. They go with forgetting.

    Args:
        net: the adapter's net.
        adapter: an adapter of it.
        top: how many singular vectors to look at, from the largest value on.
        epsilon: the cosine below which one is an intruder, in (0, 1].

    Returns:
        {site: number}, of a stack of experts the sum over them.

    Raises:
        ValueError: top or epsilon does not fit, or a method depends on the input.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        assert pf.intruders(net, net.init()) == {"0.weight": 0}
    """
    check_net("intruders", net)
    return {c.site.name: int(m.sum()) for c, m, *_ in _found(net, adapter, top, epsilon) if c.site.kind in MATRIX}


@checks_numbers
def reduce_intruders(
    net: Adapted,
    adapter: Mapping[str, Any],
    *,
    top: int = 10,
    epsilon: float = 0.5,
    keep: float = 0.75,
    rank: int | None = None,
) -> tuple[Adapted, Adapter]:
    """Return the adapter as LoRAs, with each intruder dimension of W + Δ shrunk to the share `keep` of its size.

    Δ' = Δ − (1 − keep)·Σ σ u vᵀ over the intruders; see `intruders`. It trades what was learnt for what was known.
    As PEFT's `reduce_intruder_dimension`; sites without intruders keep their change, exactly where they have factors.

    Args:
        net, adapter, top, epsilon: as for `intruders`.
        keep: in [0, 1].
        rank: of the result; None for each LoRA's own.

    Returns:
        (net, adapter): a net of LoRAs of scale 1 on the same model, and its adapter.

    Raises:
        ValueError: as for `intruders`; keep does not fit; or no rank, at a site whose method has none.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        lora_net, lora = pf.reduce_intruders(net, net.init(), keep=0.5)
    """
    check_net("reduce_intruders", net)
    if not 0 <= keep <= 1:
        raise ValueError(f"reduce_intruders: keep is {keep}; give 0 <= keep <= 1")
    ranks = {n: rank or getattr(e.method, "rank", None) for n, e in net.plan.items() if e.site.kind in MATRIX}
    for n, r in ranks.items():
        if rank is None and not isinstance(net.plan[n].method, Ranked):
            raise ValueError(f"{n}: {net.plan[n].method} has no LoRA's rank to keep: give rank=…")
        check_rank(n, net.plan[n].site, r)
    leaves: dict[str, Leaf] = {}
    for c, mask, u, s, vh in _found(net, adapter, top, epsilon):
        name = c.site.name
        if not mask.any():
            exact = rank is None and c.factors is not None
            leaves[name] = leaf_of(c, None if exact else ranks.get(name), None)
            continue
        less = (u * (s * mask)[..., None, :]) @ vh
        smaller = Change(c.site, dense=c.matrix() - (1 - keep) * less, bias=c.bias)
        leaves[name] = leaf_of(smaller, ranks[name], None)
    return as_loras(net.model, leaves)


def _found(
    net: Adapted, adapter: Mapping[str, Any], top: int, epsilon: float
) -> Iterator[tuple[Change, Tensor, Tensor, Tensor, Tensor]]:
    """(change, 1 for each intruder among the singular vectors of W + Δ, U, S, Vᵀ), site by site."""
    if top < 1:
        raise ValueError(f"intruders: top is {top}; give top >= 1")
    if not 0 < epsilon <= 1:
        raise ValueError(f"intruders: epsilon is {epsilon}; it is a cosine: give 0 < epsilon <= 1")
    weights = net.weights
    none = torch.zeros(())
    for c in changes(net, adapter):
        if c.site.kind not in MATRIX:
            yield c, none, none, none, none
            continue
        w = wide(c.site.canonical(weights[c.site.name]))
        before = torch.linalg.svd(w, full_matrices=False)[0]
        u, s, vh = torch.linalg.svd(w + c.matrix(), full_matrices=False)
        mask = (u.mT @ before).abs().amax(-1) < epsilon
        mask[..., top:] = False
        yield c, mask.to(s.dtype), u, s, vh
