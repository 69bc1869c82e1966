"""Starting points for LoRA: pure functions of a net, and of data or a quantiser, that leave the base as it is.

Each takes a net of LoRAs and returns a net on the same model and an adapter of it to train. Where the papers subtract
the start s·B₀A₀ from the weight, the net's method is an `OffsetLoRA`, whose constants are A₀ and B₀: so a start is the
identity, and `to_lora` converts the trained adapter to a LoRA of twice the rank, exactly. (PiSSA and OLoRA, which need
no data, are the methods `pf.PiSSA` and `pf.OLoRA`.)

    function       B A at the start, and what it is made of
    orthogonal     0, of two factors that are not zero
    eva            0: A has the principal directions of the layers' inputs, and the ranks go where they explain most
    corda          components of W C, C the covariance of the layers' inputs; an offset
    lora_ga        singular vectors of the loss's gradient; an offset
    lora_one       −G's largest components: the first step of gradient descent, which is no identity
    loftq          what a quantiser takes from the weight
    sparse         0, for SHiRA: at places of your own
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import sqrt
from typing import Any, Literal

import torch
from torch import Tensor

from peftfn.core.method import Leaf
from peftfn.core.plan import Adapter, Plan
from peftfn.core.rng import Rng
from peftfn.methods.weights.shira import SHiRA
from peftfn.net.net import Adapted, replanned
from peftfn.tensors.precision import wide
from peftfn.tools.observe import gradients, see_inputs
from peftfn.tools.pca import Pca
from peftfn.tools.start_nets import loras_of, offset_from, same_alpha, with_leaves, with_methods

__all__ = ["corda", "eva", "loftq", "lora_ga", "lora_one", "orthogonal", "sparse"]

Loss = Callable[[Any, Any], Tensor]
"""(the model's output, the batch) ↦ a scalar"""


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
    if keep not in ("knowledge", "instruction"):
        raise ValueError(f"corda: keep is {keep!r}; choose 'knowledge' or 'instruction'")
    loras = loras_of("corda", net)
    sums: dict[str, tuple[Tensor, int]] = {}

    def see(names: list[str], x: Tensor) -> None:
        x = x / x.max().abs().clamp(min=torch.finfo(x.dtype).tiny)  # as the authors do, batch by batch
        c = x.mT @ x
        if not c.isfinite().all():
            raise ValueError(f"corda: {names[0]}: its input has values that are not finite, or are too large")
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


def lora_ga(
    net: Adapted, batches: Iterable[Any], *, loss: Loss | None = None, gamma: float = 16.0
) -> tuple[Adapted, Adapter]:
    """Start at singular vectors of the loss's gradient G = U S Vᵀ: the first step is then close to full fine-tuning's.

    Wang, Yu and Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", 2024, arXiv:2407.05000.
    A₀ = (out^¼/√γ) V_{1…r}ᵀ and B₀ = (out^¼/√γ) U_{r+1…2r}, as in the authors' code. (PEFT scales B₀ alone, and by the
    singular values too.)

    Memory: a gradient of every adapted weight.

    Args:
        net: a net of LoRAs at linear layers, of ranks of at most half of the weights' smaller side.
        batches: as for `eva`; the gradients' mean over them counts.
        loss: (output, batch) ↦ a scalar; None: the output's `loss`.
        gamma: the start is the smaller, the larger it is.

    Returns:
        (net, adapter): a net of `OffsetLoRA`, and the start, which is the identity.

    Raises:
        ValueError: gamma is not above 0, a rank is too large, there are no batches, or no loss; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.LoRA(rank=2)})
        net, adapter = pf.starts.lora_ga(net, [torch.randn(3, 8)], loss=lambda out, batch: out.square().mean())
    """
    _above_zero("lora_ga", gamma)
    loras = loras_of("lora_ga", net)
    for n, (entry, m) in loras.items():
        if 2 * m.rank > min(entry.site.matrix_shape()):
            most = min(entry.site.matrix_shape()) // 2
            raise ValueError(f"{n}: rank is {m.rank}, and lora_ga takes twice as many singular vectors: give <= {most}")
    starts: dict[str, Leaf] = {}
    for n, g in gradients("lora_ga", net, loras, batches, loss).items():
        r, size = loras[n][1].rank, g.shape[0] ** 0.25 / sqrt(gamma)
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        starts[n] = {"a": size * vh[:r], "b": size * u[:, r : 2 * r]}
    return offset_from(net, starts)


def lora_one(
    net: Adapted, batches: Iterable[Any], *, loss: Loss | None = None, gamma: float = 128.0
) -> tuple[Adapted, Adapter]:
    """Start at the largest components of the negative gradient −G = U S Vᵀ: B A is one step of gradient descent.

    Zhang, Liu and Chen, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models, Provably
    and Efficiently", 2025, arXiv:2502.01235. A₀ = √(S/(S₁γ)) Vᵀ and B₀ = U √(S/(S₁γ)), of the rank largest. Nothing is
    subtracted, so the start is not the identity: this is the point of it.

    Memory: a gradient of every adapted weight.

    Args:
        net: a net of LoRAs at linear layers.
        batches, loss: as for `lora_ga`.
        gamma: the step is the smaller, the larger it is.

    Returns:
        (net, adapter): the net given, and the start.

    Raises:
        ValueError: gamma is not above 0, a rank is too large, there are no batches, or no loss; it names the site.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 6)), {"0.weight": pf.LoRA(rank=2)})
        net, adapter = pf.starts.lora_one(net, [torch.randn(3, 8)], loss=lambda out, batch: out.square().mean())
    """
    _above_zero("lora_one", gamma)
    loras = loras_of("lora_one", net)
    leaves: Adapter = {}
    for n, g in gradients("lora_one", net, loras, batches, loss).items():
        r = loras[n][1].rank
        u, s, vh = torch.linalg.svd(-g, full_matrices=False)
        root = (s[:r] / (s[0].clamp(min=torch.finfo(s.dtype).tiny) * gamma)).sqrt()
        leaves[n] = {"a": root[:, None] * vh[:r], "b": u[:, :r] * root}
    return net, with_leaves(net, leaves)


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
            u, s, vh = torch.linalg.svd(w - q, full_matrices=False)
            change = u[:, : m.rank] * s[: m.rank] @ vh[: m.rank]
        root = s[: m.rank].sqrt()
        leaves[n] = {"a": root[:, None] * vh[: m.rank], "b": u[:, : m.rank] * root / m.scale}
        out[n] = site.original(q).to(now.dtype)
    return out, with_leaves(net, leaves)


def _above_zero(where: str, gamma: float) -> None:
    if not 0 < gamma < float("inf"):
        raise ValueError(f"{where}: gamma is {gamma}; it must be a finite number above 0")
