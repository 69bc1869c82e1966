"""Optimizers for adapters as pure functions: (gradients, state, adapter) ↦ (updates, state).

Each function returns a `Step`. Rules for the gradient (`lora_fa`, `riemannian`, `lora_pro`) go before an optimizer, and
rules for the update (`lora_plus`) after it:

    step = pf.steps.chain(pf.steps.riemannian(net), pf.steps.adamw(1e-3))
    state = step.init(a)
    updates, state = step.update(grads, state, a)
    a = pf.steps.apply(a, updates)

`clip` goes before an optimizer, and `scheduled` after it. `stacked` makes of all this the step of a stack, each adapter
having its own rate, norm, count and state.

`lora_rite`, `lora_muon` and `loft` are optimizers themselves: what is no pair (A, B), they train by AdamW. A learning
rate may be a tensor, so that `vmap` runs over learning rates as over adapters.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from peftfn.core.numbers import above_zero
from peftfn.net.net import Adapted, check_net
from peftfn.tools.adam import Rate, adamw
from peftfn.tools.cures import unknown_step
from peftfn.tools.loft import loft
from peftfn.tools.paced import clip, cosine, linear, scheduled, stacked
from peftfn.tools.paired import lora_fa as _fa
from peftfn.tools.spectral import lora_muon, lora_rite
from peftfn.tools.step import Eigen, Step, Tree, checked, damped, each, leaf_in, number, pairs, wide

__all__ = [
    "Step",
    "adamw",
    "apply",
    "chain",
    "clip",
    "cosine",
    "linear",
    "loft",
    "lora_fa",
    "lora_muon",
    "lora_plus",
    "lora_pro",
    "lora_rite",
    "riemannian",
    "scheduled",
    "sgd",
    "stacked",
]

if not TYPE_CHECKING:  # to a type checker, every name would exist

    def __getattr__(name: str) -> NoReturn:
        raise AttributeError(unknown_step(name, __all__))


def apply(adapter: Mapping[str, Any], updates: Mapping[str, Any]) -> Tree:
    """Return adapter + updates, in the adapter's dtypes.

    Args:
        adapter: an adapter.
        updates: what `Step.update` returned.

    Returns:
        The adapter after the step.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        a = net.init()
        b = pf.steps.apply(a, {"0.weight": {k: torch.ones_like(t) for k, t in a["0.weight"].items()}})
        assert torch.equal(b["0.weight"]["b"], a["0.weight"]["b"] + 1)
    """
    return each(adapter, lambda t, u: t + u.to(t.dtype), updates)


def chain(*steps: Step) -> Step:
    """Return the step in which each one's updates are the next one's gradients.

    Args:
        steps: at least one.

    Returns:
        A `Step`, whose state has that of each.

    Raises:
        ValueError: no steps.
        TypeError: something else.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        step = pf.steps.chain(pf.steps.riemannian(net), pf.steps.sgd(0.1), pf.steps.lora_plus(16))
        state = step.init(net.init())
    """
    if not steps:
        raise ValueError("chain: give at least one step")
    for s in steps:
        if not isinstance(s, Step):
            cure = "scheduled(f) is the step of a schedule f" if callable(s) else "write chain(clip(1.0), adamw(lr))"
            raise TypeError(f"chain: a {type(s).__name__} is not a step: {cure}")

    def init(a: Mapping[str, Any]) -> Tree:
        return {str(i): s.init(a) for i, s in enumerate(steps)}

    def update(g: Mapping[str, Any], state: Tree, a: Mapping[str, Any]) -> tuple[Tree, Tree]:
        new: Tree = {}
        for i, s in enumerate(steps):
            g, new[str(i)] = s.update(g, state[str(i)], a)
        return dict(g), new

    return Step(init, update)


def sgd(lr: Rate) -> Step:
    """Return gradient descent: −lr·g.

    Args:
        lr: the learning rate.

    Returns:
        A `Step` without state.

    Raises:
        ValueError: a rate below 0, or none that is finite.

    Example:
        step = pf.steps.sgd(0.1)
        updates, _ = step.update({"w": {"a": torch.ones(2)}}, {}, {"w": {"a": torch.zeros(2)}})
    """
    checked("sgd", lr=lr)
    return Step(lambda a: {}, lambda g, state, a: (each(g, lambda t: -lr * t), state))


def lora_plus(ratio: Rate = 16.0) -> Step:
    """Return LoRA+'s rule for updates: those of every B, and of vectors, times `ratio`; see `optim.lora_plus`.

    Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, arXiv:2402.12354. Put it after an
    optimizer without weight decay, whose learning rate is then that of A.

    Args:
        ratio: lr_B / lr_A, above 0.

    Returns:
        A `Step` without state.

    Raises:
        ValueError: a ratio that is not above 0.

    Example:
        step = pf.steps.chain(pf.steps.adamw(1e-4), pf.steps.lora_plus(16))
        state = step.init({"w": {"a": torch.zeros(2, 8), "b": torch.zeros(4, 2)}})
    """
    number("lora_plus", "ratio", ratio)
    if not isinstance(ratio, Tensor):
        above_zero("lora_plus", ratio=ratio)

    def update(g: Mapping[str, Any], state: Tree, a: Mapping[str, Any]) -> tuple[Tree, Tree]:
        out: Tree = {}
        for name, leaf in g.items():
            if not isinstance(leaf, Mapping):
                out[name] = leaf
                continue
            fast = {
                k for k, t in leaf.items() if isinstance(t, Tensor) and (k == "b" or k.endswith(".b") or t.dim() < 2)
            }
            out[name] = {k: ratio * t if k in fast else t for k, t in leaf.items()}
        return out, state

    return Step(lambda a: {}, update)


def lora_fa(net: Adapted) -> Step:
    """Return LoRA-FA's rule for gradients: A's become zero, and B's g_B (A Aᵀ)⁺ / s²; see `optim.lora_fa`.

    Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023,
    arXiv:2308.03303.

    Args:
        net: the adapter's net.

    Returns:
        A `Step` without state.

    Raises:
        ValueError: the net has no LoRA.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        step = pf.steps.chain(pf.steps.lora_fa(net), pf.steps.adamw(1e-3))
    """
    check_net("lora_fa", net)
    pairs("lora_fa", net)
    return Step(lambda a: {}, lambda g, state, a: (_fa(net, a, g), state))


def riemannian(net: Adapted, damping: float = 1e-2) -> Step:
    """Return Riemannian preconditioning, a rule for gradients: (BᵀB + λI)⁻¹ g_A and g_B (A Aᵀ + λI)⁻¹.

    Zhang and Pilanci, "Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models", 2024, arXiv:2402.02347.
    Without damping, the change of the weight by a step does not depend on how large B is and how small A.

    Args:
        net: the adapter's net.
        damping: λ, at least 0.

    Returns:
        A `Step` without state.

    Raises:
        ValueError: the net has no LoRA, or a negative damping.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        step = pf.steps.chain(pf.steps.riemannian(net), pf.steps.sgd(0.1))
    """
    check_net("riemannian", net)
    sites = pairs("riemannian", net)
    checked("riemannian", damping=damping)

    def update(g: Mapping[str, Any], state: Tree, a: Mapping[str, Any]) -> tuple[Tree, Tree]:
        out = dict(g)
        for n in sites:
            here, leaf = leaf_in(g, n), leaf_in(a, n)
            da, db, x, y = wide(here["a"], here["b"], leaf["a"], leaf["b"])
            new = {"a": damped(y.mT @ y, damping) @ da, "b": db @ damped(x @ x.mT, damping)}
            out[n] = {**g[n], **{k: t.to(g[n][k].dtype) for k, t in new.items()}}
        return out, state

    return Step(lambda a: {}, update)


def lora_pro(net: Adapted, damping: float = 1e-8) -> Step:
    """Return LoRA-Pro's rule for gradients: those whose step changes the weight most like full fine-tuning's.

    Wang et al., "LoRA-Pro: Are Low-Rank Adapters Properly Optimized?", 2024, arXiv:2407.18242. They minimise
    ‖s·(B g_A + g_B A) − G‖, G being the weight's gradient: g_A' = (BᵀB)⁻¹ g_A/s² + X A and
    g_B' = (I − B(BᵀB)⁻¹Bᵀ) g_B (A Aᵀ)⁻¹/s² − B X, where BᵀB X + X A Aᵀ = −(BᵀB)⁻¹ g_A Aᵀ/s² keeps them close to g_A and
    g_B. Before AdamW it is the authors' "efficient" form.

    Args:
        net: the adapter's net.
        damping: added to the diagonals of BᵀB and A Aᵀ.

    Returns:
        A `Step` without state.

    Raises:
        ValueError: the net has no LoRA, or a negative damping.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        step = pf.steps.chain(pf.steps.lora_pro(net), pf.steps.adamw(1e-4))
    """
    check_net("lora_pro", net)
    sites = pairs("lora_pro", net)
    checked("lora_pro", damping=damping)

    def update(g: Mapping[str, Any], state: Tree, a: Mapping[str, Any]) -> tuple[Tree, Tree]:
        out = dict(g)
        for n, s in sites.items():
            here, leaf = leaf_in(g, n), leaf_in(a, n)
            da, db, x, y = wide(here["a"], here["b"], leaf["a"], leaf["b"])
            bb, aa = y.mT @ y, x @ x.mT
            ga = damped(bb, damping) @ da / s**2
            gb = db @ damped(aa, damping) / s**2
            gb = gb - y @ (damped(bb, damping) @ (y.mT @ gb))
            free = _sylvester(bb, aa, -(ga @ x.mT))
            new = {"a": ga + free @ x, "b": gb - y @ free}
            out[n] = {**g[n], **{k: t.to(g[n][k].dtype) for k, t in new.items()}}
        return out, state

    return Step(lambda a: {}, update)


def _sylvester(p: Tensor, q: Tensor, c: Tensor) -> Tensor:
    """X of P X + X Q = C, P and Q symmetric without negative eigenvalues; 0 where both are 0."""
    (s, u), (t, v) = Eigen.of(p), Eigen.of(q)
    total = s[..., :, None] + t[..., None, :]
    some = total > torch.finfo(total.dtype).tiny
    return u @ torch.where(some, (u.mT @ c @ v) / torch.where(some, total, 1.0), 0.0) @ v.mT
