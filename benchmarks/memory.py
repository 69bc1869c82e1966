"""Memory of gradients: layers that run again in the backward pass against layers that keep everything."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.func import grad, vmap

import peftfn as pf
from benchmarks.harness import OURS, REPEATS, Json, Options, Target, Way, row
from benchmarks.llama import loss_of
from benchmarks.models import RULE, agree, llama, method
from peftfn.compare.peak import peak

WITHOUT = "all kept"
MIB = 2**20


def run(options: Options) -> list[Json]:
    torch.manual_seed(3)
    net = pf.adapt(llama(12, 256, 704, 4, attn_implementation="eager"), {RULE: method(dora=False)})
    less, ids = net.checkpointed("layers"), torch.randint(0, 1000, (2, 128))

    def gradient(net: pf.Adapted) -> Callable[[pf.Adapter], pf.Adapter]:
        return grad(lambda a: loss_of(net.apply(a, ids, use_cache=False)))

    def ways_of(k: int) -> dict[str, Way]:
        adapter = net.init() if k == 1 else pf.stack([net.init(seed) for seed in range(k)])
        over: Callable[..., Any] = (lambda f: f) if k == 1 else vmap
        return {OURS: partial(over(gradient(less)), adapter), WITHOUT: partial(over(gradient(net)), adapter)}

    rows, small = [], options.repeats < REPEATS
    for k, memory, time in ((1, 0.15, 1.2), (8, 0.2, 1.1)):
        ways = ways_of(k)
        agree(ways[OURS](), ways[WITHOUT](), "checkpointed")
        bytes_of = {name: peak(way) for name, way in ways.items()}
        what = "grad" if k == 1 else f"vmap(grad) over {k} adapters"
        ratio = bytes_of[OURS] / bytes_of[WITHOUT]
        note = (
            f"Peak memory of {what}: {bytes_of[OURS] / MIB:.0f} MiB of {bytes_of[WITHOUT] / MIB:.0f}, {ratio:.2f} "
            f"(target {memory:g}: {'yes' if ratio <= memory else 'no'})."
        )
        if k > 1 and not small:
            note += f" Of 64: {peak(ways_of(64)[OURS]) / MIB:.0f} MiB; all kept, it was not run."
            note += "".join(_fits(name, bytes_of[name] / k, ways_of) for name in (WITHOUT, OURS))
        times = options.compare(ways, repeats=options.repeats if k == 1 else min(options.repeats, 7))
        reason = (
            "The forward pass of every layer runs twice. Where the base is frozen, a backward pass costs about one "
            "forward pass, so that the floor is about 3/2 of the arithmetic."
        )
        case = f"{what}, 12-layer Llama, d 256, 2×128 tokens, LoRA r16 at 84 sites: time"
        rows.append(row(case, times, target=Target(WITHOUT, time), note=note, reason=reason))
    return rows


def _fits(name: str, each: float, ways_of: Callable[[int], dict[str, Way]], limit: int = 4 * 2**30) -> str:
    """How many adapters' gradients fit in the limit, as far as `each` bytes of one say, and what so many take."""
    k = int(limit / each)
    while (bytes_of := peak(ways_of(k)[name])) > limit:
        k -= 1
    return f" In 4 GiB fit {k} adapters ({name}, {bytes_of / MIB:.0f} MiB)."
