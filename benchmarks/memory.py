"""Memory of gradients: layers that run again in the backward pass against layers that keep everything."""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peftfn as pf
from benchmarks.harness import OURS, Json, Options, Target, Way, row
from benchmarks.llama import loss_of
from benchmarks.models import RULE, agree, llama, method

WITHOUT = "all kept"
MIB = 2**20


def peak(f: Callable[..., Any], *args: Any) -> int:
    """The most bytes that tensors made during f(*args) have at one time."""
    with _Live() as live:
        f(*args)
    return live.most


class _Live(TorchDispatchMode):
    """Counts the memory of every tensor that an operation returns, until the last tensor that uses it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self._see(t.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key, size = storage.data_ptr(), storage.nbytes()
        if key in self.seen or not size:
            return
        self.seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def run(options: Options) -> list[Json]:
    torch.manual_seed(3)
    net = pf.adapt(llama(12, 256, 704, 4, attn_implementation="eager"), {RULE: method(dora=False)})
    less, ids = net.checkpointed("layers"), torch.randint(0, 1000, (2, 128))

    def gradient(net: pf.Adapted) -> Callable[[pf.Adapter], pf.Adapter]:
        return grad(lambda a: loss_of(net.apply(a, ids, use_cache=False)))

    rows = []
    for k, memory, time in ((1, 0.15, 1.2), (8, 0.2, 1.1)):
        adapter = net.init() if k == 1 else pf.stack([net.init(seed) for seed in range(k)])
        over: Callable[..., Any] = (lambda f: f) if k == 1 else vmap
        of = {OURS: over(gradient(less)), WITHOUT: over(gradient(net))}
        ways: dict[str, Way] = {name: partial(f, adapter) for name, f in of.items()}
        agree(ways[OURS](), ways[WITHOUT](), "checkpointed")
        bytes_of = {name: peak(way) for name, way in ways.items()}
        what = "grad" if k == 1 else f"vmap(grad) over {k} adapters"
        ratio = bytes_of[OURS] / bytes_of[WITHOUT]
        note = (
            f"Peak memory of {what}: {bytes_of[OURS] / MIB:.0f} MiB of {bytes_of[WITHOUT] / MIB:.0f}, {ratio:.2f} "
            f"(target {memory:g}: {'yes' if ratio <= memory else 'no'})."
        )
        times = options.compare(ways, repeats=options.repeats if k == 1 else min(options.repeats, 7))
        reason = "The forward pass of every layer runs twice: 4/3 of the arithmetic where a backward pass costs two."
        case = f"{what}, 12-layer Llama, d 256, 2×128 tokens, LoRA r16 at 84 sites: time"
        rows.append(row(case, times, target=Target(WITHOUT, time), note=note, reason=reason))
    return rows
