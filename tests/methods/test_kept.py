"""What a training step keeps for its backward pass, counted in bytes, against the installed PEFT's same method."""

import json
from collections.abc import Callable, Iterable
from typing import Any

import peft
import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from support import everywhere
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import peftfn as pf
import peftfn.methods
from peftfn.core.method import Weight, registry

pytestmark = [  # of PEFT
    pytest.mark.filterwarnings("ignore:aLoRA is currently only supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor:UserWarning"),
]
SIZE, ROWS = 128, 4
METHODS: dict[str, Any] = {
    name: cls
    for name, cls in sorted(registry.items())
    if issubclass(cls, Weight) and cls.__module__.startswith("peftfn.methods") and "peft" in vars(cls) and cls.peft
}


def kept(run: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps in `run`, beside the tensors that are there without it."""
    there, found = {t.untyped_storage().data_ptr() for t in known}, dict[int, Tensor]()

    def pack(t: Tensor) -> Tensor:
        found.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        out = run()
    assert out.requires_grad
    return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in there)


OPTIONS: dict[str, dict[str, Any]] = {
    "AdaLoRA": {"total_steps": 100},
    "C3A": {"block_size": 16},
    "HRA": {"rank": 8},
    "KaSA": {"truncate": True},
    "TrainableTokens": {"tokens": (1, 2)},
    "VBLoRA": {"length": 16},
}
"""Hyper-parameters other than the defaults, which do not fit."""
NOT_PEFTS = {
    "Poly": "PEFT's layers are called with the task of each row",
    "QALoRA": "PEFT has it at GPTQ layers alone",
    "FRoD": "PEFT's matrices are sparse tensors, without a storage to count",
    "SHiRA": "PEFT's matrices are sparse tensors, without a storage to count",
}


def base() -> nn.Module:
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE))


@pytest.mark.parametrize("name", sorted(METHODS.keys() - NOT_PEFTS))
def test_a_step_keeps_no_more_than_pefts(name: str) -> None:
    """Beside PEFT's bytes, a few times the method's own numbers, of which its factors are made."""
    method = METHODS[name](**OPTIONS.get(name, {}))
    written = json.loads(json.dumps(method.peft.written(method)))
    if "feedforward_modules" in written:
        written["feedforward_modules"] = []
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[method.peft.type]
    theirs = peft.get_peft_model(base(), cls(target_modules=["0", "2"], **written))
    model = base()
    net = everywhere(pf.adapt(model, {r"(0|2)\.weight": method}))
    a, x = net.init(), torch.randn(ROWS, SIZE)
    for t in pf.leaves(a):
        t.requires_grad_()
    own = [*pf.leaves(a), *(t for e in net.plan.values() for t in e.frozen.values())]
    mine = kept(lambda: net.apply(a, x), [x, *model.parameters(), *own])
    more = mine - kept(lambda: theirs(x), [x, *theirs.parameters(), *theirs.buffers()])
    assert more <= 3 * sum(t.numel() * t.element_size() for t in own)


@pytest.mark.parametrize("method", [pf.RandLoRA(rank=8), pf.LoHa(rank=16), pf.FourierFT(), pf.WaveFT()], ids=str)
def test_no_tensor_of_the_weights_size_is_kept_at_the_first_layer(method: Weight) -> None:
    """Where no gradient of x is asked for, what is kept is of the input's size (a weight is 32 times as large)."""
    model, x = base(), torch.randn(ROWS, SIZE)
    net = pf.adapt(model, {r"0\.weight": method})
    a = net.init()
    for t in pf.leaves(a):
        t.requires_grad_()
    own = [*pf.leaves(a), *(t for e in net.plan.values() for t in e.frozen.values())]
    assert kept(lambda: net.apply(a, x), [x, *model.parameters(), *own]) <= 8 * x.nbytes


AGAIN = [
    pf.RandLoRA(rank=4, alpha=8),
    pf.LoHa(rank=8, init_weights="random"),
    pf.FourierFT(n_frequency=120, scaling=4.0),
    pf.WaveFT(n_frequency=120, scaling=1.0),
]


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("method", AGAIN, ids=str)
def test_what_is_made_again_has_the_same_gradients(method: Weight, rows: int) -> None:
    """Also of gradients, and under every transform, whichever way costs less for so many rows."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 12)), torch.randn(rows, 16)
    net = pf.adapt(model, {"weight": method})
    a = {n: {k: t + 0.3 * torch.randn_like(t) for k, t in leaf.items()} for n, leaf in net.init().items()}

    def plain(a: Any) -> Tensor:
        return torch.func.functional_call(model, {n: w.detach() for n, w in net.weights.items()} | net.merge(a), (x,))

    def loss(f: Any) -> Any:
        return lambda a: f(a).tanh().square().sum()

    def curvature(f: Any) -> Any:
        g = torch.func.grad(loss(f))
        return torch.func.grad(lambda a: sum(t.square().sum() for t in pf.leaves(g(a))))(a)

    for want, got in (
        (torch.func.grad(loss(plain))(a), torch.func.grad(loss(lambda a: net.apply(a, x)))(a)),
        (curvature(plain), curvature(lambda a: net.apply(a, x))),
    ):
        for u, v in zip(pf.leaves(want), pf.leaves(got), strict=True):
            assert torch.allclose(u, v, atol=1e-4, rtol=1e-3) and bool(u.abs().max() > 1e-6)
    for t in pf.leaves(a):
        t.requires_grad_()
    first = torch.autograd.grad(loss(lambda a: net.apply(a, x))(a), pf.leaves(a), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), pf.leaves(a))
    for u, v in zip(pf.leaves(curvature(plain)), second, strict=True):
        assert torch.allclose(u, v, atol=1e-4, rtol=1e-3)
