"""Optimizers that see LoRA's A and B as a pair: LoRA-FA and Riemannian preconditioning. See `optim.py`."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.plan import Entry
from peftfn.methods.parts.lowrank import Ranked
from peftfn.net.net import Adapted, check_net
from peftfn.tools.groups import decay
from peftfn.tools.step import damped, leaf_in, part, wide
from peftfn.view.module import parameters_of, plan_of


def lora_fa(net: Adapted, adapter: Mapping[str, Any], grads: Mapping[str, Any]) -> dict[str, Any]:
    """Transform gradients as LoRA-FA does: A's becomes zero, and B's becomes g_B (A Aᵀ)⁺ / s².

    s·g_B' A is then the change of the weight nearest to its full gradient among those that B can make.
    Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023,
    arXiv:2308.03303.

    Args:
        net, adapter: where the gradients were computed.
        grads: a tree like `adapter`, from torch.func.grad, say. Only LoRA's leaves are transformed.

    Returns:
        A tree like `grads`.

    Raises:
        ValueError: the adapter has no LoRA.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        a, x = net.init(), torch.randn(3, 8)
        g = torch.func.grad(lambda a: net.apply(a, x).square().sum())(a)
        g = pf.optim.lora_fa(net, a, g)
    """
    check_net("lora_fa", net)
    out = dict(grads)
    for site, scale in _loras("lora_fa", net.plan, adapter).items():
        a, g = adapter[site]["a"], leaf_in(grads, site)
        out[site] = {**g, "a": torch.zeros_like(g["a"]), "b": _projected(g["b"], a, scale)}
    return out


class _Paired(torch.optim.AdamW):
    """AdamW that transforms the gradients of LoRA's A and B first."""

    def __init__(
        self,
        adapter: nn.Module | Mapping[str, Any],
        lr: float,
        *,
        weight_decay: float = 0.0,
        net: Adapted | None = None,
        name: str | None = None,
        frozen: tuple[str, ...] = (),
        **others: Any,
    ):
        where = type(self).__name__
        if isinstance(adapter, nn.Module):
            tree, plan = parameters_of(adapter, name), plan_of(adapter, name)
        elif net is not None:
            tree, plan = dict(adapter), net.plan
        else:
            raise ValueError(f"{where}: a plain adapter does not say its scales: pass net=net")
        pairs = {tree[site]["b"]: (tree[site]["a"], scale) for site, scale in _loras(where, plan, tree).items()}
        for a, _ in pairs.values() if "a" in frozen else ():
            a.requires_grad_(False)
        super().__init__(decay(adapter, weight_decay, net=net, name=name), lr=lr, **others)
        self._pairs = pairs

    def _transform(self, a: Tensor, b: Tensor, scale: float) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, as torch.optim.Optimizer.step.

        Returns:
            The loss that `closure` returned, or None.

        Example:
            net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
            m = pf.as_module(net, net.init())
            optimizer = pf.optim.LoRAFA(m, lr=1e-3)
            m(torch.randn(3, 8)).sum().backward()
            optimizer.step()
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for b, (a, scale) in self._pairs.items():
            self._transform(a, b, scale)
        super().step()
        return loss


class LoRAFA(_Paired):
    """AdamW on B with LoRA-FA's gradient, see `lora_fa`.

    It freezes A (`requires_grad_(False)`), which so needs no gradient and no saved input. Tensors of other methods are
    trained by plain AdamW. Its state saves like any optimizer's.

    Args:
        adapter: a module, or a plain adapter (which needs its net).
        lr: the learning rate.
        weight_decay: as in `decay`.
        net, name: as in `lora_plus`.
        others: further arguments of AdamW.

    Raises:
        ValueError: a plain adapter without its net, or the adapter has no LoRA.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init())
        optimizer = pf.optim.LoRAFA(m, lr=1e-3)
    """

    def __init__(
        self,
        adapter: nn.Module | Mapping[str, Any],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        net: Adapted | None = None,
        name: str | None = None,
        **others: Any,
    ):
        super().__init__(adapter, lr, weight_decay=weight_decay, net=net, name=name, frozen=("a",), **others)

    def _transform(self, a: Tensor, b: Tensor, scale: float) -> None:
        if b.grad is not None:
            b.grad = _projected(b.grad, a, scale)


class Riemannian(_Paired):
    """AdamW on gradients that are preconditioned by the other factor, see `steps.riemannian`.

    g_A becomes (BᵀB + λI)⁻¹ g_A, and g_B becomes g_B (A Aᵀ + λI)⁻¹. Tensors of other methods are trained by plain
    AdamW.

    Args:
        adapter: a module, or a plain adapter (which needs its net).
        lr: the learning rate.
        damping: λ, at least 0.
        weight_decay: as in `decay`.
        net, name: as in `lora_plus`.
        others: further arguments of AdamW.

    Raises:
        ValueError: a negative damping, a plain adapter without its net, or the adapter has no LoRA.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init())
        optimizer = pf.optim.Riemannian(m, lr=1e-3, damping=0.01)
    """

    def __init__(
        self,
        adapter: nn.Module | Mapping[str, Any],
        lr: float = 1e-3,
        *,
        damping: float = 1e-2,
        weight_decay: float = 0.0,
        net: Adapted | None = None,
        name: str | None = None,
        **others: Any,
    ):
        if damping < 0:
            raise ValueError(f"Riemannian: damping is {damping}; give damping >= 0")
        super().__init__(adapter, lr, weight_decay=weight_decay, net=net, name=name, **others)
        self._damping = damping

    def _transform(self, a: Tensor, b: Tensor, scale: float) -> None:
        x, y = wide(a.detach(), b.detach())
        if a.grad is not None:
            a.grad = (damped(y.mT @ y, self._damping) @ a.grad.to(x.dtype)).to(a.grad.dtype)
        if b.grad is not None:
            b.grad = (b.grad.to(x.dtype) @ damped(x @ x.mT, self._damping)).to(b.grad.dtype)


def _projected(g: Tensor, a: Tensor, scale: float) -> Tensor:
    """g (A Aᵀ)⁺ / s², in fp32 or wider. g [..., out, r], a [..., r, in]"""
    m, full = wide(a.detach(), g)
    return (full @ torch.linalg.pinv(m @ m.mT, hermitian=True) / scale**2).to(g.dtype)


def _loras(where: str, plan: Mapping[str, Entry], adapter: Mapping[str, Any]) -> dict[str, float]:
    """site → scale, of LoRA's leaves."""
    found = {
        site: entry.method.scale
        for site, entry in plan.items()
        if isinstance(entry.method, Ranked) and {"a", "b"} <= part(adapter, site).keys()
    }
    if not found:
        raise ValueError(f"{where}: the adapter has no LoRA, so there is no A and B to treat as a pair")
    return found
