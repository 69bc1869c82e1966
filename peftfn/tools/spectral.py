"""Optimizers that do not see how a product is factored: LoRA-Muon and LoRA-RITE."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.net.net import Adapted, check_net
from peftfn.tools.adam import Rate, beside
from peftfn.tools.step import Eigen, Step, Tree, checked, pairs, part, sign, wide


def lora_muon(
    net: Adapted, lr: Rate, *, beta: float = 0.95, weight_decay: float = 0.0, others_lr: Rate | None = None
) -> Step:
    """Return LoRA-Muon: the steepest descent of W = s·B A in the spectral norm, half by each factor.

    Cesista et al., "LoRA-Muon: Spectral Steepest Descent on the Low-Rank Manifold", 2026, arXiv:2606.12921. With
    L = s·B, momenta m of the factors' gradients, and sign(U S Vᵀ) = U Vᵀ:
    ΔL = −lr/2·sign(m_L (A Aᵀ)^−½) (A Aᵀ)^−½, and ΔA alike with (LᵀL)^−½. So the weight moves by at most lr in the
    spectral norm, whatever the rank, s, and the sizes of the factors. `weight_decay` decays the product: both factors
    by √(1 − weight_decay·lr). The signs are exact, by an eigendecomposition [rank, rank].

    Args:
        net: the adapter's net.
        lr: how far the weight moves.
        beta: decay of the momenta.
        weight_decay: of the product.
        others_lr: AdamW's learning rate for what is no pair (A, B); None for lr.

    Returns:
        A `Step`.

    Raises:
        ValueError: the net has no LoRA, or a rate or decay is out of range.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        step = pf.steps.lora_muon(net, lr=0.02)
        state = step.init(net.init())
    """
    check_net("lora_muon", net)
    others_lr = lr if others_lr is None else others_lr
    checked("lora_muon", (beta,), lr=lr, weight_decay=weight_decay, others_lr=others_lr)

    def init(leaf: Mapping[str, Any]) -> Tree:
        return {k: torch.zeros_like(wide(leaf[k])[0]) for k in "ab"}

    def update(g: Mapping[str, Any], state: Tree, leaf: Mapping[str, Any]) -> tuple[Tree, Tree]:
        s = leaf["scale"]
        m = {k: beta * state[k] + (1 - beta) * g[k] for k in "ab"}
        a, b = wide(leaf["a"], leaf["b"])
        of_a, of_b = Eigen.of(a @ a.mT).power(-0.5), Eigen.of(s**2 * b.mT @ b).power(-0.5)
        half = -lr / 2
        db = half * sign(m["b"] @ of_a / s) @ of_a / s
        da = half * (sign(m["a"].mT @ of_b) @ of_b).mT
        keep = (1 - weight_decay * torch.as_tensor(lr, dtype=a.dtype, device=a.device)).sqrt()
        return {"a": (keep - 1) * a + da / keep, "b": (keep - 1) * b + db / keep}, m

    return beside(pairs("lora_muon", net), Step(init, update), others_lr)


def lora_rite(
    net: Adapted,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    others_lr: Rate | None = None,
) -> Step:
    """Return LoRA-RITE: Adam with a matrix for the second moment, in coordinates that do not depend on the factoring.

    Yen et al., "LoRA Done RITE: Robust Invariant Transformation Equilibration for LoRA Optimization", 2024,
    arXiv:2410.20625. B and A are read as orthonormal bases times small matrices, by QR. A gradient is taken in the
    other factor's basis, the moments follow the basis as it turns, and the step goes back to the factors: two
    factorings of one product take the same steps. (The paper's "escape mass", which its code leaves off, and the
    clipping of its code are not here.)

    Args:
        net: the adapter's net.
        lr: the learning rate.
        betas: decay of the moments.
        eps: added to the square roots of the second moment's eigenvalues.
        weight_decay: of the factors.
        others_lr: AdamW's learning rate for what is no pair (A, B); None for lr.

    Returns:
        A `Step`.

    Raises:
        ValueError: the net has no LoRA, or a rate or decay is out of range.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        step = pf.steps.lora_rite(net, lr=1e-3)
        state = step.init(net.init())
    """
    check_net("lora_rite", net)
    others_lr = lr if others_lr is None else others_lr
    checked("lora_rite", betas, lr=lr, eps=eps, weight_decay=weight_decay, others_lr=others_lr)

    def init(leaf: Mapping[str, Any]) -> Tree:
        a, b = wide(leaf["a"], leaf["b"])
        r = a.shape[-2]
        one = {"m": torch.zeros_like(b), "v": b.new_zeros(r, r), "basis": torch.zeros_like(a.mT)}
        two = {"m": torch.zeros_like(a.mT), "v": a.new_zeros(r, r), "basis": torch.zeros_like(b)}
        return {"count": torch.zeros(()), "b": one, "a": two}

    def half(g: Tensor, other: Tensor, state: Tree, count: Tensor) -> tuple[Tensor, Tree]:
        """The step of one factor [n, r], its gradient g, the other factor [m, r]."""
        basis, turn = torch.linalg.qr(other)
        inverse = torch.linalg.pinv(turn)
        p = basis.mT @ state["basis"]
        u = g @ inverse
        one, two = _decay(betas[0], count), _decay(betas[1], count)
        v = two * (p @ state["v"] @ p.mT) + (1 - two) * (u.mT @ u) / u.shape[-2]
        w, e = torch.linalg.eigh((v + v.mT) / 2)
        u = u @ (e / (w.clamp(min=0).sqrt() + eps)[..., None, :]) @ e.mT
        m = one * (state["m"] @ p.mT) + (1 - one) * u
        return m @ inverse.mT, {"m": m, "v": v, "basis": basis}

    def update(g: Mapping[str, Any], state: Tree, leaf: Mapping[str, Any]) -> tuple[Tree, Tree]:
        a, b, da, db = wide(leaf["a"], leaf["b"], g["a"], g["b"])
        count = part(state, "count") + 1
        ub, of_b = half(db, a.mT, state["b"], count)
        ua, of_a = half(da.mT, b, state["a"], count)
        updates = {"a": -lr * (ua.mT + weight_decay * a), "b": -lr * (ub + weight_decay * b)}
        return updates, {"count": count, "a": of_a, "b": of_b}

    return beside(pairs("lora_rite", net), Step(init, update), others_lr)


def _decay(beta: float, count: Tensor) -> Tensor:
    """The decay that makes a moving average unbiased from the first step on."""
    return beta * (1 - beta ** (count - 1)) / (1 - beta**count)
