"""to_lora: exact where it can be, the best approximation elsewhere, and its bad input."""

import pytest
import torch

import peftfn as pf
from peftfn.testing import MODELS, Case, close

SITE = "layer.weight"


@pytest.mark.parametrize("model", [n for n, m in MODELS.items() if n != "other"])
@pytest.mark.parametrize("method", [pf.LoRA(rank=2), pf.IA3(), pf.DoRA(rank=2), pf.LoHa(rank=2)], ids=str)
def test_full_rank_is_exact(method: pf.Method, model: str) -> None:
    c = Case(method, model)
    net, a = pf.to_lora(c.net, c.adapter(), rank=6)
    assert {type(e.method) for e in net.plan.values()} == {pf.LoRA}
    close(net.apply(a, c.x), c.net.apply(c.adapter(), c.x), "converted")


def test_the_rank_of_a_lora_is_enough() -> None:
    c = Case(pf.LoRA(rank=2, alpha=5.0))
    net, a = pf.to_lora(c.net, c.adapter(), energy=1.0)
    assert net.plan[SITE].method.rank == 2
    close(net.apply(a, c.x), c.net.apply(c.adapter(), c.x), "converted")


@pytest.mark.parametrize("model", [n for n, m in MODELS.items() if n != "other"])
@pytest.mark.parametrize("method", [pf.LoRA(rank=2, alpha=3.0), pf.PiSSA(rank=2), pf.OLoRA(rank=2)], ids=str)
def test_methods_with_factors_convert_exactly(method: pf.Method, model: str) -> None:
    c = Case(method, model)
    net, a = pf.to_lora(c.net, c.adapter())
    assert next(iter(net.plan.values())).method.rank == (2 if isinstance(method, pf.LoRA) else 4)
    close(net.apply(a, c.x), c.net.apply(c.adapter(), c.x), "converted")


def test_a_method_without_factors_needs_a_rank() -> None:
    c = Case(pf.DoRA(rank=2))
    with pytest.raises(ValueError, match=r"layer\.weight.*no factors.*rank=.*energy=1\.0"):
        pf.to_lora(c.net, c.adapter())


def test_energy_is_the_share_kept() -> None:
    c = Case(pf.Full())
    delta = c.net.delta(c.adapter())[SITE]
    for energy in (0.5, 0.9):
        net, a = pf.to_lora(c.net, c.adapter(), energy=energy)
        left = (net.delta(a)[SITE] - delta).square().sum() / delta.square().sum()
        assert 0 < left <= 1 - energy


def test_no_change_is_a_lora_of_rank_one() -> None:
    c = Case(pf.LoRA(rank=2))
    net, a = pf.to_lora(c.net, c.net.init(), energy=0.9)
    assert net.plan[SITE].method.rank == 1
    assert not net.delta(a)[SITE].any()


def test_what_is_no_matrix_stays_full() -> None:
    c = Case(pf.Full(), "other")
    net, a = pf.to_lora(c.net, c.adapter(), rank=1)
    assert torch.equal(net.apply(a, c.x), c.net.apply(c.adapter(), c.x))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 2, "energy": 0.5}, "at most one"),
        ({"rank": 7}, "layer.weight"),
        ({"rank": 0}, "layer.weight"),
        ({"energy": 1.5}, "0 < energy"),
    ],
)
def test_bad_input(options: dict[str, float], says: str) -> None:
    c = Case(pf.LoRA(rank=2))
    with pytest.raises(ValueError, match=says):
        pf.to_lora(c.net, c.adapter(), **options)
