"""PEFT's prompts, prefixes and LLaMA-Adapters, both ways: what either writes, the other runs alike."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from support import random
from torch import Tensor

import peftfn as pf

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [4, 4, 9, 2, 7, 3], [9, 8, 7, 6, 5, 4]])
ONES = torch.ones_like(IDS)
END: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 32,
}
T5: dict[str, Any] = {"d_model": 16, "d_ff": 24, "num_layers": 3, "num_heads": 2, "d_kv": 8, "vocab_size": 32}
MODELS: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=2, **SIZE, **END)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=3, n_head=4, vocab_size=32, **END)),
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZE)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(max_position_embeddings=40, **SIZE)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(decoder_start_token_id=0, **T5)),
}
TASK = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "roberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
CONTEXT: dict[str, Any] = {"cpt_token_ids": [4, 9, 2], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 4]}


@cache
def model(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def config(kind: str, name: str) -> Any:
    n: Any = {"num_virtual_tokens": 3, "task_type": TASK[name]}
    made: dict[str, Any] = {
        "PROMPT_TUNING": lambda: peft.PromptTuningConfig(**n),
        "P_TUNING": lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, **n),
        "P_TUNING LSTM": lambda: peft.PromptEncoderConfig(encoder_reparameterization_type="LSTM", **n),
        "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(**n),
        "PREFIX_TUNING projected": lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **n),
        "CARTRIDGE": lambda: peft.CartridgeConfig(**n),
        "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(num_tasks=3, num_ranks=2, **n),
        "CPT": lambda: peft.CPTConfig(task_type="CAUSAL_LM", opt_projection_epsilon=2.0, **CONTEXT),
        "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
    }
    return made[kind]()


def theirs(kind: str, name: str, folder: Path) -> Any:
    torch.manual_seed(1)
    made = peft.get_peft_model(copy.deepcopy(model(name)), config(kind, name)).eval()
    with torch.no_grad():
        for k, p in made.named_parameters():
            if p.requires_grad:
                p.copy_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(k))))
    made.save_pretrained(folder)
    return made


def outputs(f: Any, name: str, **more: Any) -> Tensor:
    given: dict[str, Any] = {"input_ids": IDS, "attention_mask": ONES, **more}
    if name == "t5":
        given["decoder_input_ids"] = IDS[:, :3]
    with torch.no_grad():
        out: Tensor = f(**given).logits
    return out[:, -6:] if out.dim() == 3 else out


CASES = [
    *((kind, "llama") for kind in ("PROMPT_TUNING", "P_TUNING", "P_TUNING LSTM", "PREFIX_TUNING")),
    *((kind, "llama") for kind in ("PREFIX_TUNING projected", "CARTRIDGE", "CPT", "ADAPTION_PROMPT")),
    *((kind, "gpt2") for kind in ("PROMPT_TUNING", "PREFIX_TUNING", "CPT")),
    *(("PROMPT_TUNING", name) for name in ("bert", "roberta", "t5")),
    ("P_TUNING", "bert"),
    *(("PREFIX_TUNING", name) for name in ("bert", "roberta", "t5")),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_what_peft_writes_runs_alike(kind: str, name: str, tmp_path: Path) -> None:
    made = theirs(kind, name, tmp_path)
    net, a = pf.load(tmp_path, model(name))
    want = outputs(made, name)
    got = outputs(lambda **given: net.apply(a, **given), name)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (outputs(model(name), name) - want).abs().max() > 1e-3
    if TASK[name] == "CAUSAL_LM":
        more: Any = {"input_ids": IDS, "attention_mask": ONES, "max_new_tokens": 3, "do_sample": False, **END}
        assert torch.equal(net.apply(a, method="generate", **more), made.generate(**more))


@pytest.mark.parametrize(("kind", "name"), [c for c in CASES if c != ("PREFIX_TUNING", "t5")])
def test_what_we_write_peft_runs_alike(kind: str, name: str, tmp_path: Path) -> None:
    theirs(kind, name, tmp_path / "theirs")
    loaded = pf.load(tmp_path / "theirs", model(name))
    net, a = loaded
    pf.save(tmp_path / "ours", net, a, format="peft", extra=loaded.extra)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model(name)), tmp_path / "ours").eval()
    want = outputs(lambda **given: net.apply(a, **given), name)
    torch.testing.assert_close(outputs(back, name), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rules",
    [{"model": pf.PTuning(n=3, hidden=4)}, {"model": pf.PrefixTuning(n=2, hidden=4)}, {"model": pf.Cartridge(n=4)}],
    ids=lambda r: str(r["model"]),
)
def test_what_was_trained_here_peft_runs_alike(rules: Any, tmp_path: Path) -> None:
    net = pf.adapt(model("llama"), rules)
    a = random(net, scale=0.5)
    pf.save(tmp_path, net, a, format="peft", extra={"task_type": "CAUSAL_LM"})
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model("llama")), tmp_path).eval()
    want = outputs(lambda **given: net.apply(a, **given), "llama")
    torch.testing.assert_close(outputs(back, "llama"), want, rtol=1e-4, atol=1e-5)
    again, b = pf.load(tmp_path, model("llama"))
    torch.testing.assert_close(outputs(lambda **given: again.apply(b, **given), "llama"), want)


def test_a_file_of_tasks_is_a_stack_both_ways(tmp_path: Path) -> None:
    made = theirs("MULTITASK_PROMPT_TUNING", "llama", tmp_path / "theirs")
    loaded = pf.load(tmp_path / "theirs", model("llama"))
    net, tasks = loaded
    index = torch.tensor([2, 0, 1])
    want = outputs(made, "llama", task_ids=index)
    got = outputs(lambda **given: net.mixed(tasks, index, **given), "llama")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    pf.save(tmp_path / "ours", net, tasks, format="peft", extra=loaded.extra, tasks=True)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(model("llama")), tmp_path / "ours").eval()
    torch.testing.assert_close(outputs(back, "llama", task_ids=index), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("submodules", [1, 2])
def test_multitask_prompts_of_an_encoder_and_a_decoder(submodules: int, tmp_path: Path) -> None:
    """The second half of the table is the decoder's in a forward with labels, and in PEFT not in `generate`."""
    torch.manual_seed(1)
    base: Any = model("t5")
    given: dict[str, Any] = {"num_tasks": 3, "num_ranks": 2, "num_virtual_tokens": 3, "task_type": "SEQ_2_SEQ_LM"}
    made: Any = peft.get_peft_model(
        copy.deepcopy(base), peft.MultitaskPromptTuningConfig(num_transformer_submodules=submodules, **given)
    ).eval()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.5 * torch.randn_like(p) if p.requires_grad else 0
    made.save_pretrained(tmp_path / "theirs")
    loaded = pf.load(tmp_path / "theirs", base)
    net, tasks = loaded
    assert list(net.plan) == ["encoder", "decoder"][:submodules]
    index, labels = torch.tensor([2, 0, 1]), IDS[:, :4].contiguous()
    tasks = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in tasks.items()}
    kwargs: dict[str, Any] = {"input_ids": IDS, "attention_mask": ONES, "labels": labels}
    got, want = net.mixed(tasks, index, **kwargs), made(task_ids=index, **kwargs) if submodules == 2 else None
    if want is not None:  # with one, PEFT's forward hands no tokens to the decoder but those of the labels
        torch.testing.assert_close(got.logits, want.logits[:, 3:], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.loss, want.loss)
        got.loss.backward()
        want.loss.backward()
        peft_rows = made.prompt_encoder["default"].prefix_task_rows.grad
        torch.testing.assert_close(tasks["encoder"]["rows"].grad + tasks["decoder"]["rows"].grad, peft_rows)
        without = net.mixed({**tasks, "decoder": {k: 0 * t for k, t in tasks["decoder"].items()}}, index, **kwargs)
        assert (without.logits - got.logits).abs().max() > 1e-3
    encoder = pf.adapt(base, {"encoder": pf.MultitaskPrompt(3, rank=2)})
    alone = {"encoder": {k: t.detach() for k, t in tasks["encoder"].items()}}
    options: Any = {"max_new_tokens": 4, "do_sample": False, "input_ids": IDS, "attention_mask": ONES}
    ids = made.generate(task_ids=index, **options)
    assert torch.equal(encoder.mixed(alone, index, method="generate", **options), ids)
    tasks = {n: {k: t.detach() for k, t in leaf.items()} for n, leaf in tasks.items()}
    pf.save(tmp_path / "ours", net, tasks, format="peft", extra=loaded.extra, tasks=True)
    again = pf.load(tmp_path / "ours", base)
    assert torch.equal(again.net.mixed(again.adapter, index, **kwargs).logits, got.logits)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    assert torch.equal(back.generate(task_ids=index, **options), ids)
    if submodules == 2:
        tasks["decoder"]["rows"] = tasks["decoder"]["rows"] + 1
        with pytest.raises(ValueError, match="encoder and decoder share the rows of a task"):
            pf.save(tmp_path / "no", net, tasks, format="peft", extra=loaded.extra, tasks=True)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ({"num_virtual_tokens": 5}, r"prompt_embeddings has shape \[3, 16\], and the model needs \[5, 16\]"),
        ({"soft_prompt_scale": 2.0}, "soft_prompt_scale is 2.0, which peftfn does not know for PROMPT_TUNING"),
    ],
)
def test_what_a_file_says_is_used_or_refused(change: Any, text: str, tmp_path: Path) -> None:
    theirs("PROMPT_TUNING", "llama", tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=text):
        pf.load(tmp_path, model("llama"))


def test_other_models_and_nets_are_told_what_does_not_fit(tmp_path: Path) -> None:
    theirs("PROMPT_TUNING", "llama", tmp_path)
    with pytest.raises(ValueError, match=r"a prompt goes to one backbone, and the model has none"):
        pf.load(tmp_path, torch.nn.Sequential(torch.nn.Linear(3, 3)))
    for rules, text in (
        ({"model": pf.PromptTuning(n=2), "q_proj": pf.LoRA(rank=2)}, "one type a file"),
        ({"mlp": pf.Bottleneck(2)}, "PEFT has no form for Bottleneck"),
        ({r"layers\.0\.self_attn": pf.LlamaAdapter(n=2)}, "adapts the last layers"),
    ):
        net = pf.adapt(model("llama"), rules)
        with pytest.raises(ValueError, match=text):
            pf.save(tmp_path / "no", net, net.init(), format="peft")
    net = pf.adapt(model("t5"), {"decoder": pf.PrefixTuning(n=2)})
    with pytest.raises(ValueError, match="repeats half of its table"):
        pf.save(tmp_path / "no", net, net.init(), format="peft")
