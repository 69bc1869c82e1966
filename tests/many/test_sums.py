"""add: of several nets, each adapter means in the sum what it means alone, or there is an error."""

import pytest
import torch
from models import by_name, noise, tokens
from support import close, random
from torch import nn

import peftfn as pf
from peftfn import DoRA, Full, HiRA, LoHa, LoRA, VeRA

PAIRS = [
    (LoRA(5), LoRA(2, alpha=20.0)),
    (LoRA(3, alpha=1.0), LoRA(3, rslora=True, alpha=4.0)),
    (DoRA(6, alpha=9.0), DoRA(2)),
    (HiRA(4), HiRA(2)),
    (LoHa(3), LoHa(2, alpha=3.0)),
]


@pytest.mark.parametrize(("wide", "small"), PAIRS, ids=str)
def test_the_sum_of_two_nets_changes_a_weight_by_both_changes(wide: pf.Method, small: pf.Method) -> None:
    model = by_name["llama"].build()
    net, other = pf.adapt(model, {"q_proj|v_proj": wide, "norm": Full()}), pf.adapt(model, {"q_proj": small})
    a, b = random(net, 1), random(other, 2)
    total = pf.add((net, a), (other, b), (other, pf.scale(b, -0.5)))
    got, one, two = net.delta(total), net.delta(a), other.delta(b)
    for name, change in got.items():
        close(change, one[name] + 0.5 * two[name] if name in two else one[name])
    assert torch.isfinite(net.apply(total, tokens(2)).logits).all()


def test_of_one_net_pairs_and_trees_are_the_same() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"weight": VeRA(2)})
    a, b, x = random(net, 1), random(net, 2), noise(3, 8)
    assert torch.equal(net.apply(pf.add((net, a), (net, b)), x), net.apply(pf.add(a, b), x))
    again = pf.adapt(net.model, {"weight": VeRA(2)})  # an equal net
    assert torch.equal(net.apply(pf.add((net, a), (again, b)), x), net.apply(pf.add(a, b), x))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (HiRA(2), r"adapter 1 .*0\.weight.*the methods differ.*merging\.linear.*Nets"),  # leaves of the same shapes
        (LoRA(3), r"adapter 1 .*0\.weight.*larger rank"),
        (LoRA(2, lora_bias=True), "lora_bias"),
    ],
    ids=str,
)
def test_what_has_no_place_in_the_first_net_is_an_error(method: pf.Method, words: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8))
    net, other = pf.adapt(model, {"0.weight": LoRA(2)}), pf.adapt(model, {"0.weight": method})
    with pytest.raises(ValueError, match=words):
        pf.add((net, random(net)), (other, random(other)))
    elsewhere = pf.adapt(model, {"1.weight": LoRA(2)})
    with pytest.raises(ValueError, match=r"1\.weight.*does not adapt"):
        pf.add((net, random(net)), (elsewhere, random(elsewhere)))


def test_pairs_and_trees_do_not_mix() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"weight": LoRA(2)})
    a = random(net)
    with pytest.raises(TypeError, match=r"argument 1 is a dict; with pairs"):
        pf.add((net, a), a)
    with pytest.raises(TypeError, match=r"argument 0 is a tuple of 2"):
        pf.add((a, net), (net, a))
