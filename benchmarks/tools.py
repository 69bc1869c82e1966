"""What the tools around an adapter cost, against a forward pass of the model and against folding the adapter in."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import peftfn as pf
from benchmarks.harness import BASE, OURS, Json, Options, row
from benchmarks.llama import quiet
from benchmarks.models import RANK, RULE, llama

MERGE = "net.merge"


def run(options: Options) -> list[Json]:
    torch.manual_seed(0)
    model = llama(4, 256, 704, 4).eval()
    net = pf.adapt(model, {RULE: pf.LoRA(rank=RANK, init_weights="random")})
    a, ids = net.init(0), torch.randint(0, 1000, (2, 32))
    batch = {"input_ids": ids, "use_cache": False}
    tuned = copy.deepcopy(model)
    tuned.load_state_dict(net.merge(a), strict=False)
    others = {MERGE: partial(net.merge, a), BASE: quiet(partial(model, use_cache=False), ids)}
    cases: dict[str, Callable[[], Any]] = {
        "merge_report, bf16": partial(pf.merge_report, net, a, torch.bfloat16),
        "check": partial(pf.check, net, a),
        "verify, without effects": partial(pf.verify, net, a, batch, effects=False),
        "verify, with each site's effect": partial(pf.verify, net, a, batch),
        "extract, rank 16": partial(pf.extract, model, tuned, rank=16),
        "intruders": partial(pf.intruders, net, a),
    }
    rows = []
    for name, way in cases.items():
        slow = name.startswith(("verify, with each", "extract", "intruders"))
        times = options.compare({OURS: way, **others}, repeats=min(options.repeats, 7) if slow else options.repeats)
        rows.append(row(f"{name}: LoRA r{RANK} at 28 sites, 4-layer Llama, d 256, 2×32 tokens", times))
    return rows
