"""Parameter groups of torch.optim: learning rates and weight decay, tensor by tensor. See `optim.py`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from peftfn.core.chain import Chain
from peftfn.core.method import Method
from peftfn.core.numbers import above_zero, at_least_zero, checks_numbers
from peftfn.core.plan import Entry
from peftfn.methods.weights.trainabletokens import TrainableTokens
from peftfn.methods.weights.vblora import VBLoRA
from peftfn.net.net import Adapted
from peftfn.view.module import parameters_of, plan_of

Group = dict[str, Any]
"""A parameter group of torch.optim."""


@checks_numbers
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
    at_least_zero("lora_plus", weight_decay=weight_decay)
    above_zero("lora_plus", lr=lr, ratio=ratio, **({} if lr_embedding is None else {"lr_embedding": lr_embedding}))
    if lr_embedding is not None and net is None and not isinstance(adapter, nn.Module):
        raise ValueError("lora_plus: lr_embedding needs the kinds of the sites: pass net=net")
    rates: dict[tuple[float, float], list[Tensor]] = {}
    for leaf in _leaves(adapter, net, name, "lora_plus"):
        rate = lr * ratio if leaf.is_b or leaf.is_vector else lr
        if lr_embedding is not None and leaf.entry is not None and leaf.entry.site.kind == "embedding":
            rate = lr_embedding
        rates.setdefault((rate, weight_decay if leaf.decays else 0.0), []).append(leaf.tensor)
    return [{"params": ts, "lr": rate, "weight_decay": decay} for (rate, decay), ts in rates.items()]


@checks_numbers
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
    at_least_zero("decay", weight_decay=weight_decay)
    if net is None and not isinstance(adapter, nn.Module):
        raise ValueError("decay: a plain adapter does not say which of its tensors are weights: pass net=net")
    groups: dict[float, list[Tensor]] = {}
    for leaf in _leaves(adapter, net, name, "decay"):
        groups.setdefault(weight_decay if leaf.decays else 0.0, []).append(leaf.tensor)
    return [{"params": ts, "weight_decay": value} for value, ts in groups.items()]


@checks_numbers
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
    at_least_zero("vb_lora", weight_decay=weight_decay)
    above_zero("vb_lora", lr_bank=lr_bank, lr_logits=lr_logits, lr=lr)
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
