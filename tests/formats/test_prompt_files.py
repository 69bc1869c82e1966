"""Files of methods on inputs: what is written without a word about the task, and what PEFT's configurations say."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from support import random
from torch import nn

import peftfn as pf
from peftfn.formats.peft_inputs import KINDS

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids are not supported")
SIZE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"vocab_size": 32, "pad_token_id": 0}
T5: dict[str, Any] = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 32}
IDS = torch.tensor([[5, 6, 7, 8], [4, 4, 9, 2]])
MODELS: dict[str, Any] = {
    "CAUSAL_LM": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE)),
    "SEQ_CLS": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**SIZE)),
    "TOKEN_CLS": lambda: tf.BertForTokenClassification(tf.BertConfig(**SIZE)),
    "SEQ_2_SEQ_LM": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
    "FEATURE_EXTRACTION": lambda: tf.BertModel(tf.BertConfig(**SIZE)),
}


@pytest.mark.parametrize("task", MODELS)
def test_peft_puts_what_we_saved_in_front_of_its_inputs(task: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[task]().eval()
    rule = "encoder" if task == "SEQ_2_SEQ_LM" else ".*"
    net = pf.adapt(model, {rule: pf.PromptTuning(n=3)})
    a = random(net)
    pf.save(tmp_path, net, a, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    assert type(theirs).__name__ != "PeftModel"
    more = {"decoder_input_ids": IDS} if task == "SEQ_2_SEQ_LM" else {}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), **more}
    with torch.no_grad():
        want, got, plain = theirs(**inputs)[0], net.apply(a, **inputs)[0], model(**inputs)[0]
    want = want[:, -got.shape[1] :] if want.dim() == 3 else want  # without those of its virtual tokens
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-4)


def test_a_model_that_tells_no_task_is_asked_for_one(tmp_path: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = MODELS["FEATURE_EXTRACTION"]()

        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    net = pf.adapt(Own().eval(), {"inner": pf.PromptTuning(n=3)})
    with pytest.raises(ValueError, match=r"Own tells none: give extra=\{'task_type': 'CAUSAL_LM'\}"):
        pf.save(tmp_path, net, net.init(), format="peft")
    pf.save(tmp_path, net, net.init(), format="peft", extra={"task_type": "FEATURE_EXTRACTION"})
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"


CONFIGS: dict[str, Any] = {
    "PROMPT_TUNING": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "P_TUNING": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
    "PREFIX_TUNING": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="zero"),
    "CARTRIDGE": peft.CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "CPT": peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2]),
    "MULTITASK_PROMPT_TUNING": peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_pefts_configuration_is_known(kind: str, tmp_path: Path) -> None:
    """What PEFT writes loads whatever its fields say, so each must be read, or be known to change nothing."""
    torch.manual_seed(0)
    config, model = CONFIGS[kind], MODELS["CAUSAL_LM"]()
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(written | {f.name: written.get(f.name, getattr(config, f.name)) for f in dataclasses.fields(config)})
    )
    net, _ = pf.load(tmp_path, model)
    assert isinstance(next(iter(net.plan.values())).method, KINDS[kind].cls)


def test_a_conv1d_saved_whole_beside_a_prompt_keeps_its_orientation(tmp_path: Path) -> None:
    """GPT-2's layers hold weights [in, out]; that of attn.c_proj is square, so that no shape tells."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()
    net = pf.adapt(model, {"^transformer$": pf.PromptTuning(n=2), r"c_proj": pf.Full()})
    a = random(net, scale=0.5)
    pf.save(tmp_path, net, a, format="peft")
    want = net.apply(a, input_ids=IDS).logits
    again, b = pf.load(tmp_path, model)
    torch.testing.assert_close(again.apply(b, input_ids=IDS).logits, want)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(theirs(input_ids=IDS).logits[:, 2:], want, rtol=1e-4, atol=1e-5)


SAID: dict[str, tuple[dict[str, pf.Method], dict[str, Any], str]] = {
    "shadow, fewer": (
        {"model": pf.Shadow(rank=2)},
        {"target_modules": ["model.layers.0"]},
        "leaves out model.layers.1",
    ),
    "shadow, a layer": ({"model": pf.Shadow(rank=2)}, {"layers_to_transform": [0]}, "target_modules leaves out"),
    "adaption, more": ({"self_attn": pf.LlamaAdapter(2)}, {"adapter_layers": 3}, "adapter_layers is 3.*2 modules"),
    "adaption, others": ({"self_attn": pf.LlamaAdapter(2)}, {"target_modules": "mlp"}, "target_modules is 'mlp'"),
    "adaption, no number": ({"self_attn": pf.LlamaAdapter(2)}, {"adapter_len": True}, "adapter_len is True"),
    "cartridge": ({".*": pf.Cartridge(3)}, {"num_frozen_tokens": 3}, "Cartridge does not accept.*still is 3"),
    "prefix": ({".*": pf.PrefixTuning(3)}, {"prefix_projection": True, "encoder_hidden_size": "x"}, "hidden is 'x'"),
}
"""What a file has → another word in its configuration → the error."""


@pytest.mark.parametrize("name", SAID)
def test_a_configuration_that_says_other_modules_than_the_tensors_is_an_error(name: str, tmp_path: Path) -> None:
    rules, words, text = SAID[name]
    torch.manual_seed(0)
    net = pf.adapt(MODELS["CAUSAL_LM"]().eval(), rules)
    pf.save(tmp_path, net, random(net), format="peft")
    where = tmp_path / "adapter_config.json"
    config = json.loads(where.read_text())
    where.write_text(json.dumps(config | words))
    with pytest.raises(ValueError, match=rf"{where}.*{text}"):
        pf.load(tmp_path, net.model)
