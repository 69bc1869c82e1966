"""Starting points made of the inputs of layers, which stream: see `starts.py`."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from peftfn.core.method import Leaf
from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Adapter
from peftfn.net.net import Adapted, check_net
from peftfn.tensors.precision import wide
from peftfn.tools.observe import see_inputs
from peftfn.tools.pca import Pca
from peftfn.tools.start_nets import loras_of, offset_from, same_alpha, with_leaves, with_methods


@checks_numbers
def eva(net: Adapted, batches: Iterable[Any], *, rho: float = 2.0, whiten: bool = False) -> tuple[Adapted, Adapter]:
    """Start with A at the principal directions of each layer's inputs and B at zero, and give ranks where they count.

    Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024, arXiv:2410.07170. Each
    layer's inputs go through an incremental singular value decomposition, of `rho` times its rank of components. The
    ranks of all layers together go to the components that explain the largest shares of their inputs' variance; a layer
    that gets none is left out. Its scale s stays what it was.

    Memory: (rho·rank + 8)·in numbers for each layer, and one batch.

    Args:
        net: a net of LoRAs at linear layers.
        batches: what the model is called with, one after the other: a dict of keyword arguments, a tuple of arguments,
            or one argument. Tokens that an `attention_mask` masks are left out. It is read once.
        rho: how many times its rank a layer may get; 1 leaves the ranks as they are.
        whiten: divide A's rows by the square roots of the singular values.

    Returns:
        (net, adapter): a net with the new ranks, and the start, which is the identity.

    Raises:
        ValueError: rho is below 1, there are no batches, or fewer tokens than a layer needs for its components; it
            names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.LoRA(rank=2)})
        net, adapter = pf.starts.eva(net, [torch.randn(16, 8) for _ in range(3)])
    """
    check_net("eva", net)
    if not 1 <= rho < float("inf"):
        raise ValueError(f"eva: rho is {rho}; a layer keeps at least its own rank: give rho >= 1")
    loras = loras_of("eva", net)
    most = {n: min(round(m.rank * rho), *e.site.matrix_shape()) for n, (e, m) in loras.items()}
    seen: dict[str, Pca] = {}
    shared: dict[str, str] = {}

    def see(names: list[str], x: Tensor) -> None:
        first = shared.setdefault(names[0], names[0])
        for n in names:
            if shared.setdefault(n, first) != first:
                raise ValueError(f"eva: {n}: its input is that of {first} in one batch and not in another")
        k = max(most[n] for n in shared if shared[n] == first)
        seen[first] = seen.get(first, Pca.start(min(k + 8, x.shape[-1]), x)).update(x)  # some to spare, for accuracy

    see_inputs("eva", net, loras, batches, see)
    for name in loras:
        if (had := seen[shared[name]].count) < most[name]:
            raise ValueError(f"eva: {name}: {had} tokens are too few for {most[name]} components; give more batches")
    ratios = [(float(r), i, n) for n in loras for i, r in enumerate(seen[shared[n]].ratios()[: most[n]])]
    budget = sum(m.rank for _, m in loras.values())
    ranks = dict.fromkeys(loras, 0)
    for _, _, n in sorted(ratios, key=lambda r: (-r[0], r[1]))[:budget]:
        ranks[n] += 1
    methods = {
        n: replace(m, rank=r, alpha=same_alpha(m, r)) if (r := ranks[n]) else None for n, (_, m) in loras.items()
    }
    new = with_methods(net, methods)
    leaves: Adapter = {}
    for n, m in methods.items():
        if m is not None:
            pca, out = seen[shared[n]], loras[n][0].site.matrix_shape()[0]
            a = pca.components[: m.rank]
            a = a / pca.values[: m.rank, None].sqrt() if whiten else a
            leaves[n] = {"a": a.clone(), "b": a.new_zeros(out, m.rank)}
    return new, with_leaves(new, leaves)


def corda(
    net: Adapted, batches: Iterable[Any], *, keep: Literal["knowledge", "instruction"] = "knowledge"
) -> tuple[Adapted, Adapter]:
    """Start at components of the weight that the inputs say are least, or most, in use: of W C = U S Vᵀ.

    Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", 2024, arXiv:2406.05223.
    C = Σ x xᵀ over the layer's inputs, with 1 % of its mean diagonal (doubled until it inverts well) added to its
    diagonal. B₀ = U √(S/s) and A₀ = √(S/s) Vᵀ C⁻¹ are of the rank smallest components, so that training leaves what the
    inputs use as it is ("knowledge"), or of the largest, to train what they use ("instruction").

    Memory: in² numbers for each layer.

    Args:
        net: a net of LoRAs at linear layers.
        batches: as for `eva`. They should have many times `in` tokens, since C is inverted.
        keep: which components to leave: "knowledge" is PEFT's "kpm", "instruction" its "ipm".

    Returns:
        (net, adapter): a net of `OffsetLoRA`, and the start, which is the identity.

    Raises:
        ValueError: another word for `keep`, there are no batches, or an input is not finite; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.LoRA(rank=2)})
        net, adapter = pf.starts.corda(net, [torch.randn(16, 8) for _ in range(3)], keep="instruction")
    """
    check_net("corda", net)
    if keep not in ("knowledge", "instruction"):
        raise ValueError(f"corda: keep is {keep!r}; choose 'knowledge' or 'instruction'")
    loras = loras_of("corda", net)
    sums: dict[str, tuple[Tensor, int]] = {}

    def see(names: list[str], x: Tensor) -> None:
        x = x / x.max().abs().clamp(min=torch.finfo(x.dtype).tiny)  # as the authors do, batch by batch
        c = x.mT @ x
        if not c.any():
            raise ValueError(f"corda: {names[0]}: its inputs in a batch are all zero, so they have no directions")
        for n in names:
            old, count = sums.get(n, (torch.zeros_like(c), 0))
            sums[n] = old + c, count + 1

    see_inputs("corda", net, loras, batches, see)
    starts: dict[str, Leaf] = {}
    for n, (entry, m) in loras.items():
        total, count = sums.pop(n)
        c, inverse = _invertible(total / count)
        u, s, vh = torch.linalg.svd(wide(entry.site.canonical(net.weights[n])) @ c, full_matrices=False)
        part = slice(0, m.rank) if keep == "instruction" else slice(len(s) - m.rank, len(s))
        root = (s[part] / m.scale).sqrt()
        starts[n] = {"a": root[:, None] * (vh[part] @ inverse), "b": u[:, part] * root}
    return offset_from(net, starts)


def _invertible(c: Tensor) -> tuple[Tensor, Tensor]:
    """(C with enough on its diagonal, its inverse)."""
    eye, damp = torch.eye(len(c), dtype=c.dtype, device=c.device), 0.01
    for _ in range(40):
        more = c + damp * c.diagonal().mean() * eye
        inverse = torch.linalg.inv(more)
        if torch.dist(more @ inverse, eye) < 0.05:
            break
        damp *= 2
    return more, inverse
