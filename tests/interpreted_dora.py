"""dora_norm in Triton's interpreter: run by test_kernels_interpreter.py with TRITON_INTERPRET=1, not collected."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfn as pf
from peftfn.kernels import choose, use
from peftfn.kernels import dora_norm as module
from peftfn.kernels.dora_norm import EXACT, dora_norm, dora_norms, reference, rounded
from peftfn.plan import prepared
from peftfn.testing import close

assert choose.INTERPRETED, "test_kernels_interpreter.py runs this file"

SHAPES = [(1, 1, 1), (13, 7, 3), (45, 131, 17), (33, 70, 40)]  # n, k, r


def operands(n: int, k: int, r: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g).to(dtype), torch.randn(r, k, generator=g), torch.randn(n, r, generator=g)


def exact(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return (w.double() + scale * (b.double() @ a.double())).norm(dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    w, a, b = operands(*shape, dtype)
    with use("triton"):
        n = dora_norm(w, a, b, 0.7)
        assert torch.equal(n, dora_norm(w, a, b, 0.7))
        close(dora_norm(w.t().contiguous().t(), a, b, 0.7), n, "a transposed weight", 1e-6)
    assert n.dtype == b.dtype
    close(n.double(), exact(w, *rounded(w, a, b), 0.7), "norm", 1e-5)
    if len(a) <= EXACT or dtype is torch.float32:  # the factors are as they are
        close(n.double(), exact(w, a, b, 0.7), "norm", 1e-5)
    else:
        close(n.double(), exact(w, a, b, 0.7), "norm", 1e-3)


def test_many_sites_in_one_launch(monkeypatch: Any) -> None:
    from peftfn.kernels import dora_triton

    launches: list[str] = []
    real = dora_triton.launch
    monkeypatch.setattr(
        dora_triton,
        "launch",
        lambda kernel, *args, **meta: (launches.append(kernel.fn.__name__), real(kernel, *args, **meta)),
    )
    sites = [operands(45, 70, 17, torch.float16, seed) for seed in range(3)]
    ws, downs, ups = zip(*sites, strict=True)
    with use("triton"):
        got = dora_norms(ws, downs, ups, [0.5, 1.0, 2.0])
    assert launches == ["_norms", "_root"]
    want = torch.stack([exact(w, *rounded(w, a, b), s) for (w, a, b), s in zip(sites, (0.5, 1.0, 2.0), strict=True)])
    close(torch.stack(list(got)).double(), want, "norms", 1e-5)


def test_sites_of_one_shape_are_prepared_in_one_launch(monkeypatch: Any) -> None:
    """Also where others are prepared already, or have a layout of their own; to what each alone would be."""
    from peftfn.kernels import dora_triton

    model = nn.Sequential(*[nn.Linear(24, 40) for _ in range(3)], nn.Linear(40, 24), nn.Linear(24, 40))
    net = pf.adapt(model, {r"4\.weight": pf.DoRA(3, attached=True, init_weights="random"), "weight": pf.DoRA(3)})
    a = {s: {k: torch.randn_like(t) for k, t in leaf.items()} for s, leaf in net.init(0).items()}
    weights = dict(model.named_parameters())
    launches: list[str] = []
    real = dora_triton.launch
    monkeypatch.setattr(
        dora_triton,
        "launch",
        lambda kernel, *args, **meta: (launches.append(kernel.fn.__name__), real(kernel, *args, **meta)),
    )
    with use("torch"):
        want = {n: e.tensors(a[n], {}, weights[n])[1] for n, e in net.plan.items()}
    assert not launches
    with use("triton"):
        got = {n: p for n, (_, p) in prepared(net.plan, a, weights).items()}
    assert sorted(launches) == ["_norm", "_norms", "_norms", *["_root"] * 3]
    assert list(got) == list(net.plan)
    for name, p in want.items():
        assert p.keys() == got[name].keys()
        for k, t in p.items():
            close(got[name][k], t, f"{name} {k}", 1e-5)
    launches.clear()
    weights["1.weight"] = weights["1.weight"].detach().mT.contiguous().mT
    with use("triton"):
        again = prepared(net.plan, {**a, "0.weight": got["0.weight"]}, weights)
    assert sorted(launches) == ["_norm", "_norm", "_norm", "_norms", *["_root"] * 4]
    for name, p in want.items():
        close(again[name][1]["c"], p["c"], name, 1e-5)


def test_net_prepare_is_two_pairs_of_launches_for_two_shapes(monkeypatch: Any) -> None:
    from peftfn.kernels import dora_triton

    model = nn.Sequential(*[nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24), nn.Tanh()] * 3).requires_grad_(False)
    net, launches = pf.adapt(model, {"weight": pf.DoRA(3, init_weights="random")}), []
    a, x = net.init(0), torch.randn(5, 24)
    real = dora_triton.launch
    monkeypatch.setattr(dora_triton, "launch", lambda *args, **meta: (launches.append(args), real(*args, **meta)))
    with use("triton"):
        ready = net.prepare(a)
        assert len(launches) == 4
        y = net.apply(ready, x)
        assert len(launches) == 4
    with use("torch"):
        close(y, net.apply(a, x), "prepared", 1e-5)


def test_nothing_cancels() -> None:
    """A norm a thousandth of the weight's: the factored form is off by 18 % here."""
    w, a, b = operands(16, 96, 4)
    w = -(b @ a) + 1e-3 * torch.randn(16, 96) * (b @ a).norm(dim=1, keepdim=True) / 96**0.5
    with use("triton"):
        n = dora_norm(w, a, b, 1.0)
    close(n.double() / exact(w, a, b, 1.0), torch.ones(16).double(), "ratio", 1e-3)


def test_gradient_of_an_attached_norm_is_exact_twice() -> None:
    shapes = operands(13, 21, 3)
    second = []
    for f, dtype in ((dora_norm, torch.float32), (reference, torch.float64)):
        ts = [t.to(dtype).requires_grad_() for t in shapes]
        with use("triton"):
            n = f(*ts, 0.7)
        first = torch.autograd.grad(n, ts, torch.sin(n), create_graph=True)
        second.append([n, *first, *torch.autograd.grad(sum((g * g).sum() for g in first), ts)])  # type: ignore[arg-type]
    for i, (p, q) in enumerate(zip(*second, strict=True)):
        close(p.double(), q, f"derivative {i}", 1e-4)


def test_a_row_of_zeros_has_no_gradient_and_no_nan() -> None:
    w, a, b = operands(5, 8, 2)
    w[2], b[2] = 0, 0
    ts = [t.requires_grad_() for t in (w, a, b)]
    with use("triton"):
        grads = torch.autograd.grad(dora_norm(*ts, 1.0).sum(), ts)
    assert all(g.isfinite().all() for g in grads)
    assert grads[0][2].eq(0).all()


def test_fp64_goes_to_the_reference(monkeypatch: Any) -> None:
    monkeypatch.setattr(module._Norm, "apply", lambda *_: pytest.fail("a kernel ran"))
    w, a, b = (t.double() for t in operands(5, 8, 2))
    with use("triton"):
        close(dora_norm(w, a, b, 0.7), exact(w, a, b, 0.7), "fp64", 1e-12)
