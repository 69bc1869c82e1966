"""fused_linear in Triton's interpreter: run by test_kernels_interpreter.py with TRITON_INTERPRET=1, not collected."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftfn as pf
from peftfn.kernels import choose, lora_fused, use
from peftfn.kernels.lora_fused import fused_linear, reference
from peftfn.kernels.philox import keep
from peftfn.testing import close

assert choose.INTERPRETED, "test_kernels_interpreter.py runs this file"

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3}
SHAPES = [(1, 1, 1, 1), (7, 13, 5, 3), (35, 70, 45, 40)]  # m, k, n, r
KINDS = {
    "plain": {},
    "dora": {"c": True},
    "dropout": {"dropout": 0.3, "bias": True},
    "all": {"c": True, "bias": True, "dropout": 0.5},
}
SEED = torch.tensor([1234567890123456789])


def operands(shape: tuple[int, ...], dtype: torch.dtype, *, c: bool = False, bias: bool = False) -> list[Any]:
    """x, w, a, b, c, bias: A, B and c in fp32, as masters beside a half-precision x are."""
    m, k, n, r = shape
    g = torch.Generator().manual_seed(sum(shape))

    def t(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, generator=g).to(dtype).requires_grad_()

    return [t(m, k, dtype=dtype), t(n, k, dtype=dtype), t(r, k), t(n, r), t(n) if c else None,
            t(n, dtype=dtype) if bias else None]  # fmt: skip


def wide(ts: list[Any]) -> list[Any]:
    return [None if t is None else t.detach().double().requires_grad_() for t in ts]


def call(f: Any, ts: list[Any], dropout: float) -> Tensor:
    x, w, a, b, c, bias = ts
    with use("triton"):
        y: Tensor = f(x, w, a, b, 0.7, c=c, bias=bias, dropout=dropout, seed=SEED)
    assert y is not None
    return y


def grads(y: Tensor, ts: list[Any], dy: Tensor, **more: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, [t for t in ts if t is not None], dy, **more)


def same(got: Any, want: Any, tolerance: float) -> None:
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.isfinite().all(), i
        size = w.norm().item()
        assert (g.double() - w.double()).norm().item() <= tolerance * max(size, 1e-6), i


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "large"), [("plain", True), ("dora", True), ("dropout", False), ("all", True), ("all", False)]
)
def test_forward_and_backward(dtype: torch.dtype, shape: Any, kind: str, large: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(lora_fused, "products", lambda *_, **__: choose.Products(large, True))
    options = dict(KINDS[kind])
    p = options.pop("dropout", 0.0)
    ts = operands(shape, dtype, **options)
    dy = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(1)).to(dtype)
    y = call(fused_linear, ts, p)
    got = [y, *grads(y, ts, dy)]
    exact = wide(ts)
    want = call(reference, exact, p)
    same(got, [want, *grads(want, exact, dy.double())], TOLERANCE[dtype])
    assert [t.dtype for t in got[1:]] == [t.dtype for t in ts if t is not None]
    again = call(fused_linear, ts, p)
    assert all(torch.equal(s, t) for s, t in zip([again, *grads(again, ts, dy)], got, strict=True)), "not repeatable"


def test_a_prime_of_columns_in_many_tiles() -> None:
    ts = operands((17, 1023, 67, 5), torch.float32, c=True)
    exact = wide(ts)
    y, want = call(fused_linear, ts, 0.0), call(reference, exact, 0.0)
    dy = torch.randn_like(y)
    same([y, *grads(y, ts, dy)], [want, *grads(want, exact, dy.double())], 1e-5)


@pytest.mark.parametrize("needed", range(5))
def test_one_gradient_at_a_time(needed: int) -> None:
    ts = operands((19, 21, 35, 3), torch.float32, c=True)
    exact = wide(ts)
    for i, (t, e) in enumerate(zip(ts[:5], exact[:5], strict=True)):
        t.requires_grad_(i == needed), e.requires_grad_(i == needed)
    y, want = call(fused_linear, ts, 0.25), call(reference, exact, 0.25)
    dy = torch.randn_like(y)
    same(grads(y, [ts[needed]], dy), grads(want, [exact[needed]], dy.double()), 1e-5)


def test_twice_differentiable() -> None:
    ts = operands((9, 11, 7, 3), torch.float32, c=True, bias=True)
    exact = wide(ts)
    second = []
    for f, us in ((fused_linear, ts), (reference, exact)):
        y = call(f, us, 0.3)
        first = grads(y, us, torch.sin(y), create_graph=True)
        second.append(grads(sum((g * g).sum() for g in first), us, None))  # type: ignore[arg-type]
    same(*second, 1e-4)


def test_strided_operands() -> None:
    """A transposed x, W of a Conv1D, and the gradient of a sum, whose strides are zero."""
    x, w, a, b, _, _ = operands((18, 40, 34, 3), torch.float32)
    turned = [x.detach().t().contiguous().t().requires_grad_(), w.detach().t().contiguous().t(), a, b, None, None]
    exact = wide([x, w, a, b, None, None])
    y, want = call(fused_linear, turned, 0.0), call(reference, exact, 0.0)
    leaves, wide_leaves = [turned[0], a, b], [exact[0], exact[2], exact[3]]
    same(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), wide_leaves), 1e-5)


def test_rows_more_than_2_31_elements_apart() -> None:
    far = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 32), (2**30, 1))
    far.copy_(torch.randn(3, 32))
    _, w, a, b, _, _ = operands((3, 32, 16, 4), torch.float16)
    with torch.no_grad():
        y = call(fused_linear, [far, w, a, b, None, None], 0.0)
        want = call(reference, wide([far.clone(), w, a, b, None, None]), 0.0)
    same([y], [want], 3e-3)


def test_mask_is_that_of_the_seed() -> None:
    x, w = torch.ones(50, 70), torch.zeros(16, 70)
    a, b = torch.eye(70)[:16], torch.eye(16)
    with use("triton"):
        y = fused_linear(x, w, a, b, dropout=0.4, seed=SEED)
    assert y is not None
    assert torch.equal(y != 0, keep(SEED, 50, 70, 0.4)[:, :16])
    kept = keep(SEED, 400, 500, 0.4).float()
    assert abs(kept.mean().item() - 0.6) < 5e-3
    assert abs((kept[:, 1:] * kept[:, :-1]).mean().item() - 0.36) < 5e-3
    other = keep(SEED + 1, 400, 500, 0.4).float()
    assert abs((kept * other).mean().item() - 0.36) < 5e-3


def models() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 17, bias=False))
    return model, torch.randn(2, 5, 24)


@pytest.mark.parametrize(
    "method",
    [
        pf.LoRA(3, init_weights="random"),
        *(pf.DoRA(3, init_weights="random", attached=on) for on in (False, True)),
        pf.PiSSA(3),
    ],
    ids=str,
)
def test_apply_takes_the_kernels(method: pf.Method, monkeypatch: Any) -> None:
    """net.apply and as_module, without being asked, and to the same gradients; "torch" leaves them out."""
    model, x = models()
    net = pf.adapt(model, {"0.weight": method, "2.weight": method})
    a = {s: {k: t.detach().requires_grad_() for k, t in leaf.items()} for s, leaf in net.init(1).items()}
    leaves = [t for leaf in a.values() for t in leaf.values()]
    calls = []
    real = lora_fused._Fused.apply
    monkeypatch.setattr(lora_fused._Fused, "apply", lambda *args: (calls.append(args), real(*args))[1])
    with use("torch"):
        want = net.apply(a, x)
    assert not calls
    with use("triton"):
        got = net.apply(a, x)
        assert len(calls) == 2
        close(pf.as_module(net, a)(x), want, "as_module", 1e-5)
        assert len(calls) == 4
    close(got, want, "apply", 1e-5)
    for p, q in zip(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        close(p, q, "gradient", 1e-4)


def conv1d(model: nn.Sequential) -> nn.Module:
    """The first layer as transformers' Conv1D, which stores W transposed and calls addmm."""
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(40, 24)
    layer.weight, layer.bias = nn.Parameter(model[0].weight.detach().mT.contiguous()), model[0].bias  # type: ignore[union-attr, assignment]
    return nn.Sequential(layer, *model[1:])


@pytest.mark.parametrize("large", [True, False])
@pytest.mark.parametrize("layer", ["Linear", "Conv1D"])
@pytest.mark.parametrize(
    "method",
    [
        pf.LoRA(3, alpha=5.0, init_weights="random"),
        pf.LoRA(3, init_weights="random", lora_bias=True),
        pf.LoRA(3, init_weights="random", dropout=0.25),
        pf.DoRA(3, alpha=5.0, init_weights="random"),
        pf.DoRA(3, init_weights="random", dropout=0.25),
    ],
    ids=str,
)
def test_masters_and_the_bias_reach_the_kernel_as_they_are(
    method: pf.Method, layer: str, large: bool, monkeypatch: Any
) -> None:
    """fp32 leaves beside a half-precision x are not cast before, their gradients are of their dtype, and the layer's
    bias, in its slot or as its method makes it, is added once."""
    monkeypatch.setattr(lora_fused, "products", lambda *_, **__: choose.Products(large, True))
    monkeypatch.setattr(lora_fused, "fresh_seed", lambda device: SEED)
    model, x = models()
    model = (conv1d(model) if layer == "Conv1D" else model).half()
    net = pf.adapt(model, {"weight": method})
    a = {s: {k: torch.randn_like(t).requires_grad_() for k, t in leaf.items()} for s, leaf in net.init(1).items()}
    leaves = [t for leaf in a.values() for t in leaf.values()]
    calls = []
    real = lora_fused._Fused.apply
    monkeypatch.setattr(lora_fused._Fused, "apply", lambda *args: (calls.append(args), real(*args))[1])
    bias = model[0].bias.detach().clone().requires_grad_()
    with use("triton"):
        y = net.apply(a, x.half(), params={"0.bias": bias})
    assert [{t.dtype for t in (down, up, c) if t is not None} for _, _, down, up, c, *_ in calls] == [
        {torch.float32}
    ] * 2
    assert [call[5] is not None for call in calls] == [True, "beta" in a["2.weight"]]
    got = torch.autograd.grad(y.sum(), [*leaves, bias])
    assert [t.dtype for t in got] == [torch.float32] * len(leaves) + [torch.float16]
    exact = {s: {k: t.detach().double().requires_grad_() for k, t in leaf.items()} for s, leaf in a.items()}
    exact_bias = bias.detach().double().requires_grad_()
    want = written_out(model, method, exact, x.half().double(), exact_bias)
    ts = [t for leaf in exact.values() for t in leaf.values()]
    same([y, *got], [want, *torch.autograd.grad(want.sum(), [*ts, exact_bias])], 1e-2)


def written_out(model: Any, method: Any, a: Any, x: Tensor, bias: Tensor) -> Tensor:
    """Such a model in fp64, from the formulas."""

    def layer(x: Tensor, w: Tensor, leaf: Any, bias: Any) -> Tensor:
        c = None
        if "m" in leaf:
            c = leaf["m"] / (w + method.scale * leaf["b"].detach() @ leaf["a"].detach()).norm(dim=1)
        if "beta" in leaf:
            bias = (0 if bias is None else bias) + method.scale * leaf["beta"]
        return reference(x, w, leaf["a"], leaf["b"], method.scale, c=c, bias=bias, dropout=method.dropout, seed=SEED)

    first, last = (model[i].weight.detach().double() for i in (0, 2))
    first = first if isinstance(model[0], nn.Linear) else first.mT
    return layer(torch.tanh(layer(x, first, a["0.weight"], bias)), last, a["2.weight"], None)


def test_what_no_kernel_takes_is_cast_first(monkeypatch: Any) -> None:
    model, x = models()
    net, seen = pf.adapt(model.half(), {"0.weight": pf.LoRA(3)}), []
    real = pf.LoRA.linear
    monkeypatch.setattr(pf.LoRA, "linear", lambda self, p, w, x: (seen.append(p), real(self, p, w, x))[1])
    for mode in ("torch", "auto"):  # "auto" leaves so small a product to torch
        with use(mode):  # type: ignore[arg-type]
            net.apply(net.init(0), x.half())
    assert [{t.dtype for t in p.values()} for p in seen] == [{torch.float16}] * 2


@pytest.mark.parametrize("other", ["its own rule", "a mixed batch"])
def test_an_adapted_bias_is_added_once(other: str) -> None:
    model, x = models()
    rules = {"0.weight": pf.DoRA(3, init_weights="random"), "0.bias": pf.Full()}
    net = pf.adapt(model, rules)
    a = {s: {k: torch.randn_like(t) for k, t in leaf.items()} for s, leaf in net.init(1).items()}
    run = net.apply if other == "its own rule" else lambda a, x: net.mixed(pf.stack([a, net.init(2)]), [0, -1], x)
    with use("triton"):
        got = run(a, x)
    with use("torch"):
        close(got, run(a, x), other, 1e-5)
    if other == "its own rule":
        close(got, torch.func.functional_call(model, net.merge(a), (x,)), other, 1e-5)


def test_dropout_in_a_model_obeys_manual_seed_and_eval() -> None:
    model, x = models()
    net = pf.adapt(model, {"0.weight": pf.LoRA(3, dropout=0.5, init_weights="random")})
    a = net.init(1)
    with use("triton"):
        torch.manual_seed(3)
        one, other = net.apply(a, x), net.apply(a, x)
        torch.manual_seed(3)
        assert torch.equal(net.apply(a, x), one)
        assert not torch.equal(one, other)
        model.eval()
        evaluated = net.apply(a, x)
    with use("torch"):
        close(evaluated, net.apply(a, x), "eval", 1e-5)


def test_backward_outside_of_use_follows_its_forward(monkeypatch: Any) -> None:
    """Autograd's threads do not inherit a context: what ran forward must be kept."""
    from peftfn.kernels import lora_triton

    swept = []
    real = lora_triton.sweep
    monkeypatch.setattr(lora_triton, "sweep", lambda *args, **kw: (swept.append(1), real(*args, **kw))[1])
    ts = operands((9, 11, 7, 3), torch.float32)
    y = call(fused_linear, ts, 0.0)
    with use("torch"):
        y.sum().backward()
    assert swept
