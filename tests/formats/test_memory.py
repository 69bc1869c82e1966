"""PEFT's tensors in memory: what its own functions return is read, and what is written they take."""

import copy
from typing import Any

import peft
import pytest
import torch
from models import by_name, tokens
from support import random, randomised
from torch import nn

import peftfn as pf

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
CONFIGS: dict[str, peft.PeftConfig] = {
    "LoRA": peft.LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=3, modules_to_save=["lm_head"]),
    "patterns": peft.LoraConfig(target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, use_dora=True),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"], r=4),
    "LoHa": peft.LoHaConfig(target_modules=r".*\.q_proj", r=2),
}


def llama() -> nn.Module:
    return by_name["llama"].build()


@pytest.mark.parametrize("as_dict", [False, True], ids=["PeftConfig", "dict"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_has_in_memory(name: str, as_dict: bool) -> None:
    config = copy.deepcopy(CONFIGS[name])
    theirs = randomised(peft.get_peft_model(llama(), config))
    given: Any = peft.get_peft_model_state_dict(theirs)
    net, a = pf.from_state_dict(llama(), given, theirs.peft_config["default"].to_dict() if as_dict else config)
    torch.testing.assert_close(net.apply(a, tokens(2)).logits, theirs(tokens(2)).logits, atol=1e-5, rtol=1e-4)
    mine = {t.data_ptr() for leaf in a.values() for t in leaf.values()}
    assert not mine & {t.data_ptr() for t in given.values()}, "they are copies"


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_takes_what_is_returned(name: str) -> None:
    theirs = randomised(peft.get_peft_model(llama(), copy.deepcopy(CONFIGS[name])))
    net, _ = pf.from_state_dict(llama(), peft.get_peft_model_state_dict(theirs), theirs.peft_config["default"])
    a = random(net, seed=5)
    tensors, config = pf.state_dict(net, a)
    fresh = peft.get_peft_model(llama(), peft.PeftConfig.from_peft_type(**config)).eval()
    unexpected = peft.set_peft_model_state_dict(fresh, tensors).unexpected_keys
    assert not unexpected
    torch.testing.assert_close(net.apply(a, tokens(2)).logits, fresh(tokens(2)).logits, atol=1e-5, rtol=1e-4)


RAW: dict[str, peft.PeftConfig] = {
    "patterns": CONFIGS["patterns"],
    "a group's name, then the adapter's": peft.FrodConfig(target_modules=["q_proj", "v_proj"]),
    "what all share is at each layer too": peft.TinyLoraConfig(target_modules=["q_proj", "v_proj"], r=2, u=3),
    "a buffer of a constant": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=1),
    "several options": peft.VBLoRAConfig(target_modules=["q_proj"], r=2, num_vectors=6, vector_length=4, topk=2),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "with the base"])
@pytest.mark.parametrize("name", RAW)
def test_a_raw_state_with_the_adapters_name_in_its_keys(name: str, whole: bool) -> None:
    theirs = randomised(peft.get_peft_model(llama(), copy.deepcopy(RAW[name])))
    raw = {k: t for k, t in theirs.state_dict().items() if whole or ".default" in k}
    net, a = pf.from_state_dict(llama(), raw, RAW[name])
    torch.testing.assert_close(net.apply(a, tokens(2)).logits, theirs(tokens(2)).logits, atol=1e-5, rtol=1e-4)


def test_copies_of_what_all_share_are_compared_and_a_constant_too() -> None:
    for name, part, message in (
        ("what all share is at each layer too", ".v_proj.tinylora_v.default.0", "which all layers share"),
        ("a buffer of a constant", ".ranknum.default", "is not init_r, 12"),
    ):
        raw = peft.get_peft_model(llama(), copy.deepcopy(RAW[name])).state_dict()
        odd = next(k for k in raw if k.endswith(part))
        with pytest.raises(ValueError, match=message):
            pf.from_state_dict(llama(), {**raw, odd: raw[odd] + 1}, RAW[name])


def test_wrong_arguments() -> None:
    model = llama()
    net = pf.adapt(model, {"q_proj": pf.LoRA(2)})
    tensors, config = pf.state_dict(net, net.init())
    with pytest.raises(TypeError, match=r"takes \(model, tensors, config\), not \(dict, LlamaForCausalLM"):
        pf.from_state_dict(tensors, model, config)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="config is a str; give a PeftConfig or a dict"):
        pf.from_state_dict(model, tensors, "LORA")
    with pytest.raises(TypeError, match="is not a plain tensor"):
        pf.from_state_dict(model, {k: t.numpy() for k, t in tensors.items()}, config)  # type: ignore[misc]
    first = min(tensors)
    with pytest.raises(ValueError, match=rf"\(state dict\): lacks 1 tensors: '{first}'"):
        pf.from_state_dict(model, {k: t for k, t in tensors.items() if k != first}, config)
    assert pf.from_state_dict(model, {k: t for k, t in tensors.items() if k != first}, config, strict=False).missing
    both = pf.adapt(model, {"q_proj": pf.LoRA(2), "v_proj": pf.IA3()})
    with pytest.raises(ValueError, match="one method in a folder"):
        pf.state_dict(both, both.init())
