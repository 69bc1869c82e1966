"""The marks of a base in native files."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models import by_name
from torch import nn

import peftfn as pf
from peftfn.formats.bases import mark

BASE = by_name["llama"].build().eval()
RULES: dict[str, pf.Method] = {"q_proj": pf.LoRA(rank=2), "embed_tokens": pf.LoRA(rank=2), "norm": pf.Full()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    net = pf.adapt(BASE, RULES)
    pf.save(tmp_path, net, net.init())
    return tmp_path


def tuned(by: float) -> Any:
    model = copy.deepcopy(BASE)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(by)
    return model


def test_the_same_base_loads_in_any_wide_dtype(saved: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        net, _ = pf.load(saved, copy.deepcopy(BASE).to(dtype), base="same")
        assert net.plan.keys() == pf.adapt(BASE, RULES).plan.keys()


def test_another_base_is_an_error_that_names_the_site_and_both(saved: Path) -> None:
    model = tuned(1.05)
    model.name_or_path = "owner/tuned"
    with pytest.raises(ValueError, match=r"made on another base: model\.layers\.1\.self_attn\.q_proj\.weight has") as e:
        pf.load(saved, model, base="same")
    assert "owner/tuned" in str(e.value) and str(saved) in str(e.value) and "base='any'" in str(e.value)
    with pytest.raises(ValueError, match="made on another base"):
        pf.load(saved, model)
    net, a = pf.load(saved, model, base="any")  # on purpose
    bank = pf.Bank([net], capacity=1)
    with pytest.raises(ValueError, match="made on another base"):  # a bank is as strict as load
        bank.put("a", net, saved)
    bank.put("a", net, a)


def test_what_has_no_values_here_is_not_compared(saved: Path) -> None:
    pf.load(saved, copy.deepcopy(BASE).to("meta"), base="same")
    pf.load(saved, tuned(1.05).to(torch.float16), base="same")  # fp16 loses the smallest values
    config = json.loads((saved / "peftfn.json").read_text())
    del config["base"]  # as earlier versions wrote it
    (saved / "peftfn.json").write_text(json.dumps(config))
    pf.load(saved, tuned(1.05), base="same")


@pytest.mark.parametrize("wrong", [3, [], {"q_proj": "x"}, {"model.norm.weight": 3}])
def test_marks_that_are_none_are_errors(wrong: Any, saved: Path) -> None:
    config = json.loads((saved / "peftfn.json").read_text())
    (saved / "peftfn.json").write_text(json.dumps({**config, "base": wrong}))
    with pytest.raises(ValueError, match=r"base is .*; it must have the marks of sites"):
        pf.load(saved, BASE)


def test_other_formats_have_no_marks(tmp_path: Path) -> None:
    net = pf.adapt(BASE, {"q_proj": pf.LoRA(rank=2)})
    pf.save(tmp_path, net, net.init(), format="peft")
    with pytest.raises(ValueError, match="base='same' needs the marks of a native file"):
        pf.load(tmp_path, BASE, base="same")
    with pytest.raises(ValueError, match="base is 'other'; give 'any' or 'same'"):
        pf.load(tmp_path, BASE, base="other")  # type: ignore[arg-type]


def test_a_mark_is_of_values_alone() -> None:
    w = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    assert mark(w) == mark(nn.Parameter(w.clone())) == mark(w.mT.contiguous().mT) == mark(w.bfloat16()) != mark(w + 1)
    assert mark(torch.zeros(())) and mark(torch.zeros(3)) and mark(torch.zeros(0)) == mark(torch.zeros(3).int()) == ""
    assert mark(torch.zeros(1).expand(4, 5)) == ""
    assert mark(object()) == mark(torch.zeros(3, device="meta")) == ""
