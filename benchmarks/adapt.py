"""Making the adapted model: `adapt` + `init` against PEFT's injection."""

import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, Target, Way, row
from benchmarks.models import RULE, inject, llama, method


def seven_billion() -> LlamaForCausalLM:
    """Llama-2-7B's shapes (transformers' default config), no storage."""
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig())


def ours(model: LlamaForCausalLM) -> pf.Adapter:
    return pf.adapt(model, {RULE: method(dora=False)}).init(seed=0)


def run(options: Options) -> list[Json]:
    meta: dict[str, Way] = {
        OURS: ours,
        "PEFT, low_cpu_mem_usage=True": lambda m: inject(m, low_cpu_mem_usage=True),
        "PEFT as it comes": inject,
    }
    real: dict[str, Way] = {OURS: ours, "PEFT": inject}
    toy = llama(32, 256, 704, 4)
    sites, theirs = ours(seven_billion()), inject(seven_billion(), low_cpu_mem_usage=True)
    shapes = sorted(tuple(t.shape) for leaf in sites.values() for t in leaf.values())
    assert len(sites) == 224
    assert shapes == sorted(tuple(p.shape) for n, p in theirs.named_parameters() if "lora_" in n)
    return [
        row(
            "7B Llama on the meta device, LoRA r16 at 224 sites",
            options.compare(meta, fresh=seven_billion),
            target=Target("PEFT, low_cpu_mem_usage=True", 0.15),
            note="Like ours, low_cpu_mem_usage=True leaves the adapter on meta; as it comes, PEFT draws it on the CPU.",
        ),
        row(
            "32-layer toy (d 256) on the CPU, LoRA r16 at 224 sites, values drawn",
            options.compare(real, fresh=lambda: copy.deepcopy(toy)),
        ),
    ]
