"""Ways to merge adapters, against the weighted sum and PEFT's `add_weighted_adapter`."""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, row
from benchmarks.models import agree

SUM, THEIRS = "linear", "PEFT"
COUNT, RANK, SIZE = 4, 16, 1024
M = pf.merging
WAYS: dict[str, tuple[Callable[..., Any], dict[str, Any] | None]] = {
    f"linear(rank={RANK})": (partial(M.linear, rank=RANK), {"combination_type": "svd", "svd_rank": RANK}),
    "ties, Core Space": (partial(M.ties, density=0.2, space="core"), None),
    "ties, KnOTS": (partial(M.ties, density=0.2, space="knots"), None),
    f"ties, Compress-then-Merge, rank {RANK}": (partial(M.ties, density=0.2, space="shared", rank=RANK), None),
    f"ties, dense, rank {RANK}": (
        partial(M.ties, density=0.2, rank=RANK),
        {"combination_type": "ties_svd", "svd_rank": RANK, "density": 0.2},
    ),
    "dare, Core Space": (partial(M.dare, density=0.5, space="core"), None),
    "tsv": (M.tsv, None),
    "iso_c": (M.iso_c, None),
}
"""Name → (ours, the arguments of PEFT's form of the same)."""


def theirs(model: nn.Module, net: pf.Adapted, adapters: list[pf.Adapter]) -> PeftModel:
    """PEFT's model with the same adapters, named "0", "1", …"""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    made = get_peft_model(copy.deepcopy(model), config, adapter_name="0")  # type: ignore[arg-type]
    for i, a in enumerate(adapters):
        if i:
            made.add_adapter(str(i), config)
        layer: Any = made.base_model.model[0]  # type: ignore[index]
        layer.lora_A[str(i)].weight.data.copy_(a["0.weight"]["a"])
        layer.lora_B[str(i)].weight.data.copy_(a["0.weight"]["b"])
    assert isinstance(made, PeftModel)
    return made


def added(made: PeftModel, **how: Any) -> Any:
    made.add_weighted_adapter([str(i) for i in range(COUNT)], [1.0] * COUNT, "new", **how)
    layer: Any = made.base_model.model[0]  # type: ignore[index]
    change = layer.get_delta_weight("new")
    made.delete_adapter("new")
    return change


def run(options: Options) -> list[Json]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(SIZE, SIZE)).requires_grad_(False)
    net = pf.adapt(model, {"0.weight": pf.LoRA(rank=RANK, init_weights="random")})
    adapters = [net.init(seed) for seed in range(COUNT)]
    pairs, rows = [(net, a) for a in adapters], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = theirs(model, net, adapters)
        for name, (ours, how) in WAYS.items():
            ways = {OURS: partial(ours, pairs), SUM: partial(M.linear, pairs)}
            if how is not None:
                ways[THEIRS] = partial(added, made, **how)
                merged, a = ways[OURS]()
                agree(merged.delta(a)["0.weight"], ways[THEIRS](), name)
            slow = "dense" in name or how is not None
            times = options.compare(ways, repeats=min(options.repeats, 7) if slow else options.repeats)
            what = f"merging.{name}: {COUNT} LoRAs r{RANK} at one {SIZE}×{SIZE} weight"
            rows.append(row(what, times))
    return rows
