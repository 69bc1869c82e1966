"""Optimizers for adapters: parameter groups for LoRA+ and for weight decay, LoRA-FA and Riemannian preconditioning.

Each takes the module that `as_module` returned, or a plain adapter whose tensors require gradients. A plain adapter
does not know its methods; where they matter, pass its net too.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.combine import Chain
from peftfn.core.method import Method
from peftfn.core.plan import Entry
from peftfn.methods.parts.lowrank import Ranked
from peftfn.methods.weights.trainabletokens import TrainableTokens
from peftfn.methods.weights.vblora import VBLoRA
from peftfn.net.net import Adapted
from peftfn.tools.step import damped, wide
from peftfn.view.module import parameters_of, plan_of

__all__ = ["LoRAFA", "Riemannian", "decay", "lora_fa", "lora_plus", "vb_lora"]

Group = dict[str, Any]
"""A parameter group of torch.optim."""


def lora_plus(
    adapter: nn.Module | Mapping[str, Any],
    lr: float,
    ratio: float = 16.0,
    *,
    lr_embedding: float | None = None,
    weight_decay: float = 0.0,
    net: Adapted | None = None,
    name: str | None = None,
) -> list[Group]:
    """Return parameter groups in which B learns `ratio` times as fast as A: lr_B = ratio · lr_A.

    Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", 2024, arXiv:2402.12354. As in the authors'
    code, vectors (biases, norms, magnitudes) learn as fast as B, without weight decay; all other tensors learn like A.

    Args:
        adapter: a module, or a plain adapter.
        lr: the learning rate of A, above 0.
        ratio: lr_B / lr_A, above 0.
        lr_embedding: the rate of all tensors at embeddings (the authors use 1e-6); None treats them like the others.
        weight_decay: of matrices; see `decay`.
        net: the plain adapter's net; needed for lr_embedding.
        name: which of the module's adapters; None is the active one.

    Returns:
        Parameter groups for a torch.optim optimizer.

    Raises:
        ValueError: a rate is not above 0, `net` is missing, or no tensor requires a gradient.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init())
        optimizer = torch.optim.AdamW(pf.optim.lora_plus(m, lr=1e-4, ratio=16))
    """
    _positive("lora_plus", lr=lr, ratio=ratio, **({} if lr_embedding is None else {"lr_embedding": lr_embedding}))
    if lr_embedding is not None and net is None and not isinstance(adapter, nn.Module):
        raise ValueError("lora_plus: lr_embedding needs the kinds of the sites: pass net=net")
    rates: dict[tuple[float, float], list[Tensor]] = {}
    for leaf in _leaves(adapter, net, name, "lora_plus"):
        rate = lr * ratio if leaf.is_b or leaf.is_vector else lr
        if lr_embedding is not None and leaf.entry is not None and leaf.entry.site.kind == "embedding":
            rate = lr_embedding
        rates.setdefault((rate, weight_decay if leaf.decays else 0.0), []).append(leaf.tensor)
    return [{"params": ts, "lr": rate, "weight_decay": decay} for (rate, decay), ts in rates.items()]


def decay(
    adapter: nn.Module | Mapping[str, Any],
    weight_decay: float,
    *,
    net: Adapted | None = None,
    name: str | None = None,
) -> list[Group]:
    """Return two parameter groups: tensors with weight decay, and tensors without.

    Shrinking a matrix of a low-rank product shrinks the change of the weight, as intended. Shrinking a norm, a bias, a
    magnitude (vectors), or the rows of `TrainableTokens`, which are weights and not changes of weights, would pull the
    model itself towards zero.

    Args:
        adapter, net, name: as in `lora_plus`; a plain adapter needs its net.
        weight_decay: of the first group; the second has 0.

    Returns:
        Parameter groups for a torch.optim optimizer.

    Raises:
        ValueError: a plain adapter without its net, or no tensor requires a gradient.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0": pf.Full()})
        m = pf.as_module(net, net.init())
        optimizer = torch.optim.AdamW(pf.optim.decay(m, 0.01), lr=1e-3)
    """
    if net is None and not isinstance(adapter, nn.Module):
        raise ValueError("decay: a plain adapter does not say which of its tensors are weights: pass net=net")
    groups: dict[float, list[Tensor]] = {}
    for leaf in _leaves(adapter, net, name, "decay"):
        groups.setdefault(weight_decay if leaf.decays else 0.0, []).append(leaf.tensor)
    return [{"params": ts, "weight_decay": value} for value, ts in groups.items()]


def vb_lora(
    adapter: nn.Module | Mapping[str, Any],
    *,
    lr_bank: float = 1e-3,
    lr_logits: float = 1e-2,
    lr: float = 1e-4,
    weight_decay: float = 0.0,
    net: Adapted | None = None,
    name: str | None = None,
) -> list[Group]:
    """Return parameter groups for VB-LoRA: its bank, its logits, and whatever else trains.

    Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", 2024, arXiv:2405.15179: the logits
    learn ten times as fast as the bank (0.01 and 0.001 in the paper and in PEFT's documentation).

    Args:
        adapter, net, name: as in `lora_plus`; a plain adapter needs its net.
        lr_bank, lr_logits: the learning rates of VB-LoRA's tensors, above 0.
        lr: of all other tensors (a head), above 0.
        weight_decay: of matrices that are no logits; see `decay`.

    Returns:
        Parameter groups for a torch.optim optimizer.

    Raises:
        ValueError: a rate is not above 0, `net` is missing, no tensor requires a gradient, or none is VB-LoRA's.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"weight": pf.VBLoRA(rank=2, vectors=8, length=2)})
        optimizer = torch.optim.AdamW(pf.optim.vb_lora(pf.as_module(net, net.init())))
    """
    _positive("vb_lora", lr_bank=lr_bank, lr_logits=lr_logits, lr=lr)
    if net is None and not isinstance(adapter, nn.Module):
        raise ValueError("vb_lora: a plain adapter does not say which of its tensors are VB-LoRA's: pass net=net")
    groups: dict[tuple[float, float], list[Tensor]] = {}
    found = False
    for leaf in _leaves(adapter, net, name, "vb_lora"):
        mine = leaf.entry is not None and isinstance(leaf.entry.method, VBLoRA)
        found = found or mine
        rate = lr if not mine else lr_bank if leaf.key == "bank" else lr_logits
        decays = leaf.decays and not (mine and leaf.key != "bank")
        groups.setdefault((rate, weight_decay if decays else 0.0), []).append(leaf.tensor)
    if not found:
        raise ValueError("vb_lora: the adapter has no VBLoRA: use torch.optim's groups, or peftfn.optim.decay")
    return [{"params": ts, "lr": rate, "weight_decay": decay} for (rate, decay), ts in groups.items()]


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
    out = dict(grads)
    for site, scale in _loras("lora_fa", net.plan, adapter).items():
        a, g = adapter[site]["a"], grads[site]
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
        if isinstance(entry.method, Ranked) and {"a", "b"} <= adapter[site].keys()
    }
    if not found:
        raise ValueError(f"{where}: the adapter has no LoRA, so there is no A and B to treat as a pair")
    return found


@dataclass(frozen=True)
class _Leaf:
    """One tensor of an adapter."""

    key: str  # its name in the leaf
    tensor: Tensor
    siblings: Mapping[str, Any]
    entry: Entry | None

    @property
    def is_b(self) -> bool:
        """Whether it is the B of a product B A."""
        part, dot, name = self.key.rpartition(".")  # a chain numbers its parts: "0.b"
        a = self.siblings.get(f"{part}{dot}a")
        if name != "b" or not isinstance(a, Tensor) or a.dim() < 2 or self.tensor.dim() < 2:
            return False
        return a.shape[-2] == self.tensor.shape[-1]

    @property
    def is_vector(self) -> bool:
        return self.tensor.dim() - (self.entry is not None and self.entry.site.stacked) < 2

    @property
    def decays(self) -> bool:
        return not self.is_vector and not (self.entry and _is_weight(self.entry.method, self.key))


def _is_weight(method: Method, key: str) -> bool:
    """Whether a tensor of the method stands in the weight's own place, so that decay would pull the weight to zero."""
    if isinstance(method, Chain):
        i, _, key = key.partition(".")
        return _is_weight(method.methods[int(i)], key)
    return isinstance(method, TrainableTokens)


def _leaves(adapter: Any, net: Adapted | None, name: str | None, where: str) -> Iterator[_Leaf]:
    """Every tensor that trains, each once."""
    if isinstance(adapter, nn.Module):
        tree: Mapping[str, Any] = parameters_of(adapter, name)
        plan: Mapping[str, Entry] = plan_of(adapter, name)
    else:
        tree, plan = adapter, net.plan if net is not None else {}
        if net is not None:
            net.plan.check(adapter)
    seen: set[int] = set()

    def walk(tree: Mapping[str, Any], entry: Entry | None) -> Iterator[_Leaf]:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                yield from walk(value, entry)
            elif value.requires_grad and id(value) not in seen:
                seen.add(id(value))
                yield _Leaf(key, value, tree, entry)

    for at, leaf in tree.items():
        yield from walk(leaf, plan.get(at) or next((e for e in plan.values() if e.bank == at), None))
    if not seen:
        raise ValueError(f"{where}: no tensor of the adapter requires a gradient; call requires_grad_() on its tensors")


def _positive(where: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{where}: {name} is {value!r}; it must be a finite number above 0")
