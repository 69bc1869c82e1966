"""conform: what fits a wider plan does there exactly what it did, and what does not is an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import by_name, noise, tokens
from support import close, random
from torch import nn

import peftfn as pf
from peftfn import IA3, AdaLoRA, DoRA, Full, HiRA, LoHa, LoRA, PiSSA, VeRA

PAIRS = [
    (LoRA(2, alpha=3.0), LoRA(5)),
    (LoRA(3, rslora=True, alpha=4.0), LoRA(3, alpha=1.0)),
    (LoRA(2, lora_bias=True), LoRA(4, alpha=1.0, lora_bias=True)),
    (DoRA(2), DoRA(6, alpha=9.0)),
    (AdaLoRA(3), AdaLoRA(8, alpha=2.0)),
    (HiRA(2), HiRA(4)),
    (LoHa(2, alpha=3.0), LoHa(3)),
]


@pytest.mark.parametrize(("small", "wide"), PAIRS, ids=str)
def test_a_wider_plan_with_more_sites(small: pf.Method, wide: pf.Method) -> None:
    model = by_name["llama"].build()
    bias = {"bias": True} if getattr(small, "lora_bias", False) else {}
    if bias:
        model = by_name["gpt2"].build()
    few, all_ = (r"h\.0\.attn\.c_attn", r"c_attn|c_fc") if bias else ("q_proj", "q_proj|v_proj|up_proj")
    net = pf.adapt(model, {few: small})
    to = pf.adapt(model, {all_: wide, r"norm|ln_": Full()})
    a, x = random(net, 1), tokens(2)
    b = pf.conform(a, net, to)
    to.plan.check(b)
    close(to.apply(b, x).logits, net.apply(a, x).logits)
    mixed = to.mixed(pf.stack([b, random(to, 2)]), [0, 1], x).logits
    close(mixed[:1], net.apply(a, x[:1]).logits)
    again = pf.conform(b, to, to)
    assert all(again[n][k] is b[n][k] for n in b for k in b[n])


def test_the_same_plan_keeps_its_very_tensors() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    net = pf.adapt(model, {"weight": VeRA(2)}, seed=3)
    a = random(net)
    b = pf.conform(a, net, pf.adapt(model, {"weight": VeRA(2)}, seed=3))
    assert all(b[n][k] is t for n, leaf in a.items() for k, t in leaf.items())


def test_it_is_differentiable_and_runs_under_vmap() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6)), noise(3, 8)
    net, to = pf.adapt(model, {"weight": LoRA(2, alpha=5.0)}), pf.adapt(model, {"weight": LoRA(4)})
    a = random(net, 1)
    got = torch.func.grad(lambda a: to.apply(pf.conform(a, net, to), x).square().sum())(a)
    want = torch.func.grad(lambda a: net.apply(a, x).square().sum())(a)
    for k in ("a", "b"):
        close(got["0.weight"][k], want["0.weight"][k])
    many = pf.stack([a, random(net, 2)])
    stacked = torch.func.vmap(lambda a: pf.conform(a, net, to))(many)
    close(torch.func.vmap(to.apply, (0, None))(stacked, x), torch.func.vmap(net.apply, (0, None))(many, x))


def two() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))


BAD: dict[str, tuple[Callable[[nn.Module], tuple[Any, Any]], str]] = {
    "fewer sites": (lambda m: ({"weight": LoRA(2)}, {r"0\.weight": LoRA(2)}), r"1\.weight: .*does not adapt"),
    "smaller rank": (lambda m: ({"weight": LoRA(3)}, {"weight": LoRA(2)}), r"0\.weight: a .*\[3, 8\].*\[2, 8\].*rank"),
    "another method": (lambda m: ({"weight": LoRA(2)}, {"weight": DoRA(2)}), r"0\.weight: LoRA.*DoRA.*methods differ"),
    "no padding": (lambda m: ({"weight": IA3()}, {"weight": IA3(feedforward=True)}), r"0\.weight: IA3.*padding"),
    "another field": (
        lambda m: ({"weight": DoRA(2)}, {"weight": DoRA(4, attached=True)}),
        r"0\.weight: .*attached=False and True",
    ),
    "constants of a rank": (lambda m: ({"weight": PiSSA(2)}, {"weight": PiSSA(3)}), r"0\.weight: .*constants"),
    "a fresh leaf that changes the model": (
        lambda m: ({r"0\.weight": LoRA(2)}, {"weight": LoRA(2, init_weights="random")}),
        r"1\.weight: .*identity",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_be_exact_is_an_error(what: str) -> None:
    model = two()
    few, wide = (pf.adapt(model, rules) for rules in BAD[what][0](model))
    with pytest.raises(ValueError, match=BAD[what][1]):
        pf.conform(random(few), few, wide)


def test_sums_and_scalings_conform_term_by_term() -> None:
    model = two()
    net, to = pf.adapt(model, {"weight": LoRA(2, alpha=7.0)}), pf.adapt(model, {"weight": LoRA(3)})
    a, x = pf.add(pf.scale(random(net, 1), 2.0), random(net, 2)), noise(3, 8)
    close(to.apply(pf.conform(a, net, to), x), net.apply(a, x))


def test_other_seeds_other_sizes_and_prepared_leaves_are_errors() -> None:
    model, other = two(), nn.Sequential(nn.Linear(8, 7), nn.Linear(7, 4))
    a, b = (pf.adapt(model, {"weight": VeRA(2, projection_seed=seed)}, seed=0) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"0\.weight: .*constants of .* differ.*seed"):
        pf.conform(random(a), a, b)
    net, to = pf.adapt(model, {"weight": LoRA(2)}), pf.adapt(other, {"weight": LoRA(2)})
    with pytest.raises(ValueError, match=r"0\.weight: .*\[6, 8\] in net_from's model.*\[7, 8\] in net_to's"):
        pf.conform(random(net), net, to)
    dora, wide = (pf.adapt(model, {"weight": DoRA(r)}) for r in (2, 3))
    with pytest.raises(ValueError, match=r"0\.weight: .*before"):
        pf.conform(dora.prepare(random(dora)), dora, wide)
    with pytest.raises(KeyError, match=r"1\.weight"):
        pf.conform({"0.weight": random(net)["0.weight"]}, net, net)
    with pytest.raises(TypeError, match=r"conform: give two nets.*Sequential"):
        pf.conform(random(net), net, model)  # type: ignore[arg-type]
