"""pf.merge_report and pf.verify: their figures are those of the models they are about, and what they find wrong."""

import json
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from models import by_name, tokens
from support import FIRST, random, same_state, state
from torch import Tensor, nn
from torch.func import functional_call

import peftfn as pf
from peftfn.testing import Case

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore:`is_gradient_checkpointing`")
RULES = {"q_proj": pf.LoRA(rank=2), "v_proj": pf.DoRA(rank=2), "norm": pf.Full()}


@pytest.mark.parametrize("method", [m for m in FIRST if m.mergeable], ids=str)
def test_the_report_is_about_what_merging_does(method: pf.Method) -> None:
    c = Case(method, dtype=torch.bfloat16)
    a = c.adapter()
    (site,) = pf.merge_report(c.net, a)
    w, delta = c.net.weights[site.name].float(), c.net.delta(a)[site.name]
    got = c.net.merge(a)[site.name].float() - w
    assert site.dtype == "bfloat16"
    assert site.size == pytest.approx(float(delta.norm() / w.norm()), rel=1e-4)
    if delta.any():
        assert site.lost == pytest.approx(float((got - delta).norm() / delta.norm()), rel=1e-2, abs=1e-4)
        stays = ((delta != 0) & (got == 0)).sum() / (delta != 0).sum()
        assert site.stays == pytest.approx(float(stays), abs=1e-6)
    else:
        assert site.lost == site.stays == 0


def test_less_is_lost_in_a_wider_dtype() -> None:
    c = Case(pf.LoRA(rank=2))
    a = pf.scale(c.adapter(), 1e-3)
    lost = [pf.merge_report(c.net, a, d)[0].lost for d in (torch.bfloat16, torch.float16, torch.float32)]
    assert lost[0] > lost[1] > lost[2] < 1e-3
    assert pf.merge_report(c.net, a, torch.bfloat16)[0].stays > 0.5
    text = str(pf.merge_report(c.net, a, torch.bfloat16))
    assert "layer.weight  bfloat16" in text and "%" in text
    json.dumps(pf.merge_report(c.net, a).json())


def test_the_figures_of_a_good_adapter() -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, RULES)
    a, x, before = random(net), tokens(2), state(model)
    found = pf.verify(net, a, {"input_ids": x})
    assert found.ok, found
    assert same_state(before, state(model))
    y0, y = (model(x).logits.detach(), net.apply(a, x).logits.detach())
    assert found.effect == pytest.approx(float((y - y0).norm() / y0.norm()), rel=1e-4)
    assert found.differs["merged"] < 1e-3
    name = "model.layers.1.self_attn.v_proj.weight"
    site = next(s for s in found.sites if s.name == name)
    gone = net.apply(dict(a) | pf.scale({name: a[name]}, 0.0), x).logits.detach()
    assert site.effect == pytest.approx(float((y - gone).norm() / y0.norm()), rel=1e-3)
    assert site.merged is not None and site.merged.size > 0
    assert found.json()["ok"] and json.dumps(found.json())
    assert "no problems" in str(found)


def test_other_software_is_compared_by_the_adapters_effect() -> None:
    model, x = by_name["llama"].build(), tokens(2)
    net = pf.adapt(model, {"q_proj": pf.LoRA(rank=2)})
    a = random(net)
    theirs = peft.get_peft_model(
        by_name["llama"].build(), peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"])
    )
    named = dict(theirs.named_parameters())
    with torch.no_grad():
        for site, leaf in a.items():
            for k in "ab":
                part = site.removesuffix(".weight")
                named[f"base_model.model.{part}.lora_{k.upper()}.default.weight"].copy_(leaf[k])
    with torch.no_grad():
        found = pf.verify(net, a, x, others={"PEFT": theirs.eval()(x), "the base": model(x)})
    assert found.differs["PEFT"] < 1e-3 and found.differs["the base"] == pytest.approx(1, rel=1e-3)
    assert found.problems == ("the base differs from apply by 1e+02 % of the adapter's effect, more than 5 %",)


class Skips(nn.Module):
    """It has a layer that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_what_it_finds_wrong() -> None:
    model, x = Skips().eval(), torch.randn(3, 8)
    net = pf.adapt(model, {"weight": pf.LoRA(rank=2)})
    assert "does not change the output" in str(pf.verify(net, net.init(), x))
    assert pf.verify(net, random(net), x).problems == (
        "the change has no effect on this output at 1 of 2 sites, unused.weight first",
    )
    a = random(net)
    a["used.weight"]["a"][0, 0] = float("nan")
    assert any("used.weight: the adapter has values that are not finite" in p for p in pf.verify(net, a, x).problems)
    a = random(net)
    a["unused.weight"]["b"].zero_()
    assert pf.verify(net, a, x).problems == ("the change is zero at 1 of 2 sites, unused.weight first",)
    half = Skips().eval().bfloat16()
    small = pf.adapt(half, {"used.weight": pf.LoRA(rank=2)})
    tiny = pf.scale(random(small), 1e-3)
    found = pf.verify(small, tiny, x.bfloat16())
    assert any(p.startswith("merged differs from apply") for p in found.problems)
    assert found.sites[0].merged is not None and found.sites[0].merged.lost > 0.3


def test_what_cannot_be_merged_is_said_and_the_rest_is_checked() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8)).eval()
    x = torch.randn(3, 8)
    for rules in ({"0": pf.LoRA(rank=2, lora_bias=True)}, {"0": pf.LoRA(rank=2), "1.weight": pf.Lily(rank=2)}):
        net = pf.adapt(model, rules)
        found = pf.verify(net, random(net), x)
        assert "merged" not in found.differs and found.effect > 0
        assert len(found.problems) == 1 and found.problems[0].startswith("it cannot be merged: ")


def test_batches_and_bad_input() -> None:
    model, x = Skips().eval(), torch.randn(3, 8)
    net = pf.adapt(model, {"used.weight": pf.LoRA(rank=2)})
    a = random(net)
    found = [pf.verify(net, a, batch) for batch in (x, (x,), [x], {"x": x})]
    assert len({f.effect for f in found}) == 1
    assert pf.verify(net, a, x, effects=False).sites[0].effect is None
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: pf.verify(net, a, x, others={"it": x[:2]}), ValueError, r"it returned \[2, 8\]"),
        (lambda: pf.verify(net, {}, x), KeyError, "lacks"),
    ]
    for call, kind, match in wrong:
        with pytest.raises(kind, match=match):
            call()
    model.train()
    with pytest.raises(ValueError, match=r"train mode.*eval\(\)"):
        pf.verify(net, a, x)


def test_functional_call_agrees_with_its_merged_model() -> None:
    model, x = Skips().eval(), torch.randn(3, 8)
    net = pf.adapt(model, {"used.weight": pf.DoRA(rank=2)})
    a = random(net)
    y = functional_call(model, net.merge(a), (x,))
    assert pf.verify(net, a, x, others={"by hand": y}).differs["by hand"] < 1e-5
