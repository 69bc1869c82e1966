"""Three layers with one input (q, k, v): a product with A for each, as the library does, or one S for all three.

One S needs the three A side by side, which is a copy in each call: a copy that is kept would miss what is written into
an A. The other way here is the most that sharing could bring: three layers are one function by hand, forward and
backward, which no module's forward is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from benchmarks.harness import BASE, OURS, Json, Options, row
from benchmarks.models import agree
from peftfn.kernels.lora_linear import accumulated, lora_linear

SHARED = "one S for three layers"
SCALE, RANK = 2.0, 16


class Three(Function):
    """(x, W₁, W₂, W₃, A₁, …, B₁, …) ↦ x Wᵢᵀ + s·x Aᵢᵀ Bᵢᵀ, with S = x [A₁; A₂; A₃]ᵀ made once, and dx at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        w, a, b = tensors[:3], torch.cat(tensors[3:6]), tensors[6:]
        s = torch.mm(x, a.mT)
        ctx.save_for_backward(x, a, s, *w, *b)
        each = zip(s.split(RANK, 1), w, b, strict=True)
        return tuple(accumulated(x, part.contiguous(), w.mT, b.mT, None, SCALE) for part, w, b in each)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, a, s, *tensors = ctx.saved_tensors
        w, b = tensors[:3], tensors[3:]
        ds = torch.cat([SCALE * torch.mm(dy, b) for dy, b in zip(dys, b, strict=True)], 1)
        dx = torch.mm(ds, a)
        for dy, weight in zip(dys, w, strict=True):
            dx.addmm_(dy, weight)
        da = torch.mm(ds.mT, x).split(RANK)
        db = [torch.mm(dy.mT, SCALE * part) for dy, part in zip(dys, s.split(RANK, 1), strict=True)]
        return dx, None, None, None, *da, *db


class Layers:
    """x [tokens, d], and three layers of d features with a LoRA each."""

    def __init__(self, tokens: int, d: int, *, train: bool):
        self.x = torch.randn(tokens, d, requires_grad=train)
        self.w = [torch.randn(d, d) / d**0.5 for _ in range(3)]
        self.a = [(torch.randn(RANK, d) / d**0.5).requires_grad_(train) for _ in range(3)]
        self.b = [torch.randn(d, RANK, requires_grad=train) for _ in range(3)]
        self.train = train

    def base(self) -> list[Tensor]:
        return [torch.mm(self.x, w.mT) for w in self.w]

    def apart(self) -> list[Tensor]:
        return [lora_linear(self.x, w, a, b, SCALE) for w, a, b in zip(self.w, self.a, self.b, strict=True)]

    def shared(self) -> list[Tensor]:
        return list(Three.apply(self.x, *self.w, *self.a, *self.b))  # type: ignore[no-untyped-call]

    def step(self, f: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """Outputs, or where it trains the gradients of everything that has one."""

        def run() -> list[Tensor]:
            if not self.train:
                with torch.no_grad():
                    return f()
            ts = [self.x] if f == self.base else [self.x, *self.a, *self.b]
            return list(torch.autograd.grad(sum(y.sum() for y in f()), ts))  # type: ignore[arg-type]

        return run


def run(options: Options) -> list[Json]:
    torch.manual_seed(0)
    rows = []
    for d in (256, 1024):
        for tokens in (1, 32, 512):
            for train in (False, True):
                layers = Layers(tokens, d, train=train)
                ways = {OURS: layers.apart, SHARED: layers.shared, BASE: layers.base}
                steps = {name: layers.step(f) for name, f in ways.items()}
                agree(steps[OURS](), steps[SHARED](), "one S")
                size = f"d {d}, {tokens} token{'s' * (tokens > 1)}, LoRA r{RANK}"
                rows.append(row(f"{size}, forward{' and backward' * train}", options.compare(steps)))
    return rows
