"""What must hold on a GPU before a time means anything: every op against fp64, and twice for bitwise equality."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import Run, error
from peftfn.kernels import use
from peftfn.kernels.dora_norm import dora_norm, dora_norms
from peftfn.kernels.dora_norm import reference as norm_reference
from peftfn.kernels.lora_fused import fused_linear, reference
from peftfn.kernels.mixed_lora import Stack, mixed_embedding, mixed_lora
from peftfn.kernels.mixed_lora import reference as mixed_reference
from peftfn.kernels.segments import segments

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LIMITS = {FP32: 2e-5, FP16: 2e-3, BF16: 1.5e-2}
Twice = Callable[[], list[Tensor]]


class Numbers:
    """Random operands, the same in each run."""

    def __init__(self, run: Run):
        self.run, self.dry, self.device = run, run.args.dry, run.clock.device
        self.g = torch.Generator(self.device).manual_seed(0)

    def t(self, *size: int, dtype: torch.dtype = FP32) -> Tensor:
        t = torch.randn(size, generator=self.g, device=self.device)
        return t.div_(max(1, size[-1]) ** 0.5).to(dtype)

    def index(self, slots: int, rows: int) -> Tensor:
        return torch.randint(-1, slots, (rows,), generator=self.g, device=self.device)

    def dtypes(self, *wanted: torch.dtype) -> tuple[torch.dtype, ...]:
        """The interpreter's product of bf16 is no number; and the tests have the rest."""
        return (FP16,) if self.dry else wanted

    def gate(self, name: str, call: Twice, want: list[Tensor], limit: float) -> None:
        """`call` gives what is wanted, and the same bits twice."""
        got, again = call(), call()
        self.run.gate(name, error(got, want), limit)
        self.run.gate(f"{name}, twice", float(sum((u != v).sum().item() for u, v in zip(got, again, strict=True))), 0)


def exact(ts: list[Any]) -> list[Any]:
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in ts]


def linear(on: Numbers, size: tuple[int, ...], dtype: torch.dtype, c: bool, bias: bool, p: float) -> None:
    m, n, k, r = size
    t = on.t
    x = t(k, m, dtype=dtype).mT if m in (7, 257) else t(m, k, dtype=dtype)  # once not contiguous
    ts = [x, t(n, k, dtype=dtype), t(r, k), t(n, r), t(n) if c else None, t(n, dtype=dtype) if bias else None]
    ts = [None if v is None else v.requires_grad_() for v in ts]
    dy, seed = t(m, n, dtype=dtype), torch.tensor([2**61 + 12345], device=on.device)

    def once(f: Any, us: list[Any], dy: Tensor) -> list[Tensor] | None:
        x, w, a, b, rows, bias = us
        y = f(x, w, a, b, 0.7, c=rows, bias=bias, dropout=p, seed=seed)
        return None if y is None else [y, *torch.autograd.grad(y, [u for u in us if u is not None], dy)]

    want = once(reference, exact(ts), dy.double())
    assert want is not None
    for mode in ("triton", "auto"):
        with use(mode):  # type: ignore[arg-type]
            if once(fused_linear, ts, dy) is None and mode == "auto":  # the rules leave it to plain torch
                continue
            name = f"linear {size} {dtype} c={c} dropout={p:g}, {mode}"
            on.gate(name, lambda: once(fused_linear, ts, dy) or [], want, LIMITS[dtype])


def each_linear(run: Run, cases: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    on = Numbers(run)
    for size, dtype in cases:
        for c, bias, p in [(False, True, 0.0), (True, False, 0.0), (True, True, 0.3), (False, False, 0.1)]:
            with run.trying(f"gate of linear {size} {dtype} c={c} dropout={p:g}"):
                linear(on, size, dtype, c, bias, p)


def linears(run: Run) -> None:
    """In sizes that "auto" takes: there the large products are the library's. And odd ones."""
    cases = [((1023, 1023, 1021, 17), BF16), ((512, 768, 1024, 64), BF16), ((640, 1024, 512, 16), FP16)]
    each_linear(run, [((7, 13, 5, 3), FP16)] if run.args.dry else cases)


def linears_of_other_sizes(run: Run) -> None:
    cases = [((257, 1536, 1531, 256), BF16), ((1, 64, 64, 16), BF16), ((2048, 1024, 512, 8), BF16)]
    each_linear(run, [((5, 7, 9, 17), FP16)] if run.args.dry else cases)


def linears_fp32(run: Run) -> None:
    each_linear(run, [((3, 9, 4, 1), FP16)] if run.args.dry else [((1023, 1023, 1021, 17), FP32)])


def norms(run: Run) -> None:
    on = Numbers(run)
    sizes = [(13, 5, 3)] if run.args.dry else [(1023, 1021, 17), (768, 1024, 16), (1536, 1531, 256), (64, 64, 1)]

    def norm(n: int, k: int, r: int, dtype: torch.dtype) -> None:
        w, a, b = on.t(n, k, dtype=dtype), on.t(r, k).requires_grad_(), on.t(n, r).requires_grad_()
        _, ad, bd = us = exact([w, a, b])
        v = norm_reference(*us, 0.7)
        want = [v, *torch.autograd.grad(v.sum(), [ad, bd]), v, v]

        def call() -> list[Tensor]:
            with use("triton"):
                v = dora_norm(w, a, b, 0.7)
                many = dora_norms([w, w], [a, a], [b, b], [0.7, 0.7])
            return [v, *torch.autograd.grad(v.sum(), [a, b]), *many]

        # the norm is as exact as fp32 whatever W's dtype; its gradient is made in products of W
        on.gate(f"norm {(n, k, r)} {dtype}", call, want, 1e-3 if dtype != FP32 else 2e-5)

    for dtype in on.dtypes(FP32, FP16, BF16):
        for size in sizes:
            with run.trying(f"gate of norm {size} {dtype}"):
                norm(*size, dtype)


def batch(on: Numbers, what: str, rows: int, dtype: torch.dtype, ranks: tuple[int, ...], size: tuple[int, ...],
          slots: int = 3) -> None:  # fmt: skip
    """A group for each rank, in one batch."""
    (k, n), t = size, on.t
    groups = [Stack(t(slots, r, k), t(slots, n, r), 0.7, t(slots, n)) for r in ranks]
    groups = [a._replace(**{f: getattr(a, f).requires_grad_() for f in ("down", "up", "rows")}) for a in groups]
    index = on.index(slots * len(groups), rows)
    index = index if what == "mixed" else torch.full_like(index, -1 if what == "all the base" else 1)
    x, w = t(rows, k, dtype=dtype).requires_grad_(), t(n, k, dtype=dtype)
    leaves, dy = [x, *(v for a in groups for v in (a.down, a.up, a.rows))], t(rows, n, dtype=dtype)
    own = []
    for i in range(len(groups)):
        local = index - slots * i
        own.append(local.where((local >= 0) & (local < slots), -1))

    def call() -> list[Tensor]:
        with use("triton"):
            y = mixed_lora(x, w, *[(a, segments(i, a.slots)) for a, i in zip(groups, own, strict=True)])
            return [y, *torch.autograd.grad(y, leaves, dy)]

    wide = exact(leaves)
    y = wide[0] @ w.double().mT
    for j, (a, i) in enumerate(zip(groups, own, strict=True)):
        alone = a._replace(**dict(zip(("down", "up", "rows"), wide[1 + 3 * j : 4 + 3 * j], strict=True)))
        y = torch.where((i < 0)[:, None], y, mixed_reference(wide[0], w.double(), alone, i))
    want = [y, *torch.autograd.grad(y, wide, dy.double(), materialize_grads=True)]
    on.gate(f"mixed batch, {what}, {rows} rows, r {ranks}, {slots} slots, {dtype}", call, want, LIMITS[dtype])


def mixed(run: Run) -> None:
    """Few rows an adapter, odd sizes, one group and several, embeddings."""
    each_mixed(run, (FP16,) if run.args.dry else (FP16, BF16))


def mixed_fp32(run: Run) -> None:
    each_mixed(run, () if run.args.dry else (FP32,))


def each_mixed(run: Run, dtypes: tuple[torch.dtype, ...]) -> None:
    on = Numbers(run)
    for dtype in dtypes:
        for rows in (5, 21) if run.args.dry else (5, 64):
            for ranks in ((3,),) if run.args.dry else ((16,), (3, 512), (1,)):
                for what in ("mixed", "all the base", "one"):
                    with run.trying(f"gate of a mixed batch, {what}, {rows} rows, r {ranks}, {dtype}"):
                        batch(on, what, rows, dtype, ranks, (37, 65) if run.args.dry else (1023, 1281))
        with run.trying(f"gate of embedding {dtype}"):
            ids, index = torch.randint(0, 50, (20,), generator=on.g, device=on.device), on.index(3, 20)
            look, w = Stack(on.t(3, 5, 50), on.t(3, 18, 5), 0.7), on.t(18, 50, dtype=dtype)

            def call(ids: Tensor = ids, w: Tensor = w, look: Stack = look, index: Tensor = index) -> list[Tensor]:
                with use("triton"), torch.no_grad():
                    return [mixed_embedding(ids, w, (look, segments(index, 3)))]

            hot = torch.nn.functional.one_hot(ids, 50).double()
            wide = look._replace(down=look.down.double(), up=look.up.double())
            on.gate(f"embedding {dtype}", call, [mixed_reference(hot, w.double(), wide, index)], LIMITS[dtype])


def long(run: Run) -> None:
    """Many rows an adapter: blocks of 64 rows, whose products are other instructions; odd sizes, and a prefill's."""
    if run.args.dry:
        return
    on = Numbers(run)
    for dtype in (FP16, BF16):
        for ranks in ((17,), (16, 64)):
            with run.trying(f"gate of a mixed batch, 1023 rows, r {ranks}, {dtype}"):
                batch(on, "mixed", 1023, dtype, ranks, (1023, 1281))
        with run.trying(f"gate of a mixed batch, 64 rows of 64 adapters, {dtype}"):
            batch(on, "mixed", 64, dtype, (64,), (2048, 1024), slots=64)
        for r in (16, 64, 256):
            with run.trying(f"gate of a mixed batch, 8192 rows, r {r}, {dtype}"):
                batch(on, "mixed", 8192, dtype, (r,), (2048, 1024), slots=8)


def graphs(run: Run) -> None:
    """What only a captured graph, autograd's own thread and a lot of memory can show."""
    if run.args.dry:
        return
    on = Numbers(run)
    t = on.t
    index = torch.zeros(64, dtype=torch.int64, device="cuda")
    x, w, stack = t(64, 512, dtype=BF16), t(768, 512, dtype=BF16), Stack(t(8, 16, 512), t(8, 768, 16), 0.7)

    def replayed() -> Tensor:
        with use("triton"), torch.no_grad():
            return mixed_lora(x, w, (stack, segments(index, 8)))

    with run.trying("gate of a replayed mixed batch"):
        replay = run.clock.graph(replayed)
        index.copy_(torch.arange(64, device="cuda") % 9 - 1)
        replay()
        wide = stack._replace(down=stack.down.double(), up=stack.up.double())
        want = [mixed_reference(x.double(), w.double(), wide, index)]
        run.gate("a graph replayed with other segments", error([run.clock.kept], want), 1.5e-2)
    a, b = t(16, 512).requires_grad_(), t(768, 16).requires_grad_()

    def dropped() -> Tensor | None:
        with use("triton"), torch.no_grad():
            return fused_linear(x, torch.zeros_like(w), a, b, dropout=0.5)

    with run.trying("gate of replayed dropout"):
        replay = run.clock.graph(dropped)
        replay()
        first = run.clock.kept.clone()
        replay()
        run.gate("a replayed graph draws a new mask", float(torch.equal(first, run.clock.kept)), 0)
    with run.trying("gate of backward in autograd's thread"):
        with use("triton"):
            y = fused_linear(x, w, a, b)
        assert y is not None, "no kernel was taken"
        y.float().square().sum().backward()
        plain = (x @ w.mT + (x @ a.to(BF16).mT) @ b.to(BF16).mT).float()
        want = [v.double() for v in torch.autograd.grad(plain.square().sum(), [a, b])]
        run.gate("backward in autograd's thread", error([a.grad, b.grad], want), 2e-2)
    with run.trying("gate of offsets beyond 2³¹"), use("triton"), torch.no_grad():
        far = torch.empty(2**31 + 64, dtype=FP16, device="cuda").as_strided((3, 64), (2**30, 1))
        far.copy_(t(3, 64))
        w, a, b = t(48, 64, dtype=FP16), t(4, 64), t(48, 4)
        want = [reference(far.double(), w.double(), a.double(), b.double(), 0.7)]
        run.gate("offsets beyond 2³¹", error([fused_linear(far, w, a, b, 0.7)], want), 2e-3)
