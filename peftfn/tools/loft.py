"""LoFT: AdamW on the weight itself, as far as a low rank goes."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.net.net import Adapted, check_net
from peftfn.tools.adam import Rate, beside
from peftfn.tools.step import Step, Tree, checked, damped, pairs, part, wide


def loft(
    net: Adapted,
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    damping: float = 1e-8,
) -> Step:
    """Return LoFT: steps of B and A, in turn, that change the weight as AdamW on the weight would.

    Tastan et al., "LoFT: Low-Rank Adaptation That Behaves Like Full Fine-Tuning", 2025, arXiv:2505.21289. Gradients are
    scaled by (BᵀB)⁻¹ and (A Aᵀ)⁻¹; both moments are those of the weight's gradient, in the coordinates of the factor
    that is held, and follow it when it moves; the step is the weight's, projected. It needs no alpha: the scale
    cancels. At full rank, it is AdamW. B, which starts at zero, moves first.

    Memory: a [rank, rank] matrix for each row of B and each column of A, beside the moments.

    Args:
        net: the adapter's net.
        lr: the learning rate, as for AdamW on the weight.
        betas, eps: as for `adamw`.
        weight_decay: of the product s·B A.
        damping: added to the diagonals of BᵀB and A Aᵀ.

    Returns:
        A `Step`.

    Raises:
        ValueError: the net has no LoRA, or a rate or decay is out of range.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        step = pf.steps.loft(net, lr=1e-3)
        state = step.init(net.init())
    """
    check_net("loft", net)

    checked("loft", betas, lr=lr, eps=eps, weight_decay=weight_decay, damping=damping)

    def init(leaf: Mapping[str, Any]) -> Tree:
        a, b = wide(leaf["a"], leaf["b"])
        left, right = leaf["scale"] * b, a.mT
        return {"count": torch.zeros(()), "b": _start(left, right), "a": _start(right, left)}

    def half(g: Tensor, other: Tensor, state: Tree, count: Tensor) -> tuple[Tensor, Tree]:
        """The change of one factor [n, r], its gradient g and the other factor [m, r], if it is its turn."""
        inverse = damped(other.mT @ other, damping)
        turn = state["other"].mT @ other @ inverse  # old coordinates → new ones
        u = g @ inverse
        m = betas[0] * (state["m"] @ turn) + (1 - betas[0]) * u
        v = betas[1] * (turn.mT @ state["v"] @ turn) + (1 - betas[1]) * u[..., :, None] * u[..., None, :]
        full = m @ other.mT  # [n, m], the weight's first moment
        two_of = (other[..., :, None] * other[..., None, :]).flatten(-2)  # [m, r²]
        square = v.flatten(-2) @ two_of.mT  # [n, m], its second
        one, two = 1 - betas[0] ** count, 1 - betas[1] ** count
        full = full / one / ((square.clamp(min=0) / two).sqrt() + eps)
        return full @ other @ inverse, {"m": m, "v": v, "other": other}

    def update(g: Mapping[str, Any], state: Tree, leaf: Mapping[str, Any]) -> tuple[Tree, Tree]:
        s = leaf["scale"]
        a, b, da, db = wide(leaf["a"], leaf["b"], g["a"], g["b"])
        left, right = s * b, a.mT
        count = part(state, "count") + 1
        ub, of_b = half(db / s, right, state["b"], count)
        ua, of_a = half(da.mT, left, state["a"], count)
        mine = (count % 2 == 1).to(a.dtype)  # B's turn
        change = {"b": -lr * (ub / s + weight_decay * b) * mine, "a": -lr * (ua.mT + weight_decay * a) * (1 - mine)}
        return change, {"count": count, "a": of_a, "b": of_b}

    return beside(pairs("loft", net), Step(init, update), lr, betas=betas, eps=eps, weight_decay=weight_decay)


def _start(mine: Tensor, other: Tensor) -> Tree:
    n, r = mine.shape[-2:]
    return {"m": torch.zeros_like(mine), "v": mine.new_zeros(n, r, r), "other": other}
