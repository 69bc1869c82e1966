"""Many adapters in one pass: `vmap` over a stack of 64 against 64 calls, forward and gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._pytree import tree_map

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, Target, row
from benchmarks.llama import loss_of, quiet
from benchmarks.models import RULE, agree, leaves, llama, method

ADAPTERS = 64


class Ensemble:
    """64 adapters of one net, stacked and apart. Attention is eager, as jvp and Hessians need it."""

    def __init__(self) -> None:
        self.net = pf.adapt(llama(2, 128, 352, 4, attn_implementation="eager"), {RULE: method(dora=False)})
        self.adapters = [self.net.init(seed) for seed in range(ADAPTERS)]
        for t in (t for adapter in self.adapters for t in leaves(adapter)):
            t += 0.02 * torch.randn_like(t)
        self.stacked = pf.stack(self.adapters)
        self.apart = [tree_map(lambda t: t.clone().requires_grad_(), adapter) for adapter in self.adapters]

    def forwards(self, ids: Tensor) -> dict[str, Any]:
        def call(adapter: pf.Adapter) -> Tensor:
            logits: Tensor = self.net.apply(adapter, ids, use_cache=False).logits
            return logits

        one_pass = quiet(vmap(call), self.stacked)
        calls = quiet(lambda: [call(a) for a in self.adapters])
        agree(one_pass(), torch.stack(calls()), "vmap")
        return {OURS: one_pass, f"{ADAPTERS} calls": calls}

    def grads(self, ids: Tensor) -> dict[str, Any]:
        def loss(adapter: pf.Adapter) -> Tensor:
            return loss_of(self.net.apply(adapter, ids, use_cache=False))

        def backward(adapter: pf.Adapter) -> list[Tensor]:
            return list(torch.autograd.grad(loss(adapter), leaves(adapter)))

        ways = {
            OURS: lambda: vmap(grad(loss))(self.stacked),
            f"{ADAPTERS} grads": lambda: [grad(loss)(a) for a in self.adapters],
            f"{ADAPTERS} backward passes": lambda: [backward(a) for a in self.apart],
        }
        mine, theirs, plain = (way() for way in ways.values())
        agree(mine, pf.stack(theirs), "vmap(grad)")
        agree(leaves(mine), [torch.stack(ts) for ts in zip(*plain, strict=True)], "vmap(grad)")
        return ways


def run(options: Options) -> list[Json]:
    torch.manual_seed(3)
    ensemble, ids = Ensemble(), torch.randint(0, 1000, (4, 32))
    what, where = f"{ADAPTERS} LoRA r16 adapters", "2-layer Llama, d 128, {}×{} tokens"
    rows = []
    for batch, tokens in ((1, 16), (4, 16), (4, 32)):
        times = options.compare(ensemble.forwards(ids[:batch, :tokens]))
        target = Target(f"{ADAPTERS} calls", 0.35) if tokens == 16 else None
        reason = "One pass saves the fixed cost of a call, not arithmetic, which grows with the tokens."
        rows.append(row(f"{what}, forward, {where.format(batch, tokens)}", times, target=target, reason=reason))
    times = options.compare(ensemble.grads(ids[:, :16]))
    target = Target(f"{ADAPTERS} grads", 0.25)
    return [*rows, row(f"{what}, gradient, {where.format(4, 16)}", times, target=target, reason=reason)]
