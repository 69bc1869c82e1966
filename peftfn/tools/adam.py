"""AdamW, which other optimizers use for what is no pair (A, B)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.tools.step import Step, Tree, checked, each, leaf_in, part, wide

Rate = float | Tensor


def adamw(
    lr: Rate,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Step:
    """Return AdamW: −lr·(m̂/(√v̂ + eps) + weight_decay·w), as torch.optim.AdamW.

    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2017, arXiv:1711.05101.

    Args:
        lr: the learning rate.
        betas: decay of the two moments.
        eps: added to √v̂.
        weight_decay: of every tensor.

    Returns:
        A `Step`.

    Raises:
        ValueError: a rate, eps or decay below 0, or none that is finite; betas outside [0, 1).

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        step = pf.steps.adamw(1e-3, weight_decay=0.01)
        state = step.init(net.init())
    """

    checked("adamw", betas, lr=lr, eps=eps, weight_decay=weight_decay)

    def init(a: Mapping[str, Any]) -> Tree:
        zeros = each(a, lambda t: torch.zeros_like(wide(t)[0]))
        return {"count": torch.zeros(()), "m": zeros, "v": each(zeros, torch.clone)}

    def update(g: Mapping[str, Any], state: Tree, a: Mapping[str, Any]) -> tuple[Tree, Tree]:
        count = part(state, "count") + 1
        m = each(state["m"], lambda m, g: betas[0] * m + (1 - betas[0]) * g, g)
        v = each(state["v"], lambda v, g: betas[1] * v + (1 - betas[1]) * g.to(v.dtype).square(), g)
        one, two = 1 - betas[0] ** count, 1 - betas[1] ** count

        def change(m: Tensor, v: Tensor, w: Tensor) -> Tensor:
            return -lr * (m / one / ((v / two).sqrt() + eps) + weight_decay * w)

        return each(m, change, v, a), {"count": count, "m": m, "v": v}

    return Step(init, update)


def beside(sites: Mapping[str, Any], of_pair: Step, lr: Rate, **options: Any) -> Step:
    """A step that is `of_pair` at each of the sites, for its "a" and "b", and AdamW for all other tensors.

    of_pair: `init(leaf)` and `update(gradients, state, leaf)` of one site; a state may be of any structure.
    """
    rest = adamw(lr, **options)

    def others(tree: Mapping[str, Any]) -> Tree:
        return {
            n: {k: t for k, t in leaf.items() if k not in ("a", "b")} if n in sites else leaf
            for n, leaf in tree.items()
        }

    def init(a: Mapping[str, Any]) -> Tree:
        for n in sites:
            if not {"a", "b"} <= part(a, n).keys():
                raise ValueError(
                    f"{n}: the leaf has {sorted(a[n])}; train the adapters that a sum or scaling is made of"
                )
        return {"pairs": {n: of_pair.init(a[n] | {"scale": s}) for n, s in sites.items()}, "rest": rest.init(others(a))}

    def update(g: Mapping[str, Any], state: Tree, a: Mapping[str, Any]) -> tuple[Tree, Tree]:
        out, left = rest.update(others(g), state["rest"], others(a))
        new: Tree = {}
        for n, s in sites.items():
            leaf = {**leaf_in(a, n), "scale": s}
            change, new[n] = of_pair.update(leaf_in(g, n), part(state["pairs"], n), leaf)
            out[n] = {k: change[k] if k in change else out[n][k] for k in g[n]}
        return {n: out[n] for n in g}, {"pairs": new, "rest": left}

    return Step(init, update)
