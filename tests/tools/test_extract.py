"""pf.extract, and intruder dimensions."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import by_name, tokens
from peft.tuners.lora.intruders import reduce_intruder_dimension
from support import random
from torch import nn

import peftfn as pf
from peftfn.testing import MODELS, Case, close

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore:`is_gradient_checkpointing`")


def tuned(model: nn.Module, size: float = 0.1, seed: int = 0) -> nn.Module:
    """A copy, each parameter moved."""
    g, out = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for p in out.parameters():
            p.add_(size * torch.randn(p.shape, generator=g))
    return out


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "tied"])
def test_the_whole_difference_is_there_at_full_energy(name: str) -> None:
    case = by_name[name]
    model = case.build()
    (args, kwargs), new = case.inputs(2), tuned(model)
    net, a = pf.extract(model, new, energy=1.0)
    close(case.output(net.apply(a, *args, **kwargs)), case.output(new(*args, **kwargs)).detach(), name, rtol=1e-3)
    assert any(type(e.method) is pf.LoRA for e in net.plan.values())
    assert all(type(e.method) is pf.Full for e in net.plan.values() if e.site.tied or e.site.kind == "other")


def test_a_merged_lora_is_found_again() -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj|down_proj": pf.LoRA(rank=2, alpha=5.0)})
    a = random(net)
    found, b = pf.extract(model, net.merge(a), energy=1 - 1e-6)
    assert found.plan.keys() == net.plan.keys() and {e.method.rank for e in found.plan.values()} == {2}
    for site, delta in net.delta(a).items():
        close(found.delta(b)[site], delta, site, rtol=1e-4)


def test_a_rank_is_the_nearest_and_a_pattern_chooses() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))
    new = tuned(model)
    net, a = pf.extract(model, new, rank=4, pattern="0")
    assert net.plan["0.weight"].method == pf.LoRA(rank=4) and type(net.plan["1.weight"].method) is pf.Full
    net, a = pf.extract(model, dict(new.named_parameters()), rank=4)
    assert net.plan["1.weight"].method == pf.LoRA(rank=3)
    u, s, vh = torch.linalg.svd((new[0].weight - model[0].weight).detach(), full_matrices=False)
    close(net.delta(a)["0.weight"], u[:, :4] * s[:4] @ vh[:4], "nearest")


def test_bad_input_of_extract() -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    new = dict(tuned(model).named_parameters())
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: pf.extract(model, new), "exactly one"),
        (lambda: pf.extract(model, new, rank=0), r"0\.weight: rank is 0"),
        (lambda: pf.extract(model, new, energy=2.0), "0 < energy"),
        (lambda: pf.extract(model, new, rank=1, pattern="("), r"'\(' is not a valid regular expression"),
        (lambda: pf.extract(model, {}, rank=1), r"0\.weight is \[6, 8\] in the base, and missing"),
        (lambda: pf.extract(model, nn.Sequential(nn.Linear(4, 6)), rank=1), r"and \[6, 4\] in the fine-tune"),
        (lambda: pf.extract(model, copy.deepcopy(model), rank=1), "are the same"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()


# Intruder dimensions.


def test_intruders_are_what_the_paper_counts() -> None:
    """A large direction that W does not have is one; a scaled direction of W is none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30, bias=False))
    net = pf.adapt(model, {"0.weight": pf.LoRA(rank=1)})
    u, _, vh = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    own = {"0.weight": {"a": vh[:1], "b": 5 * u[:, :1]}}
    assert pf.intruders(net, own) == {"0.weight": 0}
    mixed = u.sum(-1, keepdim=True) / 30**0.5
    foreign = {"0.weight": {"a": torch.randn(1, 40) / 6, "b": 50 * mixed}}
    assert pf.intruders(net, foreign)["0.weight"] == 1
    assert pf.intruders(net, foreign, epsilon=0.05)["0.weight"] == 0
    out, b = pf.reduce_intruders(net, foreign, keep=0.5)
    first, after = net.delta(foreign)["0.weight"], out.delta(b)["0.weight"]
    assert 0.45 < float(after.norm() / first.norm()) < 0.55
    same, c = pf.reduce_intruders(net, own)
    assert torch.equal(same.delta(c)["0.weight"], net.delta(own)["0.weight"])


def test_reducing_is_pefts(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(by_name["llama"].build(), config)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            if "lora_" in n:
                p.copy_(torch.randn(p.shape, generator=g) * 0.7)
    theirs.save_pretrained(tmp_path)
    net, a = pf.load(tmp_path, by_name["llama"].build())
    found = pf.intruders(net, a, epsilon=0.7)
    assert sum(found.values()) > 0
    reduce_intruder_dimension(theirs, threshold_epsilon=0.7, logging_sink=None)
    out, b = pf.reduce_intruders(net, a, epsilon=0.7)
    x = tokens(2)
    close(out.apply(b, x).logits, theirs.eval()(x).logits.detach(), "PEFT's", rtol=1e-3)


def test_intruders_at_every_kind_and_bad_input() -> None:
    for kind in MODELS:
        if kind == "other":
            continue
        c = Case(pf.LoRA(rank=2), kind)
        out, b = pf.reduce_intruders(c.net, pf.scale(c.adapter(), 20.0), epsilon=0.95)
        assert out.apply(b, c.x).isfinite().all() and pf.intruders(c.net, c.adapter()).keys() == c.net.plan.keys()
    c, d = Case(pf.LoRA(rank=2)), Case(pf.LoHa(rank=2))
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: pf.intruders(c.net, c.adapter(), top=0), "top is 0"),
        (lambda: pf.intruders(c.net, c.adapter(), epsilon=0.0), "epsilon is 0.0"),
        (lambda: pf.reduce_intruders(c.net, c.adapter(), keep=2.0), "keep is 2.0"),
        (lambda: pf.reduce_intruders(d.net, d.adapter()), r"layer\.weight: LoHa.*give rank="),
        (lambda: pf.reduce_intruders(d.net, d.adapter(), rank=9), r"layer\.weight: rank is 9"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()
