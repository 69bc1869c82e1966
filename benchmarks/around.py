"""Methods at modules and on inputs: bottlenecks against hooks of torch, a mixed batch of them, `vmap` over prompts."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

import peftfn as pf
from benchmarks.harness import BASE, OURS, Json, Options, Target, row
from benchmarks.llama import loss_of, quiet
from benchmarks.models import agree, leaves, llama

HOOKS, RANK = "torch hooks", 16
RULES: dict[str, pf.Method] = {"mlp|self_attn": pf.Bottleneck(RANK)}


def noisy(net: pf.Adapted, seed: int = 0, std: float = 0.02) -> Any:
    torch.manual_seed(seed)
    adapter = net.init(seed)
    for t in leaves(adapter):
        t += std * torch.randn_like(t)
    return adapter


def with_hooks(model: nn.Module, adapter: Any) -> nn.Module:
    """A copy of the model with the same bottlenecks in forward hooks."""
    out = copy.deepcopy(model)
    for name, leaf in adapter.items():

        def hook(m: Any, args: Any, y: Any, p: Any = leaf) -> Any:
            h = y if isinstance(y, Tensor) else y[0]
            h = h + F.linear(F.gelu(F.linear(h, p["down"], p["c"])), p["up"], p["b"])
            return h if isinstance(y, Tensor) else (h, *y[1:])

        out.get_submodule(name).register_forward_hook(hook)
    return out


def bottlenecks(options: Options, d: int, tokens: int) -> list[Json]:
    model, ids = llama(8, d, d * 11 // 4, 4), torch.randint(0, 1000, (4, tokens))
    net = pf.adapt(model, RULES)
    adapter = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in noisy(net).items()}
    hooked = with_hooks(model, adapter)
    calls: dict[str, Any] = {
        OURS: lambda: net.apply(adapter, ids, use_cache=False),
        HOOKS: lambda: hooked(ids, use_cache=False),
    }
    agree(*(call().logits for call in calls.values()), "bottlenecks")

    def step(call: Any) -> Any:
        def run() -> None:
            loss_of(call()).backward()  # type: ignore[no-untyped-call]
            for t in leaves(adapter):
                t.grad = None

        return run

    where = f"16 bottlenecks of rank {RANK}, 8 layers, d {d}, 4×{tokens} tokens"
    target, reason = (
        Target(HOOKS, 1.10),
        (
            "A call lends each of the model's 74 parameters anew, and asks whether the owner changed anything, which "
            "hooks do not: a fixed cost of a call, which a longer one does not notice."
        ),
    )
    forwards = {name: quiet(call) for name, call in calls.items()}
    times = options.compare({**forwards, BASE: quiet(lambda: model(ids, use_cache=False))})
    rows = [row(f"{where}, forward", times, target=target, reason=reason)]
    times = options.compare({name: step(call) for name, call in calls.items()})
    return [*rows, row(f"{where}, training step", times, target=target, reason=reason)]


def mixed(options: Options) -> Json:
    model, ids = llama(4, 256, 704, 4), torch.randint(0, 1000, (16, 32))
    net = pf.adapt(model, RULES)
    adapters = [noisy(net, seed) for seed in range(8)]
    stacked, index = pf.stack(adapters), torch.arange(8).repeat_interleave(2)

    def loop() -> Tensor:
        rows = ids.view(8, 2, -1)
        return torch.cat([net.apply(a, x, use_cache=False).logits for a, x in zip(adapters, rows, strict=True)])

    ways = {OURS: quiet(lambda: net.mixed(stacked, index, ids, use_cache=False).logits), "a loop": quiet(loop)}
    agree(*(way() for way in ways.values()), "mixed")
    times = options.compare({**ways, BASE: quiet(lambda: model(ids, use_cache=False))})
    reason = (
        "The batch saves the fixed cost of seven calls, and no arithmetic: the base alone, on all rows at once, takes "
        "the time that the floor says."
    )
    what = "8 adapters of 8 bottlenecks, 2 rows each of 32 tokens, 4 layers, d 256, forward"
    return row(what, times, target=Target("a loop", 0.6), reason=reason)


def prompts(options: Options) -> Json:
    model, ids = llama(2, 32, 88, 4), torch.randint(0, 1000, (1, 8))
    net = pf.adapt(model, {"model": pf.PromptTuning(3)})
    adapters = [noisy(net, seed) for seed in range(8)]
    stacked = pf.stack(adapters)

    def call(adapter: Any) -> Tensor:
        logits: Tensor = net.apply(adapter, ids, use_cache=False).logits
        return logits

    ways = {
        OURS: quiet(lambda: vmap(call)(stacked)),
        "8 calls": quiet(lambda: torch.stack([call(a) for a in adapters])),
    }
    agree(*(way() for way in ways.values()), "prompts")
    one = quiet(lambda: model(ids.expand(8, -1), use_cache=False).logits)
    times = options.compare({**ways, BASE: one})
    reason = (
        "Under `vmap` torch dispatches each operation through a rule of its own, which takes about as long as another "
        "operation; attention has none on a CPU and runs prompt by prompt."
    )
    return row(
        "8 prompts of 3 tokens by vmap, 2 layers, d 32, 8 tokens, forward",
        times,
        target=Target("8 calls", 0.25),
        reason=reason,
    )


def run(options: Options) -> list[Json]:
    torch.manual_seed(3)
    rows = [*bottlenecks(options, 128, 32), *bottlenecks(options, 256, 64)]
    return [*rows, mixed(options), prompts(options)]
