"""Starting points that need no data, or the weights alone: see `starts.py`."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from peftfn.core.numbers import checks_numbers
from peftfn.core.plan import Adapter, Plan
from peftfn.core.rng import Rng
from peftfn.methods.weights.shira import SHiRA
from peftfn.net.net import Adapted, check_net, replanned
from peftfn.tensors.precision import wide
from peftfn.tools.start_nets import loras_of, with_leaves


def orthogonal(net: Adapted, seed: int = 0) -> tuple[Adapted, Adapter]:
    """Start at B A = 0 with both factors away from zero: rows of A and columns of B that are orthogonal to each other.

    With the rows of a random orthogonal Q [rank, rank], A = Q_oddᵀ X / 10 and B = Y Q_even / 10, X and Y normal; so
    B A = Y (Q_even Q_oddᵀ) X / 100 = 0, up to rounding. As PEFT's "orthogonal".

    Args:
        net: a net of LoRAs of even ranks.
        seed: of Q, X and Y; a site's values depend on (seed, site name) alone.

    Returns:
        (net, adapter): the net given, and the start.

    Raises:
        ValueError: an odd rank, or no LoRA at a linear layer; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.LoRA(rank=2)})
        net, adapter = pf.starts.orthogonal(net)
    """
    check_net("orthogonal", net)
    leaves: Adapter = {}
    for name, (entry, m) in loras_of("orthogonal", net).items():
        if m.rank % 2:
            raise ValueError(f"{name}: rank is {m.rank}, and orthogonal splits it in two: give an even rank")
        out, in_ = entry.site.matrix_shape()
        rng = Rng(seed, name, device=net.weights[name].device)
        q = torch.linalg.qr(rng.normal(m.rank, m.rank))[0]
        a = q[0::2].mT @ rng.normal(m.rank // 2, in_) / 10
        b = rng.normal(out, m.rank // 2) @ q[1::2] / 10
        leaves[name] = {"a": a, "b": b}
    return net, with_leaves(net, leaves)


def sparse(net: Adapted, mask: Callable[[str, Tensor], Tensor]) -> tuple[Adapted, Adapter]:
    """Start SHiRA at places of your own, in place of random ones: where weights are large, say, or where gradients are.

    Bhardwaj et al., "Sparse High Rank Adapters", 2024, arXiv:2406.13175, has several such masks. Files keep the places,
    PEFT's too.

    Args:
        net: a net with SHiRA.
        mask: (site, w [out, in]) ↦ truth values [out, in], of which rank·(in + out) are true.

    Returns:
        (net, adapter): the same net with these places, and a fresh adapter of it.

    Raises:
        ValueError: a mask of another shape or number, a stack of experts, or no SHiRA; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.SHiRA(rank=1)})
        largest = lambda site, w: w.abs() >= w.abs().flatten().topk(14).values[-1]  # 14 = 1·(8 + 6)
        net, adapter = pf.starts.sparse(net, largest)
    """
    check_net("sparse", net)
    entries, weights = dict(net.plan.items()), net.weights
    found = {n: e for n, e in entries.items() if isinstance(e.method, SHiRA)}
    if not found:
        raise ValueError("sparse: the net has no SHiRA; its places are what a mask says")
    for name, entry in found.items():
        if entry.site.stacked:
            raise ValueError(f"sparse: {name} is a stack of experts, which share their places: leave it out")
        w = wide(entry.site.canonical(weights[name]))
        chosen, n = mask(name, w), entry.spec["v"].numel()
        if chosen.shape != w.shape or chosen.dtype != torch.bool or int(chosen.sum()) != n:
            what = f"{int(chosen.sum())} of {list(chosen.shape)}, {chosen.dtype}"
            raise ValueError(
                f"sparse: {name}: the mask has {what}; {entry.method} wants {n} of {list(w.shape)}, torch.bool"
            )
        entries[name] = replace(entry, frozen={"index": torch.stack(chosen.to(w.device).nonzero(as_tuple=True))})
    made = replanned(net, Plan(entries, net.plan.rules, net.plan.banks))
    return made, made.init()


@checks_numbers
def loftq(
    net: Adapted, quantise: Callable[[Tensor], Tensor] | Mapping[str, Tensor], *, steps: int = 1
) -> tuple[dict[str, Tensor], Adapter]:
    """Start at what quantisation takes from the weights: W ≈ Q + s·B A, alternating between Q and B A.

    Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", 2023, arXiv:2310.08659. Each step
    is Q ← quantise(W − s·B A) and s·B A ← the nearest matrix of the rank to W − Q.

    Args:
        net: a net of LoRAs at linear layers, on the model with its full weights, or on a quantised model.
        quantise: a function from a matrix to its quantised values, which have the same shape and dtype; or, where the
            net's model is quantised already, {site: the full weight}: then Q is what the model has, and one step is
            all.
        steps: how often to alternate.

    Returns:
        (weights, adapter): {site: Q, in the parameter's shape}, to quantise the model with, or for
        `net.apply(adapter, …, params=weights)`; and the start.

    Raises:
        ValueError: steps is below 1, or above it for a quantised model; a rank is too large, or a weight is missing or
            has another shape; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.LoRA(rank=2)})
        weights, adapter = pf.starts.loftq(net, lambda w: (w * 8).round() / 8, steps=3)
        y = net.apply(adapter, torch.randn(3, 8), params=weights)
    """
    check_net("loftq", net)
    given = quantise if isinstance(quantise, Mapping) else None
    if steps < 1 or (given is not None and steps > 1):
        raise ValueError(f"loftq: steps is {steps}; give 1{'' if given is not None else ' or more'}")
    loras, held = loras_of("loftq", net, quantised=True), net.weights
    out: dict[str, Tensor] = {}
    leaves: Adapter = {}
    for n, (entry, m) in loras.items():
        site, now = entry.site, held[n]
        full = now if given is None else given.get(n)
        if full is None or full.shape != site.shape:
            seen = "missing" if full is None else f"of shape {list(full.shape)}"
            raise ValueError(f"loftq: {n}: its full weight is {seen}; give {{site: weight {list(site.shape)}}}")
        w = wide(site.canonical(full.detach()))
        change = torch.zeros_like(w)
        for _ in range(steps):
            q = wide(site.canonical(now) if given is not None else quantise(w - change))  # type: ignore[operator]
            if q.shape != w.shape:
                raise ValueError(f"loftq: {n}: quantise returns {list(q.shape)} for a matrix of {list(w.shape)}")
            u, s, vh = torch.linalg.svd(w - q, full_matrices=False)
            change = u[:, : m.rank] * s[: m.rank] @ vh[: m.rank]
        root = s[: m.rank].sqrt()
        leaves[n] = {"a": root[:, None] * vh[: m.rank], "b": u[:, : m.rank] * root / m.scale}
        out[n] = site.original(q).to(now.dtype)
    return out, with_leaves(net, leaves)
