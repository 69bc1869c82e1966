"""mixed_lora in Triton's interpreter: run by test_kernels_interpreter.py with TRITON_INTERPRET=1, not collected."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfn as pf
from peftfn.kernels import choose, use
from peftfn.kernels import mixed_lora as module
from peftfn.kernels.mixed_lora import Stack, mixed_embedding, mixed_lora, reference
from peftfn.kernels.segments import segments
from peftfn.slots import gates
from peftfn.testing import close

assert choose.INTERPRETED, "test_kernels_interpreter.py runs this file"

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}
CASES = [  # tokens, in, rank, out
    (5, 40, 3, 37),
    (33, 37, 17, 37),
    (41, 133, 40, 65),  # planes to add
    (9, 20, 512, 18),
    (3, 1, 1, 1),
]
INDICES = {"mixed": None, "all the base": -1, "all one": 1}


def rand(g: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=g)


def stacked(k: int, r: int, in_: int, out: int, *, c: bool = True) -> Stack:
    g = torch.Generator().manual_seed(1)
    return Stack(rand(g, k, r, in_), rand(g, k, out, r), 0.7, rand(g, k, out) if c else None)


def leaves(adapters: Any, dtype: torch.dtype = torch.float32) -> Any:
    made = {
        name: t.detach().to(dtype).requires_grad_()
        for name in ("down", "up", "rows")
        if (t := getattr(adapters, name)) is not None
    }
    return adapters._replace(**made), list(made.values())


def index_of(kind: str, t: int, slots: int) -> Tensor:
    value = INDICES[kind]
    g = torch.Generator().manual_seed(2)
    return torch.randint(-1, slots, (t,), generator=g) if value is None else torch.full((t,), value)


def check(x: Tensor, w: Tensor, adapters: Any, index: Tensor) -> None:
    dy = torch.randn(len(x), len(w), generator=torch.Generator().manual_seed(3)).to(x.dtype)
    mine, ts = leaves(adapters)
    x.requires_grad_()

    def run() -> list[Tensor]:
        with use("triton"):
            y = mixed_lora(x, w, (mine, segments(index, adapters.slots)))
        assert type(y.grad_fn).__name__ == "_MixedBackward"
        return [y, *torch.autograd.grad(y, [x, *ts], dy)]

    got = run()
    exact, exact_ts = leaves(adapters, torch.float64)
    xd = x.detach().double().requires_grad_()
    y = reference(xd, w.double(), exact, index)
    want = [y, *torch.autograd.grad(y, [xd, *exact_ts], dy.double())]
    for i, (p, q) in enumerate(zip(got, want, strict=True)):
        assert p.isfinite().all(), i
        assert (p.double() - q).norm() <= TOLERANCE[x.dtype] * q.norm().clamp(min=1e-6), i
    assert all(torch.equal(p, q) for p, q in zip(run(), got, strict=True)), "not repeatable"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sizes(case: tuple[int, ...], dtype: torch.dtype) -> None:
    t, in_, r, out = case
    g = torch.Generator().manual_seed(4)
    x, w = rand(g, t, in_).to(dtype), rand(g, out, in_).to(dtype)
    check(x, w, stacked(3, r, in_, out), index_of("mixed", t, 3))


@pytest.mark.parametrize("kind", INDICES)
@pytest.mark.parametrize("t", [6, 19])
def test_stacked(kind: str, t: int) -> None:
    g = torch.Generator().manual_seed(5)
    check(rand(g, t, 33), rand(g, 17, 33), stacked(3, 5, 33, 17), index_of(kind, t, 3))


def test_strided_rows() -> None:
    g = torch.Generator().manual_seed(7)
    x, w = rand(g, 33, 12).t(), rand(g, 17, 66)[:, ::2]
    adapters, index = stacked(3, 5, 33, 17), index_of("mixed", 12, 3)
    with torch.no_grad(), use("triton"):
        y = mixed_lora(x, w, (adapters, segments(index, 3)))
    close(y, reference(x, w, adapters, index), "strided", 1e-5)


def test_twice_differentiable() -> None:
    g = torch.Generator().manual_seed(8)
    w, index = rand(g, 7, 9), index_of("mixed", 11, 3)
    x0, second = rand(g, 11, 9), []
    for f, dtype in ((mixed_lora, torch.float32), (reference, torch.float64)):
        adapters, ts = leaves(stacked(3, 2, 9, 7), dtype)
        x = x0.to(dtype).requires_grad_()
        with use("triton"):
            mixed = f is mixed_lora
            y = f(x, w.to(dtype), (adapters, segments(index, 3))) if mixed else f(x, w.to(dtype), adapters, index)  # type: ignore[operator, arg-type, call-arg]
        first = torch.autograd.grad(y, [x, *ts], torch.sin(y), create_graph=True)
        second.append(torch.autograd.grad(sum((d * d).sum() for d in first), [x, *ts]))  # type: ignore[arg-type]
    for p, q in zip(*second, strict=True):
        assert (p.double() - q).norm() <= 1e-4 * q.norm()


@pytest.mark.parametrize("t", [8, 40])
def test_a_replayed_graph_may_have_other_segments(t: int) -> None:
    """What a CUDA graph does: the same launches on the same buffers, whose contents are another batch's."""
    first, then = torch.full((t,), 1), torch.arange(t) % 3 - 1
    rows, new = segments(first, 3), segments(then, 3)
    assert (rows.slot >= 0).sum() != (new.slot >= 0).sum()
    for old, now in zip(rows, new, strict=True):
        if isinstance(old, Tensor):
            assert old.shape == now.shape and old.dtype == now.dtype  # type: ignore[union-attr]
            old.copy_(now)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(9)
    x, w, adapters = rand(g, t, 20), rand(g, 18, 20), stacked(3, 5, 20, 18)
    with torch.no_grad(), use("triton"):
        y = mixed_lora(x, w, (adapters, rows))
    close(y, reference(x, w, adapters, then), "replay", 1e-5)


def test_rows_of_the_base_are_the_base_bitwise() -> None:
    g = torch.Generator().manual_seed(10)
    x, w, index = rand(g, 20, 20), rand(g, 18, 20), index_of("mixed", 20, 3)
    with torch.no_grad(), use("triton"):
        y = mixed_lora(x, w, (stacked(3, 5, 20, 18), segments(index, 3)))
    base = x @ w.mT
    assert torch.equal(y[index < 0], base[index < 0])
    assert not torch.equal(y, base)


@pytest.mark.parametrize("t", [6, 30])
@pytest.mark.parametrize("c", [True, False])
def test_embedding(t: int, c: bool) -> None:
    g = torch.Generator().manual_seed(12)
    w, adapters, index = rand(g, 18, 50), stacked(3, 5, 50, 18, c=c), index_of("mixed", t, 3)
    ids = torch.randint(0, 50, (t,), generator=g)
    one_hot = nn.functional.one_hot(ids, 50).float()
    with torch.no_grad(), use("triton"):
        got = mixed_embedding(ids, w, (adapters, segments(index, 3)))
    close(got, reference(one_hot, w, adapters, index), "embedding", 1e-5)
    mine, _ = leaves(adapters)
    close(mixed_embedding(ids, w, (mine, segments(index, 3))).detach(), got, "with gradients", 1e-5)


@pytest.mark.parametrize("method", [pf.LoRA(3, init_weights="random"), pf.DoRA(3, init_weights="random")], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_mixed_takes_the_kernels(method: pf.Method, tokens: int, monkeypatch: Any) -> None:
    """net.mixed, without being asked, forward and backward, and one set of segments for all layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 17))
    net = pf.adapt(model, {r"weight": method})
    stack = pf.stack([net.init(s) for s in range(3)])
    stack = {s: {k: t.requires_grad_() for k, t in leaf.items()} for s, leaf in stack.items()}
    ts = [t for leaf in stack.values() for t in leaf.values()]
    x, index = torch.randn(6, tokens, 24), torch.tensor([2, -1, 0, 0, 2, 1])
    calls, made = [], []
    real, real_segments = module._Mixed.apply, module.segments
    monkeypatch.setattr(module._Mixed, "apply", lambda *args: (calls.append(1), real(*args))[1])
    monkeypatch.setattr(module, "segments", lambda *args, **kw: (made.append(1), real_segments(*args, **kw))[1])
    with use("torch"):
        want = net.mixed(stack, index, x)
    assert not calls
    with use("triton"):
        got = net.mixed(stack, index, x)
    assert len(calls) == 2 and len(made) == 1
    close(got, want, "mixed", 1e-5)
    for p, q in zip(torch.autograd.grad(got.sum(), ts), torch.autograd.grad(want.sum(), ts), strict=True):
        close(p, q, "gradient", 1e-4)


def split(index: Tensor, *sizes: int) -> list[Tensor]:
    """The index of a batch over all adapters, for each group of them."""
    out, start = [], 0
    for n in sizes:
        out.append(torch.where((index >= start) & (index < start + n), index - start, -1))
        start += n
    return out


@pytest.mark.parametrize("t", [6, 40])
def test_groups_of_several_ranks(t: int) -> None:
    """One base product for all; forward, backward and twice backward."""
    g = torch.Generator().manual_seed(13)
    x0, w, dy = rand(g, t, 33), rand(g, 37, 33), rand(g, t, 37)
    each = [stacked(3, 5, 33, 37), stacked(2, 20, 33, 37, c=False), stacked(2, 17, 33, 37)]
    indices = split(torch.randint(-1, 7, (t,), generator=g), 3, 2, 2)

    def run(dtype: torch.dtype, mode: Any) -> list[Tensor]:
        mine = [leaves(adapters, dtype) for adapters in each]
        x, ts = x0.to(dtype).requires_grad_(), [t for _, some in mine for t in some]
        with use(mode):
            y = mixed_lora(
                x, w.to(dtype), *[(a, segments(i, a.slots)) for (a, _), i in zip(mine, indices, strict=True)]
            )
        assert (type(y.grad_fn).__name__ == "_MixedBackward") == (mode == "triton")
        first = torch.autograd.grad(y, [x, *ts], dy.to(dtype), retain_graph=True)
        graph = torch.autograd.grad(y, [x, *ts], torch.sin(y), create_graph=True)
        return [y, *first, *torch.autograd.grad(sum((d * d).sum() for d in graph), [x, *ts])]  # type: ignore[arg-type]

    got, want = run(torch.float32, "triton"), run(torch.float64, "torch")
    for i, (p, q) in enumerate(zip(got, want, strict=True)):
        assert p.isfinite().all(), i
        assert (p.double() - q).norm() <= 1e-4 * q.norm().clamp(min=1e-6), i
    assert all(torch.equal(p, q) for p, q in zip(run(torch.float32, "triton"), got, strict=True)), "not repeatable"
    for adapters, index in zip(each, indices, strict=True):  # and each row is as if its group were alone
        with use("triton"), torch.no_grad():
            alone = mixed_lora(x0, w, (adapters, segments(index, adapters.slots)))
        close(got[0][index >= 0].detach(), alone[index >= 0], "alone", 1e-5)


def test_nets_and_banks_take_the_kernels(monkeypatch: Any) -> None:
    """LoRA and DoRA of several ranks, beside a method that no kernel knows, in one batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 17))
    methods = [pf.LoRA(3, init_weights="random"), pf.OFT(4), pf.DoRA(20, alpha=5.0, init_weights="random")]
    nets = [pf.adapt(model, {"weight": m}) for m in methods]
    stacks = [pf.stack([net.init(s) for s in range(2)]) for net in nets]
    stacks = [
        {s: {k: torch.randn_like(t).requires_grad_() for k, t in leaf.items()} for s, leaf in a.items()} for a in stacks
    ]
    ts = [t for stack in stacks for leaf in stack.values() for t in leaf.values()]
    x, index = torch.randn(8, 4, 24), [5, -1, 0, 2, 3, 1, 4, 0]
    calls = []
    real = module._Mixed.apply
    monkeypatch.setattr(module._Mixed, "apply", lambda *args: (calls.append(args), real(*args))[1])
    both = pf.Nets(nets)
    with use("torch"):
        want = both.mixed(stacks, index, x)
    assert not calls
    with use("triton"):
        got = both.mixed(stacks, index, x)
    assert [len(groups) for _, _, groups, *_ in calls] == [2, 2]  # a call a layer, for the two low-rank parts
    close(got, want, "Nets.mixed", 1e-5)
    for p, q in zip(torch.autograd.grad(got.sum(), ts), torch.autograd.grad(want.sum(), ts), strict=True):
        close(p, q, "gradient", 1e-4)
    bank = pf.bank({f"{i}{k}": (net, net.init(k)) for i, net in enumerate(nets) for k in range(2)})
    names = ["21", "__base__", "00", "10", "11", "01", "20", "00"]
    with use("torch"):
        want = bank.apply(names, x)
    with use("triton"):
        close(bank.apply(names, x), want, "Bank.apply", 1e-5)
    assert len(calls) == 4


@pytest.mark.parametrize("index", [[0, 4, -1, 2], [-1] * 4, [4] * 4])
def test_nets_of_embeddings_take_the_kernels(index: list[int], monkeypatch: Any) -> None:
    torch.manual_seed(0)
    nets = [pf.adapt(model := nn.Embedding(50, 18), {"weight": pf.LoRA(3, init_weights="random")})]
    nets.append(pf.adapt(model, {"weight": pf.LoRA(17, init_weights="random")}))
    stacks = [pf.stack([net.init(s) for s in range(3)]) for net in nets]
    ids, calls = torch.randint(0, 50, (4, 5)), []
    real = module.mixed_embedding
    monkeypatch.setattr(module, "mixed_embedding", lambda *args: (calls.append(args), real(*args))[1])
    with torch.no_grad(), use("torch"):
        want = pf.Nets(nets).mixed(stacks, index, ids)
    assert not calls
    with torch.no_grad(), use("triton"):
        close(pf.Nets(nets).mixed(stacks, index, ids), want, "embedding", 1e-5)
    assert len(calls) == (len(set(index)) > 1)  # rows that all have one adapter are `apply`


def test_an_index_that_nobody_can_look_at_takes_the_kernels(monkeypatch: Any) -> None:
    """As while a CUDA graph is captured: the index stays on the device, and no value of it is read."""
    torch.manual_seed(0)
    net = pf.adapt(nn.Linear(40, 37), {"weight": pf.LoRA(3, init_weights="random")})
    stacked, x = pf.stack([net.init(s) for s in range(3)]), torch.randn(9, 40)
    index, calls = torch.tensor([0, 2, -1, 1, 0, 0, -1, 2, 1]), []
    want, real = net.mixed(stacked, index, x), module.mixed_lora
    monkeypatch.setattr(module, "mixed_lora", lambda *args: (calls.append(args), real(*args))[1])
    monkeypatch.setattr(gates, "hidden", lambda t: True)
    monkeypatch.setattr(Tensor, "tolist", None)
    with torch.no_grad(), use("triton"):
        close(net.mixed(stacked, index, x), want.detach(), "mixed", 1e-5)
    assert len(calls) == 1
