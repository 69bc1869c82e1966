"""Methods whose `linear` never makes a tensor of the weight's size, forward or backward."""

import pytest
import torch
from models import Made
from torch import nn

import peftfn as pf
from peftfn.testing import shaken

OUT, IN, ROWS = 96, 48, 3
THIN: list[type[pf.Method]] = [pf.LoKr, pf.C3A, pf.OFT, pf.HRA, pf.MiSS, pf.RoAd, pf.VeRA, pf.IA3]
MORE = [pf.C3A(block_size=24), pf.C3A(block_size=6), pf.OFT(block_size=8), pf.MiSS(rank=4), pf.VeRA(rank=8)]
CASES = [cls(**case) for cls in THIN for case in cls.cases] + MORE


def dense(method: pf.Method) -> str | None:
    """Why a method makes a tensor of that size all the same."""
    match method:
        case pf.LoKr(weight_decompose=True):
            return "the decomposition takes the norms of W + delta, row by row"
        case pf.C3A(block_size=1):
            return "blocks of one are a dense matrix, trained"
        case pf.OFT(blocks=2, side="output"):
            return "two blocks [48, 48] of the rotation of 96 outputs are of that size themselves"
    return None


@pytest.mark.parametrize("method", CASES, ids=str)
def test_no_tensor_of_the_weights_size(method: pf.Method) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).requires_grad_(False).eval()
    try:
        net = pf.adapt(model, {"weight": method})
    except ValueError as e:
        pytest.fail(f"no case of this size: {e}")
    leaves = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in shaken(net.init(), 1, 0.1).items()}
    x = torch.randn(ROWS, IN, requires_grad=True)
    with Made(OUT * IN) as made:
        net.apply(leaves, x).square().sum().backward()
    assert all(t.grad is not None for leaf in leaves.values() for t in leaf.values())
    assert bool(made.seen) == (dense(method) is not None), made.seen or dense(method)


def test_the_count_sees_a_dense_weight() -> None:
    """A method without a `linear` of its own makes one: a count that finds none there would prove nothing."""
    net = pf.adapt(nn.Linear(IN, OUT), {"weight": pf.LoHa(8, weight_decompose=True)})
    with Made(OUT * IN) as made:
        net.apply(net.init(), torch.randn(ROWS, IN))
    assert made.seen
