"""The models that are timed, and pairs of (PEFT, ours) that are known to compute the same thing."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
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
