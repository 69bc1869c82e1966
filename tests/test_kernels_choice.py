"""Who runs a product, a kernel or plain torch: rules, `use`, and everything before which a kernel must step aside."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compiled import TARGETS, Launch, recorded
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import peftfn as pf
from peftfn.core.method import LowRank
from peftfn.kernels import choose, use
from peftfn.kernels.choose import Products, kernels_for, products
from peftfn.kernels.dora_norm import dora_norm
from peftfn.kernels.launch import launch
from peftfn.kernels.lora_fused import fused_linear
from peftfn.kernels.mixed_lora import mixed_rows
from peftfn.testing import close

SM90 = TARGETS[1]
pytestmark = pytest.mark.skipif(not choose.installed(), reason="needs Triton: pip install peftfn[triton]")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """CPU tensors count as an H200's, and kernels are noted and not run: what a product returns then is no number."""
    monkeypatch.setattr(choose, "INTERPRETED", True)
    monkeypatch.setattr(choose, "target", lambda device: SM90)
    with recorded() as launches:
        yield launches


def model(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, pf.Adapted, Any, Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    net = pf.adapt(base, {"weight": pf.DoRA(2, init_weights="random")})
    return base, net, net.init(0), torch.randn(3, 6, dtype=dtype)


@pytest.mark.parametrize(
    ("size", "dtype", "plain", "wanted"),
    [
        ((4096, 4096, 4096, 16), torch.bfloat16, False, Products(False, True)),
        ((512, 512, 512, 64), torch.float16, False, Products(False, True)),
        ((4096, 4096, 4096, 16), torch.bfloat16, True, None),
        ((4096, 4096, 4096, 65), torch.bfloat16, False, None),
        ((511, 4096, 4096, 16), torch.bfloat16, False, None),
        ((4096, 256, 4096, 16), torch.bfloat16, False, None),
        ((4096, 4096, 4096, 16), torch.float32, False, None),
        ((0, 4096, 4096, 16), torch.bfloat16, False, None),
    ],
)
def test_rules(size: tuple[int, int, int, int], dtype: torch.dtype, plain: bool, wanted: Products | None) -> None:
    """As measured: see docs/kernels.md."""
    assert products(SM90, *size, dtype, plain=plain) == wanted
    with use("triton"):
        assert products(SM90, *size, dtype, plain=plain) == (Products(True, True) if size[0] else None)


def test_apply_and_mixed_take_kernels_without_being_asked(gpu: list[Launch]) -> None:
    big = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16)
    net = pf.adapt(big, {"weight": pf.DoRA(8, dropout=0.1)})
    a = {s: {k: t.requires_grad_() for k, t in leaf.items()} for s, leaf in net.init(0).items()}
    net.apply(a, torch.zeros(2, 512, 1024, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    names = [launch.kernel.__name__ for launch in gpu]
    assert {"_norm", "_shrink", "_sweep", "_fold"} <= set(names)
    assert names.count("_gemm") == 1  # dropout of dS A, on which the library's product is added
    gpu.clear()
    big.eval()
    with torch.no_grad():
        net.mixed(pf.stack([net.init(s) for s in range(40)]), [3, -1, 5], torch.zeros(3, 1, 1024, dtype=torch.bfloat16))
    assert [launch.kernel.__name__ for launch in gpu][-2:] == ["_thin_row", "_wide_row"]


@pytest.mark.parametrize(
    ("rank", "rows", "dtype", "kernels"),
    [
        (64, 512, torch.bfloat16, True),
        (65, 512, torch.bfloat16, True),
        (60, 512, torch.float32, False),
        (60, 511, torch.float32, True),
    ],
)
def test_long_segments_of_a_mixed_batch(
    rank: int, rows: int, dtype: torch.dtype, kernels: bool, gpu: list[Launch]
) -> None:
    """From 512 rows an adapter in fp32, the library has each."""
    net = pf.adapt(nn.Linear(512, 512, dtype=dtype), {"weight": pf.LoRA(rank)})
    stack, x = pf.stack([net.init(s) for s in range(5)]), torch.zeros(3, rows, 512, dtype=dtype)
    with torch.no_grad():
        net.mixed(stack, [1, 3, -1], x)
    assert [launch.kernel.__name__ for launch in gpu] == ["_thin", "_wide"] * kernels
    gpu.clear()
    with torch.no_grad(), use("triton"):
        net.mixed(stack, [1, 3, -1], x)
    assert len(gpu) == 2


def test_auto_leaves_small_and_fp32_products_to_torch(gpu: list[Launch]) -> None:
    base, net, a, x = model()
    close(net.apply(a, x), functional_call(base, net.merge(a), (x,)), "small", 1e-5)
    assert not gpu


def test_torch_is_torch(gpu: list[Launch]) -> None:
    base, net, a, x = model()
    with use("torch"):
        close(net.apply(a, x), functional_call(base, net.merge(a), (x,)), "torch", 1e-5)
        net.mixed(pf.stack([a, a]), [0, 1, -1], x)
    assert not gpu


def tangent(f: Callable[[Any], Tensor], a: Any) -> Tensor:
    with forward_ad.dual_level():
        duals = {s: {k: forward_ad.make_dual(t, torch.ones_like(t)) for k, t in leaf.items()} for s, leaf in a.items()}
        return forward_ad.unpack_dual(f(duals)).tangent


def ones(a: Any) -> Any:
    return {s: {k: torch.ones_like(t) for k, t in leaf.items()} for s, leaf in a.items()}


def gathered(tree: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(tree)  # type: ignore[no-any-return]


TRANSFORMS: dict[str, Callable[[Callable[[Any], Tensor], Any], Any]] = {
    "grad": lambda f, a: grad(lambda a: f(a).sum())(a),
    "vmap": lambda f, a: vmap(f)(pf.stack([a, a])),
    "vmap(grad)": lambda f, a: vmap(grad(lambda a: f(a).sum()))(pf.stack([a, a])),
    "jvp": lambda f, a: jvp(f, (a,), (ones(a),)),
    "vjp": lambda f, a: (lambda y, pull: pull(torch.ones_like(y)))(*vjp(f, a)),
    "jacrev": lambda f, a: jacrev(f)(a),
    "jacfwd": lambda f, a: jacfwd(f)(a),
    "Hessian": lambda f, a: hessian(lambda b: f({**a, "0.weight": {**a["0.weight"], "b": b}}).sum())(
        a["0.weight"]["b"]
    ),
    "Hessian-vector": lambda f, a: jvp(grad(lambda a: f(a).square().sum()), (a,), (ones(a),))[1],
    "forward AD": tangent,
    "compile": lambda f, a: torch.compile(f, backend="eager", fullgraph=True)(a),
    "compile(jvp)": lambda f, a: torch.compile(lambda a: jvp(f, (a,), (ones(a),))[1], backend="eager")(a),
    "make_fx": lambda f, a: torch.fx.experimental.proxy_tensor.make_fx(f)(a)(a),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_kernels_step_aside(name: str, gpu: list[Launch]) -> None:
    """A kernel under one of these would give a zero tangent, one gradient for all, or nothing to trace; in silence."""

    _, net, a, x = model()

    def f(a: Any) -> Tensor:
        return net.apply(a, x)  # type: ignore[no-any-return]

    def run(mode: choose.Mode) -> list[Tensor]:
        with use(mode):
            return gathered(TRANSFORMS[name](f, a))

    got = run("triton")
    assert not gpu, name
    for p, q in zip(got, run("torch"), strict=True):
        close(p.detach(), q.detach(), name, 1e-6)


@pytest.mark.parametrize("what", ["autocast", "fp64", "subclass", "other device", "integers", "empty", "sparse"])
def test_operands_that_no_kernel_takes(what: str, gpu: list[Launch]) -> None:
    class Sub(Tensor):
        pass

    x, w, a, b = torch.randn(4, 6), torch.randn(5, 6), torch.randn(2, 6), torch.randn(5, 2)
    if what == "fp64":
        x, w, a, b = x.double(), w.double(), a.double(), b.double()
    elif what == "subclass":
        w = w.as_subclass(Sub)
    elif what == "other device":
        w = w.to("meta")
    elif what == "integers":
        w = w.to(torch.int8)
    elif what == "empty":
        x = x[:0]
    elif what == "sparse":
        w = w.to_sparse()
    low = LowRank(a[None], b[None])
    with use("triton"), torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        assert fused_linear(x, w, a, b) is None
        assert mixed_rows(x, w, [(low, 0)], torch.zeros(len(x), dtype=torch.int64), "linear", {}) is None
        if what in ("autocast", "fp64", "subclass"):
            want = torch.linalg.vector_norm(torch.addmm(w, b, a, alpha=0.5), dim=1)
            close(dora_norm(w, a, b, 0.5), want, what, 1e-6)
    assert not gpu


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_mixed_batches_step_aside(transform: str, gpu: list[Launch]) -> None:
    _, net, a, x = model()
    stack = pf.stack([a, net.init(1)])

    def f(stack: Any) -> Tensor:
        return net.mixed(stack, [1, -1, 0], x)  # type: ignore[no-any-return]

    def run(mode: choose.Mode) -> list[Tensor]:
        with use(mode):
            if transform == "vmap":
                return [vmap(f)(pf.stack([stack, stack]))]
            return gathered(TRANSFORMS[transform](f, stack))

    got = run("triton")
    assert not gpu
    for p, q in zip(got, run("torch"), strict=True):
        close(p, q, transform, 1e-6)


def test_fake_tensors_launch_nothing(gpu: list[Launch]) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), use("triton"):
        x, w, a, b = torch.empty(4, 6), torch.empty(5, 6), torch.empty(2, 6), torch.empty(5, 2)
        assert fused_linear(x, w, a, b) is None
    assert not gpu


def test_cpu_tensors_never_meet_a_kernel() -> None:
    x, w = torch.randn(4, 6), torch.randn(5, 6)
    with use("triton"), recorded() as launches:
        assert kernels_for(x, w) is None
        base, net, a, x = model()
        close(net.apply(a, x), functional_call(base, net.merge(a), (x,)), "cpu", 1e-5)
    assert not launches


class Kernel:
    """As Triton's JITFunction: called with a grid, it returns what it compiled; that is called with all arguments."""

    def __init__(self, log: list[Any]):
        self.log = log
        self.params = [
            SimpleNamespace(name=n, is_constexpr=n.isupper(), do_not_specialize=n == "m") for n in ("x", "n", "m", "BM")
        ]

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **meta: Any) -> Any:
            self.log.append(("compiles", grid, meta))
            return self.log_of_compiled

        return run

    @property
    def log_of_compiled(self) -> Any:
        class Compiled:
            def __getitem__(_, grid: Any) -> Any:
                return lambda *args: self.log.append(("runs", grid, args[1:]))

        return Compiled()


class On(Tensor):
    """A CPU tensor that says it is on GPU 1."""

    def get_device(self) -> int:
        return 1


def test_a_kernel_runs_on_the_device_of_its_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, which need not be the tensors'."""
    current, order = [0], []

    @contextmanager
    def device(index: int) -> Iterator[None]:
        before, current[0] = current[0], index
        order.append(index)
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    x, kernel = torch.ones(1).as_subclass(On), Kernel(order)
    launch(kernel, (2,), x, 3, 5, BM=16)
    launch(kernel, (0, 2), x, 3, 5, BM=16)  # nothing to do
    assert order == [1, ("compiles", (2,), {"BM": 16})]
    current[0] = 1
    launch(kernel, (2,), x, 3, 5, BM=16)
    assert order[2:] == [("runs", (2, 1, 1), (3, 5, 16))]


def test_what_is_compiled_is_used_again_exactly_where_triton_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Triton's own key: dtypes, alignment, constants, and of the numbers that it specialises 1 and 16, 32, 48 …"""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    order: list[Any] = []
    base = torch.ones(64)

    def of(dtype: torch.dtype, offset: int = 0) -> Tensor:
        return base.to(dtype)[offset:].as_subclass(On)

    kernel, f32 = Kernel(order), of(torch.float32)
    calls: list[tuple[Any, bool]] = [
        ((f32, 3, 5, 16), True), ((f32, 5, 16, 16), False), ((f32, 5, 1, 16), False), ((f32, 1, 5, 16), True),
        ((f32, 32, 5, 16), True), ((f32, 48, 2**30, 16), False), ((f32, 48, 2**31, 16), True), ((f32, 3, 5, 32), True),
        ((of(torch.float16), 3, 5, 16), True), ((of(torch.float32, 1), 3, 5, 16), True),
        ((f32, 2**35, 5, 16), True), ((f32, 3, 7, 16), False),
    ]  # fmt: skip
    for (x, n, m, bm), new in [*calls, *[(call, False) for call, _ in calls]]:
        order.clear()
        launch(kernel, (1,), x, n, m, BM=bm)
        assert [what for what, *_ in order] == ["compiles" if new else "runs"], (x.dtype, n, m, bm)


def test_use_is_of_its_context_alone() -> None:
    seen: list[str] = []
    with use("torch"):
        with pytest.raises(ZeroDivisionError), use("triton"):
            seen.append(choose._mode.get() + str(1 // 0))
        assert choose._mode.get() == "torch"
        thread = threading.Thread(target=lambda: seen.append(choose._mode.get()))
        thread.start()
        thread.join()
    assert seen == ["auto"]
    assert choose._mode.get() == "auto"


def test_use_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="choose"), use("cuda"):  # type: ignore[arg-type]
        pass
    monkeypatch.setattr(choose, "installed", lambda: False)
    with pytest.raises(ValueError, match="pip install"), use("triton"):
        pass


def test_everything_works_without_triton() -> None:
    """peftfn does not import it (that takes long), nor does it need it."""
    import subprocess
    import sys

    program = (
        "import importlib.util as u, sys; f = u.find_spec; "
        "u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a); "
        "import torch, peftfn as pf; from peftfn.kernels.choose import target; assert 'triton' not in sys.modules; "
        "net = pf.adapt(torch.nn.Linear(4, 4), {'weight': pf.DoRA(2)}); net.apply(net.init(0), torch.randn(2, 4)); "
        "assert target(torch.device('cuda', 0)) is None"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
