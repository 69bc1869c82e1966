"""extract: a LoRA from a full fine-tune."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.method import MATRIX, Leaf
from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Adapter
from peftfn.model.model import Model
from peftfn.model.names import matches
from peftfn.net.net import Adapted
from peftfn.tensors.precision import wide
from peftfn.tensors.quantised import QuantisedWeight
from peftfn.tools.change import Change, as_loras, check_energy, check_rank, leaf_of


@checks_numbers
def extract(
    model: nn.Module,
    full: nn.Module | Mapping[str, Tensor],
    *,
    rank: int | None = None,
    energy: float | None = None,
    pattern: str = "",
) -> tuple[Adapted, Adapter]:
    """Return what a full fine-tune changed, as an adapter of its base: the nearest LoRA of each matrix's difference.

    A parameter that is the same in both gets nothing. What is no matrix (a norm, a bias), weights that are tied, and
    matrices that `pattern` does not match become `Full`, exactly. One difference is in memory at a time, if the mapping
    makes its tensors when it is asked for them.

    Args:
        model: the base.
        full: the fine-tuned model, or its parameters by the base's names.
        rank: the rank at every matrix, or its smaller side where that is less.
        energy: in (0, 1]: at each matrix, the smallest rank whose singular values hold this share of Σ σ².
        pattern: as in the rules of `adapt`: which matrices get a LoRA; "" for all.

    Returns:
        (net, adapter): a net on the base, with B = U_r √S_r, A = √S_r V_rᵀ and scale 1, and its adapter.

    Raises:
        ValueError: both or neither of rank and energy; a parameter is missing, or has another shape, or is quantised;
            or nothing differs.

    Example:
        base, tuned = (torch.nn.Sequential(torch.nn.Linear(8, 4)) for _ in range(2))
        net, adapter = pf.extract(base, tuned, rank=4)
        y = net.apply(adapter, torch.randn(3, 8))
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"extract: rank is {rank} and energy is {energy}; give exactly one of the two")
    check_energy("extract", energy)
    try:
        re.compile(pattern)
    except re.error as e:
        raise ValueError(f"extract: {pattern!r} is not a valid regular expression: {e}") from e
    known = Model.of(model)
    theirs: Mapping[str, Any] = Model.of(full).parameters if isinstance(full, nn.Module) else full
    leaves: dict[str, Leaf] = {}
    for name, site in known.sites.items():
        old, new = known.weights[name], theirs.get(name)
        if new is None or new.shape != site.shape:
            seen = "missing" if new is None else f"{list(new.shape)}"
            raise ValueError(f"extract: {name} is {list(site.shape)} in the base, and {seen} in the fine-tune")
        if isinstance(old, QuantisedWeight) or not old.is_floating_point():
            raise ValueError(f"extract: {name} is quantised in the base; give the base in the dtype of the fine-tune")
        if torch.equal(old, new):
            continue
        delta = wide(new.detach()) - wide(old.detach()).to(new.device)
        thin = site.kind in MATRIX and not site.tied and (not pattern or matches(pattern, name))
        if thin:
            r = rank if rank is None else min(rank, *site.matrix_shape())
            check_rank(name, site, r)
            leaves[name] = leaf_of(Change(site, dense=site.canonical(delta)), r, energy)
        else:
            leaves[name] = {"diff": site.canonical(delta).contiguous()}
    if not leaves:
        raise ValueError("extract: the two models are the same, so there is nothing to extract")
    return as_loras(model, leaves)
