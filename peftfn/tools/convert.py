"""Convert any adapter to LoRAs: the truncated singular value decomposition of its change of each weight."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.core.method import MATRIX, Method
from peftfn.core.plan import Adapter
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.lora import LoRA
from peftfn.net.net import Adapted, adapt
from peftfn.tensors.precision import wide


def to_lora(
    net: Adapted, adapter: Mapping[str, Any], *, rank: int | None = None, energy: float | None = None
) -> tuple[Adapted, Adapter]:
    """Convert an adapter to LoRAs with the best approximation of every delta: B = U_r √S_r, A = √S_r V_rᵀ, scale 1.

    A change of a layer's bias becomes the LoRA's bias, exactly. Sites that are not matrices (norms, biases) become
    `Full`, exactly. A delta of rank r or less is exact up to rounding.

    Args:
        net: the adapter's net.
        adapter: an adapter of it.
        rank: the rank at every site.
        energy: in (0, 1]: at each site, the smallest rank whose singular values hold this share of Σ σ².

    Returns:
        (net, adapter): a net of LoRAs on the same model, and its adapter.

    Raises:
        ValueError: both or neither of rank and energy, a rank above the size of a site's matrix, or a method whose
            change depends on the input.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoHa(rank=2)})
        lora_net, lora = pf.to_lora(net, net.init(), rank=4)
        assert lora["0.weight"]["a"].shape == (4, 8)
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"to_lora: rank is {rank} and energy is {energy}; give exactly one of the two")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"to_lora: energy is {energy}; it is a share of Σ σ²: give 0 < energy <= 1")
    for name, entry in net.plan.items():
        if not entry.method.mergeable:
            raise ValueError(
                f"{name}: {entry.method} depends on the input, so no LoRA approximates it; leave this site out"
            )
        shape = entry.site.matrix_shape()
        if rank is not None and entry.site.kind in MATRIX and not 0 < rank <= min(shape):
            raise ValueError(f"{name}: rank is {rank}, and the weight is {list(shape)}: give 0 < rank <= {min(shape)}")
    rules: dict[str, Method] = {}
    leaves: Adapter = {}
    biases = net.bias_deltas(adapter)
    for name, delta in net.delta(adapter).items():
        site = net.plan[name].site
        if site.kind not in MATRIX:
            rules[_exactly(name)], leaves[name] = Full(), {"diff": delta}
            continue
        u, s, vh = torch.linalg.svd(wide(site.canonical(delta)), full_matrices=False)
        r = rank if rank is not None else _rank_for(s, energy or 1.0)
        root = s[..., :r].sqrt()
        leaf = {"a": root[..., :, None] * vh[..., :r, :], "b": u[..., :, :r] * root[..., None, :]}
        leaves[name] = leaf | ({"beta": biases[name]} if name in biases else {})
        rules[_exactly(name)] = LoRA(rank=r, lora_bias=name in biases)
    out = adapt(net.model, rules)
    return out, {name: {k: t.contiguous() for k, t in leaves[name].items()} for name in out.plan}


def _rank_for(s: Tensor, energy: float) -> int:
    """The smallest rank that holds `energy` of Σ σ², at least 1; the largest over a stack of experts."""
    held = (s * s).cumsum(-1)
    return min(s.shape[-1], int((held < energy * (1 - 1e-6) * held[..., -1:]).sum(-1).max()) + 1)


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}$"
