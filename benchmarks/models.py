"""The models that are timed, and pairs of (PEFT, ours) that are known to compute the same thing."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RULE = "|".join(PROJECTIONS)
RANK, ALPHA = 16, 32


def llama(layers: int, d: int, mlp: int, heads: int, vocab: int = 1000, **config: Any) -> LlamaForCausalLM:
    """A random Llama in train mode whose parameters ask for no gradient."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": d,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
    }
    made = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **sizes, **config))
    return made.requires_grad_(False).train()


def method(dora: bool) -> pf.Method:
    return pf.DoRA(rank=RANK, alpha=ALPHA) if dora else pf.LoRA(rank=RANK, alpha=ALPHA)


def inject(model: nn.Module, *, dora: bool = False, rank: int = RANK, **options: Any) -> PeftModel:
    """PEFT's form of the same, no dropout; it changes `model`. Its FutureWarnings are its own affair."""
    targets = PROJECTIONS if isinstance(model, LlamaForCausalLM) else rf"({RULE})\.\d+"
    config = LoraConfig(r=rank, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, use_dora=dora)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(model, config, **options)  # type: ignore[arg-type]
    assert isinstance(wrapped, PeftModel)
    return wrapped


HAND = "by hand"
Rows = Sequence[tuple[pf.Adapted, Any, Sequence[int]]]
"""(net, adapter, the rows that use it) of each LoRA of a batch"""


class ByHand(nn.Module):
    """A linear layer with each row's own low-rank product, written out for the rows of one batch: what is left when
    nothing is asked, looked up or checked. Adapters of one rank and number of rows are one pair of batched products.
    """

    def __init__(self, layer: nn.Linear, buckets: Sequence[tuple[Tensor, Tensor, Tensor]], scale: Sequence[float]):
        """buckets: (rows [n · each], D [n, r, in], U [n, out, r])"""
        super().__init__()
        self.weight, self.buckets, self.scale = layer.weight, buckets, scale
        self.straight = len(buckets) == 1 and torch.equal(buckets[0][0], torch.arange(len(buckets[0][0])))

    def forward(self, x: Tensor) -> Tensor:
        if self.straight:  # the base's product goes onto the low-rank one
            ((_, down, up),) = self.buckets
            if len(down) == 1:  # one adapter for all rows
                flat = x.view(-1, x.shape[-1])
                y = torch.mm(torch.mm(flat, down[0].mT), up[0].mT).addmm_(flat, self.weight.mT, beta=self.scale[0])
                return y.view(*x.shape[:-1], -1)
            y = torch.bmm(torch.bmm(down, x.view(len(down), -1, x.shape[-1]).mT).mT, up.mT)
            y.view(-1, y.shape[-1]).addmm_(x.view(-1, x.shape[-1]), self.weight.mT, beta=self.scale[0])
            return y.view(*x.shape[:-1], -1)
        y = F.linear(x, self.weight)
        for (rows, down, up), scale in zip(self.buckets, self.scale, strict=True):
            mine = x.index_select(0, rows).view(len(down), -1, x.shape[-1])
            change = torch.bmm(torch.bmm(down, mine.mT).mT, up.mT)
            y = y.index_add(0, rows, change.view(len(rows), *y.shape[1:]), alpha=scale)
        return y


def by_hand(base: nn.Module, adapters: Rows) -> nn.Module:
    """A copy of the base with `ByHand` in the place of each adapted layer."""
    model, groups = copy.deepcopy(base), dict[tuple[Any, int], list[tuple[Any, Sequence[int]]]]()
    for net, adapter, rows in adapters:
        groups.setdefault((next(iter(net.plan.values())).method, len(rows)), []).append((adapter, rows))
    scale = [method.scale for method, _ in groups]
    for site in adapters[0][0].plan:
        buckets = [
            (
                torch.tensor([i for _, rows in group for i in rows]),
                *(torch.stack([adapter[site][k].detach() for adapter, _ in group]) for k in "ab"),
            )
            for group in groups.values()
        ]
        name = site.removesuffix(".weight")
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, ByHand(layer, buckets, scale))
    return model


class TrainedByHand(nn.Module):
    """A linear layer with a LoRA's product as one would write it to train it."""

    def __init__(self, layer: nn.Linear, a: Tensor, b: Tensor, scale: float):
        super().__init__()
        self.weight, self.scale = layer.weight, scale
        self.a, self.b = (nn.Parameter(t.detach().clone()) for t in (a, b))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.a), self.b)


def trained_by_hand(base: nn.Module, net: pf.Adapted, adapter: pf.Adapter) -> nn.Module:
    """A copy of the base with `TrainedByHand` in the place of each adapted layer."""
    model = copy.deepcopy(base)
    for site, entry in net.plan.items():
        name, method = site.removesuffix(".weight"), entry.method
        assert isinstance(method, pf.LoRA)
        layer: Any = model.get_submodule(name)
        model.set_submodule(name, TrainedByHand(layer, adapter[site]["a"], adapter[site]["b"], method.scale))
    return model


def pair(base: nn.Module, dora: bool) -> tuple[PeftModel, pf.Adapted, pf.Adapter]:
    """(PEFT's model, our net, our adapter) of one adapter whose factors are all random, on two copies of `base`.

    Copies, so that no way of running finds its weights in a cache that another has just filled.
    """
    theirs = inject(copy.deepcopy(base), dora=dora)
    net = pf.adapt(copy.deepcopy(base), {RULE: method(dora)})
    torch.manual_seed(1)
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            p.data += 0.02 * p.data.mean() * torch.randn_like(p) if "magnitude" in name else 0.02 * torch.randn_like(p)
    adapter = like_peft(theirs, net)
    return theirs, net, adapter


def like_peft(theirs: PeftModel, net: pf.Adapted, read: Callable[[nn.Parameter], Any] = lambda p: p.data) -> pf.Adapter:
    """What `read` finds at PEFT's parameters, as a tree like our adapter's; fresh tensors that ask for a gradient."""
    places = {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m"}
    adapter: pf.Adapter = {site: {} for site in net.plan}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            site, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            adapter[f"{site}.weight"][places["lora_" + rest.partition(".")[0]]] = read(p).clone().requires_grad_()
    assert sum(map(len, adapter.values())) == sum(p.requires_grad for p in theirs.parameters())
    return adapter


def agree(ours: Any, theirs: Any, what: str, tolerance: float = 1e-4) -> None:
    """Raise unless two tensors, or trees of tensors, are equal up to `tolerance` of the largest entry."""
    if isinstance(theirs, dict | list):
        assert len(ours) == len(theirs), what
        for name in theirs if isinstance(theirs, dict) else range(len(theirs)):
            agree(ours[name], theirs[name], f"{what} {name}", tolerance)
        return
    error, size = (ours - theirs).abs().max(), theirs.abs().max()
    if not error <= tolerance * size:
        raise AssertionError(f"{what}: differs by {error:.2e}, where the largest entry is {size:.2e}")


def leaves(adapter: pf.Adapter) -> list[Tensor]:
    return [t for leaf in adapter.values() for t in leaf.values()]


def grads(adapter: pf.Adapter) -> dict[str, dict[str, Any]]:
    return {site: {name: t.grad for name, t in leaf.items()} for site, leaf in adapter.items()}
