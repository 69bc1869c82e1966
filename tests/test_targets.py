"""Targeting as PEFT users write it, against what the installed PEFT adapts."""

from typing import Any

import peft
import pytest
from models import by_name
from torch import nn

import peftfn as pf
from peftfn.targets import matched, targets

EXCLUDED = ["mlp.c_proj", "output.dense", "SelfAttention.q", "1.self_attn.k_proj", "attention.k_proj"]
LISTS = ["layers", "h", "layer", "block"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT's own calls into transformers


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-linear"},
        {"target_modules": r".*(q_proj|c_attn|query|q|dense)"},
        {"target_modules": ["q_proj", "c_attn", "query", "q", "o_proj", "dense"]},
        {"target_modules": ["q_proj", "c_proj", "dense", "wi"], "exclude_modules": r".*(attn|attention|SelfA).*"},
        {"target_modules": ["k_proj", "c_proj", "dense", "q"], "exclude_modules": EXCLUDED},
        {"target_modules": ["q_proj", "c_fc", "query", "wi"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "c_fc", "query", "wi"], "layers_to_transform": 0, "layers_pattern": LISTS},
    ],
    ids=str,
)  # fmt: skip
def test_the_modules_peft_adapts(name: str, options: dict[str, Any]) -> None:
    case = by_name[name]
    mine = matched(case.build(), *options.values()) if "layers_to_transform" not in options else matched(
        case.build(), options["target_modules"], None, options["layers_to_transform"], options.get("layers_pattern")
    )  # fmt: skip
    try:
        model = peft.get_peft_model(case.build(), peft.LoraConfig(r=1, fan_in_fan_out=name == "gpt2", **options))
    except ValueError:
        assert not mine
        return
    assert sorted(mine) == sorted(model.base_model.targeted_module_names)


def test_rules_of_patterns_and_parameters() -> None:
    model = by_name["mixtral"].build()
    rules = targets(
        model,
        pf.LoRA(2),
        ["q_proj", "k_proj"],
        parameters=["experts.gate_up_proj"],
        rank_pattern={"gate_up_proj": 3, r"^model\.layers\.0\.self_attn\.q_proj": 4},
        alpha_pattern={"k_proj": 7},
    )
    net = pf.adapt(model, rules)
    assert {n.split(".", 3)[3]: (e.method.rank, e.method.alpha) for n, e in net.plan.items()} == {
        "self_attn.q_proj.weight": (4, None),
        "self_attn.k_proj.weight": (2, 7),
        "mlp.experts.gate_up_proj": (3, None),
    }


def test_names_never_leak_into_longer_ones() -> None:
    model = nn.ModuleDict({n: nn.Linear(2, 2) for n in ("foo", "foobar", "barfoo", "foo_bar")})
    assert matched(model, ["foo"]) == ["foo"]
    assert list(pf.adapt(model, targets(model, pf.LoRA(1), ["foo"])).plan) == ["foo.weight"]


def test_all_linear_takes_modules_not_names() -> None:
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"baz": nn.Linear(2, 2)}), "conv": nn.ModuleDict({"baz": nn.Conv2d(2, 2, 1)})}
    )
    assert matched(model, "all-linear") == ["a.baz"]


def test_what_is_refused() -> None:
    model = by_name["llama"].build()
    with pytest.raises(ValueError, match=r"near: .*q_proj"):
        targets(model, pf.LoRA(1), ["q_prok"])
    with pytest.raises(ValueError, match="IA3 has no rank"):
        targets(model, pf.IA3(), ["q_proj"], rank_pattern={"q_proj": 3})
    with pytest.raises(ValueError, match="says the layers itself"):
        matched(model, ".*q_proj", layers=[1])
