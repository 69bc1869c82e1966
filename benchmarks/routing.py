"""What routing costs: gates that are made of each site's input, or of the whole input, against gates that are given."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

import peftfn as pf
from benchmarks.harness import BASE, OURS, Json, Options, row
from benchmarks.llama import quiet
from benchmarks.models import llama

GIVEN = "given gates"
EXPERTS, RANK = 8, 16


def run(options: Options) -> list[Json]:
    torch.manual_seed(0)
    model = llama(4, 256, 704, 4).eval()
    net = pf.adapt(model, {"q_proj|v_proj": pf.LoRA(rank=RANK, init_weights="random")})
    many = pf.stack([net.init(seed) for seed in range(EXPERTS)])
    head = nn.Linear(256, EXPERTS)
    vectors = {n: torch.randn(EXPERTS, e.site.matrix_shape()[1]) for n, e in net.plan.items()}
    routes: dict[str, Any] = {
        "arrow, k=2": pf.routing.arrow(net, many, k=2),
        "phatgoose, k=2": pf.routing.phatgoose(vectors, k=2),
        "xlora, k=2 (runs the base first)": pf.routing.xlora(net, head, k=2),
    }
    rows = []
    for tokens in (1, 128):
        ids = torch.randint(0, 1000, (2, tokens))
        gates = torch.softmax(torch.randn(2, tokens, EXPERTS), -1)
        plain: Callable[..., Any] = partial(model, use_cache=False)
        for name, route in routes.items():
            ways = {
                OURS: quiet(partial(net.gated, many, route, use_cache=False), input_ids=ids),
                GIVEN: quiet(partial(net.gated, many, gates, use_cache=False), input_ids=ids),
                BASE: quiet(plain, input_ids=ids),
            }
            what = f"{name}: {EXPERTS} experts r{RANK} at 8 sites, 4-layer Llama, d 256, 2×{tokens} tokens"
            rows.append(row(what, options.compare(ways)))
    made = {OURS: partial(pf.routing.arrow, net, many), BASE: quiet(plain, input_ids=ids)}
    rows.append(row(f"making arrow's directions: {EXPERTS} experts r{RANK} at 8 sites", options.compare(made)))
    return rows
