"""How each kernel might be cut, timed at the sizes that matter: from this, the tiles and the rules are set."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Call, Run
from benchmarks.gpu_rows import half
from peftfn.kernels import dora_triton, lora_triton, mixed_triton
from peftfn.kernels.choose import Target, target
from peftfn.kernels.segments import segments

CACHE = 100 << 20  # more bytes than any L2 holds
Each = Callable[[int], Any]
"""A call on the i-th set of operands; −1: to be compared with the others'."""


@contextmanager
def cut(module: Any, name: str, tiles: Any) -> Iterator[None]:
    """Inside, the function `name` of the module returns these tiles."""
    before = getattr(module, name)
    setattr(module, name, lambda *_, **__: tiles)
    try:
        yield
    finally:
        setattr(module, name, before)


def candidates(run: Run, kernel: str, case: str, ways: dict[str, Each], size: int) -> None:
    """Microseconds of each way, on so many sets of operands of `size` bytes in turn that no cache has them, and its
    error against the first way; None where it fails."""
    if run.late(f"{kernel}, {case}"):
        return
    us: dict[str, float | None] = {}
    wrong: dict[str, float] = {}
    first: Tensor | None = None
    for name, call in ways.items():
        try:
            got = call(-1)
            got = (got if isinstance(got, Tensor) else got[0]).float()
            first = got if first is None else first
            wrong[name] = ((got - first).norm() / first.norm()).item()
            us[name] = 0.0 if run.args.warm else time(run, call, sets(run, size))
        except Exception as e:
            us[name] = None
            print(f"  {kernel}, {case}, {name}: {type(e).__name__}: {str(e)[:200]}", flush=True)
    run.record["tune"].append({"kernel": kernel, "case": case, "us": us, "error": wrong})
    run.write()
    if not run.args.warm:
        best = sorted((t, name) for name, t in us.items() if t is not None)[:4]
        print(f"  {kernel}, {case}: " + "; ".join(f"{n} {t:.1f}" for t, n in best), flush=True)


def time(run: Run, call: Each, n: int) -> float:
    def all_sets() -> None:
        for i in range(n):
            call(i)

    replay: Call = run.clock.graph(all_sets)
    if run.args.dry:
        return run.clock.sample(replay, False)
    run.clock.sample(replay, False)
    return median(run.clock.sample(replay, False) for _ in range(9)) / n


def sets(run: Run, size: int) -> int:
    return 1 if run.args.dry else max(1, min(32, CACHE // size))


def of(run: Run, size: int, make: Callable[[], Tensor]) -> list[Tensor]:
    """As many operands of so many bytes as no cache holds."""
    return [make() for _ in range(sets(run, size))]


def device(run: Run) -> Target:
    there = target(torch.device(run.clock.device))
    assert there is not None, "no kernels on this device"
    return there


class Stacks:
    """A mixed batch, with as many stacks of adapters as no cache holds."""

    def __init__(self, run: Run, t: int, slots: int, r: int, block: int | None):
        d, on, dtype = 70 if run.args.dry else 4096, run.clock.device, half(run)
        self.t, self.slots, self.r, self.d, self.size = t, slots, r, d, 2 * slots * r * d
        self.rows = segments(torch.arange(t, device=on) % slots, slots, block=block)
        self.case = f"{t} rows in blocks of {self.rows.block}, {slots} adapters, r={r}"
        self.x = torch.randn(t, d, device=on).to(dtype)
        self.y = torch.zeros(t, d, device=on, dtype=dtype)
        a = of(run, self.size, lambda: torch.randn(slots, r, d, device=on).to(dtype))
        b = of(run, self.size, lambda: torch.randn(slots, d, r, device=on).to(dtype))
        self.down = [mixed_triton.Side(v, r * d, d, 1, d, r, 1.0) for v in a]
        self.up = [mixed_triton.Side(v, d * r, 1, r, d, r, 2.0) for v in b]


def stacks(run: Run) -> Iterator[Stacks]:
    for t, slots, r, block in [(5, 3, 3, None), (9, 3, 3, 16)] if run.args.dry else [
        (1, 1, 16, 1), (8, 8, 16, 1), (64, 64, 16, 1), (64, 64, 64, 1), (64, 4, 16, 1), (64, 4, 16, 16),
        (256, 8, 16, 1), (256, 8, 16, None), (256, 64, 16, 1), (256, 64, 16, 16), (2048, 8, 16, None),
        (8192, 8, 16, None), (8192, 8, 64, None),
    ]:  # fmt: skip
        yield Stacks(run, t, slots, r, block)


@torch.no_grad()
def thin(run: Run) -> None:
    there = device(run)
    for on in stacks(run):
        br = 16 if on.r <= 16 else 64
        if on.rows.block == 1:
            steps = [(min(br, 32), 256, 4, 3), (16, 256, 4, 3), (16, 512, 4, 3), (16, 256, 2, 3), (16, 128, 2, 3)]
            splits: tuple[int, ...] = (4, 8, 16)
        else:
            steps = [(br, 128, 4, 3), (br, 128, 2, 3), (br, 128, 8, 3), (br, 64, 4, 4)]
            splits = (1, 2, 4) if on.t > 512 else (2, 4, 8, 16)
        tiles = [mixed_triton.thin_tiles(there, len(on.rows.slot), on.rows.block, on.d, on.r, 2)]
        if not run.args.dry:
            tiles += [mixed_triton.Thin(r, bk, s, w, g) for r, bk, w, g in steps for s in splits]

        def call(i: int, v: Any, on: Stacks = on) -> Tensor:
            with cut(mixed_triton, "thin_tiles", v):
                planes = mixed_triton.thin(there, on.x, on.down[i], on.rows)
            return planes.sum(0) if i < 0 else planes

        candidates(run, "thin", on.case, {str(tuple(v)): partial(call, v=v) for v in tiles}, on.size)


@torch.no_grad()
def wide(run: Run) -> None:
    there, W = device(run), mixed_triton.Wide
    for on in stacks(run):
        br = 16 if on.r <= 16 else 64
        tiles = [mixed_triton.wide_tiles(there, on.rows.block, on.r, True)]
        if not run.args.dry:
            few = [
                W(64, min(br, 32), 4),
                W(64, 16, 2),
                W(128, 16, 4),
                W(32, 16, 1),
                W(64, min(br, 32), 2),
                W(256, 16, 4),
            ]
            tiles += few if on.rows.block == 1 else [W(128, br, 4), W(256, br, 8), W(256, br, 4)]
        for split in [2] if run.args.dry else [1, 2, 4] if on.t > 512 else [4, 8, 16]:
            planes = torch.randn(split, on.t, on.r, device=run.clock.device)

            def call(i: int, v: Any, on: Stacks = on, planes: Tensor = planes) -> Tensor:
                if i < 0:
                    on.y.zero_()
                with cut(mixed_triton, "wide_tiles", v):
                    mixed_triton.wide(there, planes, on.up[i], on.rows, on.y)
                return on.y

            ways = {str(tuple(v)): partial(call, v=v) for v in tiles}
            candidates(run, "wide", f"{on.case}, {split} planes", ways, on.size)


@torch.no_grad()
def lora(run: Run) -> None:
    for part in (shrink, sweep, gemm):
        with run.trying(f"tune {part.__name__}"):
            part(run)


@torch.no_grad()
def norm(run: Run) -> None:
    there, dtype, on, dry = device(run), half(run), run.clock.device, run.args.dry
    N = dora_triton.Tiles
    for n, k, r in [(40, 70, 5)] if dry else [(4096, 4096, 16), (8192, 8192, 16), (4096, 4096, 64), (4096, 4096, 384)]:
        w = of(run, n * k * 2, lambda n=n, k=k: torch.randn(n, k, device=on).to(dtype))  # type: ignore[misc]
        a, b = torch.randn(r, k, device=on), torch.randn(n, r, device=on)
        shapes = [(32, 128, 4, 2), (32, 128, 4, 3), (64, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)]
        tiles = [dora_triton.tiles(there, dtype, a.dtype, 1, n, k, r)]
        if not dry:
            each = [(*shape, s, p) for shape in shapes for s in (2, 4, 8) for p in ("tf32x3", "tf32")]
            tiles += [N(bn, bk, s, ws, g, p) for bn, bk, ws, g, s, p in each]

        def ours(i: int, v: Any, a: Any = a, b: Any = b, w: Any = w) -> Tensor:
            with cut(dora_triton, "tiles", v):
                return dora_triton.norm(there, w[i], a, b, 2.0)

        low, up = a.to(dtype), b.to(dtype)
        ways: dict[str, Each] = {str(tuple(v)): partial(ours, v=v) for v in tiles}
        ways |= {f"half {tuple(v)}": partial(ours, v=v, a=low, b=up) for v in tiles if v.precision == "tf32"}
        candidates(run, "norm", f"{n}×{k}, r={r}", ways, n * k * 2)


def shrink(run: Run) -> None:
    there, dtype, on, dry = device(run), half(run), run.clock.device, run.args.dry
    S = lora_triton.Shrink
    for m, k, r in [(16, 70, 5)] if dry else [(4096, 4096, 16), (4096, 4096, 64), (8192, 4096, 16), (512, 4096, 16)]:
        x = of(run, m * k * 2, lambda m=m, k=k: torch.randn(m, k, device=on).to(dtype))
        a, br = torch.randn(r, k, device=on).to(dtype), 16 if r <= 16 else 64
        seed = torch.tensor([12345], device=on)
        shapes = [(16, 128, 4, 3), (32, 128, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (64, 128, 8, 3),
                  (128, 64, 4, 3), (128, 64, 8, 4)]  # fmt: skip
        tiles = [lora_triton.shrink_tiles(there, dtype, m, k, r)]
        tiles += [] if dry else [S(bm, br, bk, s, w, g) for bm, bk, w, g in shapes for s in (1, 2, 4, 8)]

        def ours(i: int, v: Any, a: Any = a, x: Any = x, seed: Tensor = seed) -> Tensor:
            with cut(lora_triton, "shrink_tiles", v):
                return lora_triton.shrink(there, x[i], a, 0.1, seed)

        ways: dict[str, Each] = {str(tuple(v)): partial(ours, v=v) for v in tiles}
        ways["torch.mm, no dropout"] = lambda i, x=x, a=a: torch.mm(x[i], a.mT)  # type: ignore[misc]
        candidates(run, "shrink", f"{m}×{k}, r={r}", ways, m * k * 2)


def sweep(run: Run) -> None:
    there, dtype, on, dry = device(run), half(run), run.clock.device, run.args.dry
    W = lora_triton.Sweep
    for m, n, r in [(16, 70, 5)] if dry else [(4096, 4096, 16), (4096, 4096, 64), (8192, 4096, 16)]:
        t = of(run, m * n * 2, lambda m=m, n=n: torch.randn(m, n, device=on).to(dtype))
        s, b = torch.randn(m, r, device=on).to(dtype), torch.randn(n, r, device=on).to(dtype)
        c, v, down = torch.rand(n, device=on), torch.randn(m, n, device=on).to(dtype), torch.empty(n, r).to(s.device)
        br = 16 if r <= 16 else 64
        shapes = [(32, 128, 8), (64, 128, 8), (64, 128, 4), (32, 128, 4), (64, 64, 4), (128, 64, 4), (128, 128, 8),
                  (64, 256, 8), (32, 64, 4)]  # fmt: skip
        for what, more in (("down", {}), ("down and across", {"b": b}), ("both, with c", {"b": b, "c": c, "v": v})):
            tiles = [lora_triton.sweep_tiles(there, dtype, r, "c" in more, bool(more))]
            tiles += [] if dry else [W(bm, bn, br, waves, w, 2) for bm, bn, w in shapes for waves in (1, 2, 4)]

            def ours(i: int, z: Any, more: Any = more, t: Any = t, s: Any = s, down: Any = down) -> Tensor:
                with cut(lora_triton, "sweep_tiles", z):
                    more = {"b": None, **more}
                    lora_triton.sweep(there, t[i], s, down=down, **more)
                return down

            ways: dict[str, Each] = {str(tuple(z)): partial(ours, z=z) for z in tiles}
            if what == "down":
                ways["torch.mm"] = lambda i, t=t, s=s: torch.mm(t[i].mT, s).float()  # type: ignore[misc]
            if what == "down and across":
                ways["torch.mm"] = lambda i, t=t, s=s, b=b: (torch.mm(t[i].mT, s).float(), torch.mm(t[i], b))  # type: ignore[misc]
            candidates(run, f"sweep, {what}", f"{m}×{n}, r={r}", ways, m * n * 2)


def gemm(run: Run) -> None:
    there, dtype, on, dry = device(run), half(run), run.clock.device, run.args.dry
    B = lora_triton.Blocks
    for m, n, k, r in [(16, 40, 70, 5)] if dry else [(4096, 4096, 4096, 16), (8192, 4096, 4096, 64)]:
        x, w = torch.randn(m, k, device=on).to(dtype), torch.randn(n, k, device=on).to(dtype)
        s, b = torch.randn(m, r, device=on).to(dtype), torch.randn(n, r, device=on).to(dtype)
        shapes = [B(128, 256, 64, 8, 3), B(128, 256, 64, 8, 4), B(128, 128, 64, 8, 3), B(128, 128, 64, 4, 4),
                  B(256, 128, 64, 8, 3), B(128, 256, 32, 8, 4)]  # fmt: skip
        tiles = [lora_triton.blocks(there, dtype, m), *([] if dry else shapes)]

        def ours(i: int, v: Any, x: Any = x, w: Any = w, s: Any = s, b: Any = b) -> Tensor:
            with cut(lora_triton, "blocks", v):
                return lora_triton.gemm(there, x, w, s, b, 2.0)[0]

        ways: dict[str, Each] = {str(tuple(v)): partial(ours, v=v) for v in tiles}
        ways["torch"] = lambda i, x=x, w=w, s=s, b=b: torch.mm(s, b.mT).addmm_(x, w.mT, beta=2.0)  # type: ignore[misc]
        ways["torch, the base alone"] = lambda i, x=x, w=w: torch.mm(x, w.mT)  # type: ignore[misc]
        candidates(run, "gemm", f"{m}×{n}×{k}, r={r}", ways, m * k * 2)
