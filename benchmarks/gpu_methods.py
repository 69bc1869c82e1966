"""Methods on two layers of Llama-8B's shape: a training step of ours, of PEFT's same method, and of the bare base."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import peftfn as pf
from benchmarks.gpu import Run
from benchmarks.gpu_rows import half

NAMES = (
    "LoRA",
    "DoRA",
    "OFT",
    "BOFT",
    "FourierFT",
    "LoHa",
    "IA3",
    "VeRA",
    "LoKr",
    "HRA",
    "MiSS",
    "RandLoRA",
    "AdaLoRA",
)
Step = Callable[[], Tensor]


def llama(run: Run) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    if not run.args.dry:
        size = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    before = torch.get_default_dtype()
    torch.set_default_dtype(half(run))
    try:
        with torch.device(run.clock.device):
            model: nn.Module = LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=2, vocab_size=1000))
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False)


def step(call: Callable[..., Any], leaves: list[Tensor], x: Tensor) -> Step:
    def once() -> Tensor:
        logits = call(inputs_embeds=x, use_cache=False).logits
        torch.autograd.grad(logits.float().square().mean(), leaves)
        return logits.detach()  # type: ignore[no-any-return]

    return once


def methods(run: Run) -> None:
    from benchmarks.methods import PROJECTIONS, WHERE, configuration
    from benchmarks.methods import methods as all_methods

    base, known = llama(run), all_methods()
    shape = (2, 8, 64) if run.args.dry else (4, 2048, 4096)
    x = torch.randn(shape, device=run.clock.device).to(half(run)).requires_grad_()
    for name in NAMES[:2] if run.args.dry or run.args.warm else NAMES:
        method, targets = known[name], WHERE.get(name, PROJECTIONS)

        def ours(method: Any = method, targets: Any = targets) -> Step:
            net = pf.adapt(base, {"|".join(targets): method})
            a = {s: {k: t.to(x.device).requires_grad_() for k, t in leaf.items()} for s, leaf in net.init(0).items()}
            leaves = [t for leaf in a.values() for t in leaf.values()]
            return step(lambda **kw: net.apply(a, **kw), leaves, x)

        def theirs(method: Any = method, targets: Any = targets) -> Step:
            from peft import get_peft_model

            config = configuration(method, targets)
            assert config is not None, "PEFT does not have it"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = get_peft_model(copy.deepcopy(base), config).to(x.device)  # type: ignore[arg-type]
            return step(model, [p for p in model.parameters() if p.requires_grad], x)

        with run.trying(f"method {name}"):
            ways = {"base": lambda: step(base, [x], x), "peftfn": ours, "PEFT": theirs}
            run.row("Methods, a training step", f"{method}, {shape[0]}×{shape[1]} tokens", ways, modes=("eager",))
