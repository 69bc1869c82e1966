"""Mixed batches through experts, against a loop over adapters and the base; and what following a function costs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import peftfn as pf
from benchmarks.harness import BASE, OURS, REPEATS, Json, Options, Target, row
from benchmarks.llama import quiet
from benchmarks.models import agree, leaves

LOOP = "a loop over adapters"
INDEX = [2, -1, 0, 2, 1, 3, -1, 0]


def mixtral(layers: int, d: int) -> Any:
    torch.manual_seed(0)
    size = {"hidden_size": d, "intermediate_size": 2 * d, "num_attention_heads": 4, "num_key_value_heads": 2}
    c = MixtralConfig(**size, vocab_size=1000, num_hidden_layers=layers, num_local_experts=8, num_experts_per_tok=2)
    return MixtralForCausalLM(c).requires_grad_(False).eval()


class Adapted:
    """Rank 8 at all experts, the router and q, v; four adapters, and the base for two of eight rows."""

    def __init__(self, model: Any):
        self.model = model
        self.net = pf.adapt(model, {"experts": pf.LoRA(8), "gate": pf.LoRA(8), "q_proj|v_proj": pf.LoRA(8)})
        self.adapters = [self.net.init(seed) for seed in range(4)]
        for t in (t for a in self.adapters for t in leaves(a)):
            t += 0.02 * torch.randn_like(t)
        self.many = pf.stack(self.adapters)

    def mixed(self, ids: Tensor) -> Tensor:
        out: Tensor = self.net.mixed(self.many, INDEX, ids, use_cache=False).logits
        return out

    def loop(self, ids: Tensor) -> Tensor:
        index, out = torch.tensor(INDEX), None
        for k in range(-1, len(self.adapters)):
            rows = (index == k).nonzero()[:, 0]
            x = ids[rows]
            base = self.model if k < 0 else partial(self.net.apply, self.adapters[k])
            y = base(x, use_cache=False).logits
            out = y.new_empty(len(ids), *y.shape[1:]) if out is None else out
            out[rows] = y
        assert out is not None
        return out


def batches(options: Options, layers: int, d: int) -> list[Json]:
    rows, model = [], mixtral(layers, d)
    for way in ("eager", "grouped_mm"):
        model.set_experts_implementation(way)
        adapted = Adapted(model)
        for tokens in (1, 32, 128):
            ids = torch.randint(0, 1000, (len(INDEX), tokens))
            ways: dict[str, Callable[[], Any]] = {
                OURS: quiet(adapted.mixed, ids),
                LOOP: quiet(adapted.loop, ids),
                BASE: quiet(lambda ids: model(ids, use_cache=False).logits, ids),
            }
            mine, theirs, plain = (f() for f in ways.values())
            agree(mine, theirs, f"mixed through experts, {way}")
            assert (mine - plain).abs().max() > 1e-2 * plain.abs().max(), "the adapters do nothing: this is no check"
            target = Target(BASE, 1.6) if tokens == 32 else None
            reason = (
                "At these sizes the products of rank 8 alone take a third of the time of the base's products (one "
                "thread); the rest is following the rows."
            )
            what = (
                f"{layers}-layer Mixtral, d {d}, 8 experts, 4 adapters and the base, LoRA r8, {way}, 8×{tokens} tokens"
            )
            rows.append(row(what, options.compare(ways), target=target, reason=reason))
    return rows


class Functions(nn.Module):
    """Two hundred of one function, and a linear layer."""

    def __init__(self, f: Callable[[Tensor], Any]):
        super().__init__()
        self.f, self.layer = f, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(200):
            self.f(x)
        return self.layer(x)


FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "x + x": lambda x: x + x,
    "x.reshape": lambda x: x.reshape(-1, 8),
    "x[0]": lambda x: x[0],
    "x.shape": lambda x: x.shape,
}


def functions(options: Options) -> list[Json]:
    """The same forward inside a routed module and outside of one."""
    rows = []
    for name, f in FUNCTIONS.items():
        model, x = Functions(f).eval(), torch.randn(4, 6, 8)
        nets = [pf.adapt(model, {"layer": pf.LoRA(2)}, routed=routed) for routed in ([""], None)]
        many = pf.stack([nets[0].init(seed) for seed in range(2)])
        ways = {who: quiet(net.mixed, many, [1, -1, 0, 1], x) for who, net in zip((OURS, "outside"), nets, strict=True)}
        agree(*(way() for way in ways.values()), "followed")
        rows.append(row(f"200 × {name} on [4, 6, 8] and a linear layer, inside a routed module", options.compare(ways)))
    return rows


def run(options: Options) -> list[Json]:
    torch.manual_seed(5)
    if options.repeats < REPEATS:
        return functions(options) + batches(options, 2, 64)
    return functions(options) + batches(options, 4, 256)
