"""QLoRA with transformers.Trainer: as_module of a model that transformers loaded in 4 or 8 bits."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import peftfn as pf
from peftfn import DoRA, Full, LoRA

with warnings.catch_warnings():  # of torch's own changes, when it is imported
    warnings.simplefilter("ignore")
    from torchao.quantization import Int8WeightOnlyConfig

RULES = {"q_proj|v_proj": LoRA(4), "up_proj": DoRA(2), "lm_head": LoRA(2), "norm": Full()}
BITS = {
    "nf4": tf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "nf4, nested": tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "int8": tf.BitsAndBytesConfig(load_in_8bit=True),
    "torchao": tf.TorchAoConfig(Int8WeightOnlyConfig()),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model in full precision, as transformers saves it."""
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    sizes = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(path)
    return path


def quantised(folder: Path, bits: str) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder, quantization_config=BITS[bits], device_map={"": "cpu"})


def values(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all parameters and buffers, packed as they are; torchao's tensors do not compare, so made dense."""
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {n: (t.dequantize() if hasattr(type(t), "from_hp") else t.detach()).clone() for n, t in held}


def rows(n: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count upwards: something to learn."""
    starts = torch.arange(n) % 7
    return [{"input_ids": (r := torch.arange(3, 11) + s), "labels": r} for s in starts]


def trainer(m: Any, out: Path, **options: Any) -> tf.Trainer:
    given = {
        "max_steps": 12, "save_steps": 6, "logging_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "seed": 1, "dataloader_pin_memory": False,
    } | options  # fmt: skip
    return tf.Trainer(m, tf.TrainingArguments(str(out), **given), train_dataset=rows(96))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("bits", BITS)
def test_trainer_trains_saves_and_resumes_on_a_quantised_base(bits: str, folder: Path, tmp_path: Path) -> None:
    """The checkpoint holds the adapter alone; a run broken off and resumed ends where one that was not does."""
    model = quantised(folder, bits)
    before = values(model)
    net = pf.adapt(model, RULES)
    m = pf.as_module(net, net.init())
    run = trainer(m, tmp_path / "whole")
    run.train()
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    assert losses[-1] < 0.8 * losses[0]
    a = pf.adapter_of(m)
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in pf.leaves(a))

    held = load_file(tmp_path / "whole" / "checkpoint-6" / "model.safetensors")
    assert sum(t.numel() for t in held.values()) == pf.status(m).adapters[0].parameters, "the base is in it"

    again = pf.as_module(net, net.init(3))
    resumed = trainer(again, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert resumed.state.global_step == 12
    for x, y in zip(pf.leaves(pf.adapter_of(again)), pf.leaves(a), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)

    ids = rows(2)[1]["input_ids"][None]
    with torch.no_grad():
        y = m.eval()(ids).logits
        # on some CPUs, bitsandbytes' own product of 4-bit layers in eval mode is one of bf16
        torch.testing.assert_close(y, net.apply(a, ids).logits, rtol=0, atol=0.02)
        now = values(model)
        assert now.keys() == before.keys() and all(torch.equal(t, before[n]) for n, t in now.items())
        assert model.is_quantized and model.hf_quantizer is not None, "the model itself is what it was"
        assert (y - model(ids).logits).abs().max() > 0.2  # this packs it anew on some CPUs


def test_a_trained_adapter_of_a_quantised_base_fits_the_one_in_full_precision(folder: Path, tmp_path: Path) -> None:
    """From BitsAndBytesConfig to a saved adapter, in both formats."""
    net = pf.adapt(quantised(folder, "nf4"), {"q_proj|v_proj": LoRA(4)})
    m = pf.as_module(net, net.init())
    trainer(m, tmp_path / "run", save_strategy="no").train()
    whole, ids = tf.LlamaForCausalLM.from_pretrained(folder).eval(), rows(1)[0]["input_ids"][None]
    said = []
    for format in ("native", "peft"):
        pf.save(tmp_path / format, net, pf.adapter_of(m), format=format)
        other, a = pf.load(tmp_path / format, whole)
        said.append(other.apply(a, ids).logits)
    torch.testing.assert_close(*said)
    assert (said[0] - whole(ids).logits).abs().max() > 0.01


def test_activation_checkpointing_on_a_quantised_base(folder: Path, tmp_path: Path) -> None:
    """As QLoRA is trained: it changes the memory, and no value."""
    net = pf.adapt(quantised(folder, "nf4"), {"q_proj|v_proj": LoRA(4)})
    ends = []
    for options in ({}, {"activation_checkpointing": True}):
        m = pf.as_module(net, net.init())
        trainer(m, tmp_path, save_strategy="no", max_steps=2, **options).train()
        ends.append(pf.adapter_of(m))
    for x, y in zip(pf.leaves(ends[0]), pf.leaves(ends[1]), strict=True):
        torch.testing.assert_close(x, y)
