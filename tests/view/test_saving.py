"""What a view's save_pretrained writes, and Trainer with it: adapters that load reads, and nothing that passes for a
model."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support import random, same_state, state
from torch import nn
from torch.func import functional_call

import peftfn as pf
from peftfn.testing import leaves

IDS = torch.arange(5)[None]
RULES: dict[str, dict[str, Any]] = {
    "LoRA": {"q_proj": pf.LoRA(2)},
    "LoRA and a head": {"q_proj": pf.LoRA(2), "lm_head": pf.Full()},
    "a method of ours": {"q_proj": pf.LoRA(2), "k_proj": pf.IA3()},
    "shared tensors": {"[qv]_proj": pf.VBLoRA(rank=2, vectors=6, length=4)},
    "all": {"weight": pf.Full()},
}
IN_PEFT = ("LoRA", "LoRA and a head", "shared tensors")


def llama(folder: Path | None = None) -> Any:
    tf.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=2)).eval()
    if folder is None:
        return model
    model.save_pretrained(folder)
    return tf.LlamaForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("rules", RULES)
def test_what_is_saved_loads_and_resumes(rules: str, tmp_path: Path) -> None:
    model = llama()
    net = pf.adapt(model, RULES[rules])
    a = random(net)
    m = pf.as_module(net, a)
    m.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_config.json").is_file() == (rules != "a method of ours")
    loaded, b = pf.load(tmp_path, model)
    want = net.apply(a, IDS).logits
    torch.testing.assert_close(loaded.apply(b, IDS).logits, want)
    again = pf.as_module(net, net.init(seed=3))
    odd = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys
    assert not odd and all(map(torch.equal, leaves(pf.adapter_of(again)), leaves(a)))


@pytest.mark.parametrize("rules", ["LoRA", "shared tensors"])
def test_a_scaled_adapter_is_saved_with_its_factors(rules: str, tmp_path: Path) -> None:
    model = llama()
    net = pf.adapt(model, RULES[rules])
    a = pf.scale(random(net, scale=0.5), 0.25)
    m = pf.as_module(net, a)
    m.save_pretrained(tmp_path)
    loaded, b = pf.load(tmp_path, model)
    torch.testing.assert_close(loaded.apply(b, IDS).logits, m(IDS).logits)
    again = pf.as_module(net, pf.scale(net.init(seed=3), 1.0))
    odd = again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).unexpected_keys
    assert not odd and all(map(torch.equal, leaves(pf.adapter_of(again)), leaves(a)))


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("rules", IN_PEFT)
def test_peft_and_transformers_read_it_with_the_base(rules: str, tmp_path: Path) -> None:
    """Where the base has a name, from_pretrained of the folder is base and adapter, and so is AutoPeftModel's."""
    model = llama(tmp_path / "base")
    net = pf.adapt(model, RULES[rules])
    a = random(net)
    pf.as_module(net, a).save_pretrained(tmp_path / "out")
    want = net.apply(a, IDS).logits
    read = peft.PeftModel.from_pretrained(llama(), tmp_path / "out").eval()
    torch.testing.assert_close(read(IDS).logits, want)
    auto = peft.AutoPeftModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(auto(IDS).logits, want)
    if rules == "LoRA":  # transformers itself has no modules_to_save and no shared tensors
        whole = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(whole(IDS).logits, want)


@pytest.mark.parametrize("rules", ["LoRA", "a method of ours", "all"])
@pytest.mark.parametrize("config", [False, True], ids=["folder", "with its config"])
def test_it_is_no_model_with_random_weights(rules: str, config: bool, tmp_path: Path) -> None:
    """transformers fills what a folder lacks with random weights, and says so in its log alone."""
    model = llama()
    net = pf.adapt(model, RULES[rules])
    pf.as_module(net, net.init()).save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink(missing_ok=True)  # as where PEFT is not installed
    given = {"config": model.config} if config else {}
    for cls in (tf.LlamaForCausalLM, tf.AutoModelForCausalLM, tf.LlamaModel):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            cls.from_pretrained(tmp_path, **given)


def test_several_adapters_are_in_folders_of_their_names(tmp_path: Path) -> None:
    model = llama()
    net, other = pf.adapt(model, {"q_proj": pf.LoRA(2)}), pf.adapt(model, {"v_proj": pf.IA3(), "k_proj": pf.LoRA(2)})
    adapters = {"default": (net, random(net)), "legal": (other, random(other))}
    pf.as_module(net, **adapters).save_pretrained(tmp_path)
    found = pf.load_all(tmp_path, model)
    assert found.keys() == adapters.keys()
    for name, (of, a) in adapters.items():
        got = found[name]
        torch.testing.assert_close(got.net.apply(got.adapter, IDS).logits, of.apply(a, IDS).logits)


def test_a_gathered_state_is_what_is_written(tmp_path: Path) -> None:
    """A trainer passes the state it gathered, and ranks other than the first write nothing."""
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(2)})
    m, a = pf.as_module(net, net.init()), random(net)
    gathered = pf.as_module(net, a).state_dict()
    m.save_pretrained(tmp_path / "other", is_main_process=False, state_dict=gathered)
    assert not (tmp_path / "other").exists()
    m.save_pretrained(tmp_path, state_dict=gathered)
    assert all(map(torch.equal, leaves(pf.load(tmp_path, net.model).adapter), leaves(a)))


def test_a_quantised_base_is_left_out_with_its_scales(tmp_path: Path) -> None:
    model = llama()
    for layer in [m for n, m in model.named_modules() if n.endswith("_attn")]:
        for name, linear in [(n, m) for n, m in layer.named_children() if isinstance(m, nn.Linear)]:
            made = bnb.nn.Linear4bit(16, 16, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            made.load_state_dict(linear.state_dict())
            setattr(layer, name, made.to("cpu"))
    net = pf.adapt(model.requires_grad_(False), {"q_proj": pf.LoRA(2), "norm": pf.Full()})
    a = random(net)
    pf.as_module(net, a).save_pretrained(tmp_path)
    held = {k for k, t in load_file(tmp_path / "model.safetensors").items() if t.numel()}
    assert all(".0.default." in k for k in held), "scales of frozen weights are written"
    loaded, b = pf.load(tmp_path, model)
    torch.testing.assert_close(loaded.apply(b, IDS).logits, net.apply(a, IDS).logits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [({"push_to_hub": True}, ValueError, "upload_folder"), ({"save_peft_format": False}, TypeError, "save_peft_form")],
)
def test_options_without_a_meaning_are_refused(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(2)})
    with pytest.raises(error, match=message):
        pf.as_module(net, net.init()).save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# ---- buffers that training changes


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 2)).eval()


def trained(rules: dict[str, Any]) -> tuple[pf.Adapted, Any]:
    """A module after three steps in train mode, which change a norm's statistics."""
    net = pf.adapt(convolutions(), rules)
    m = pf.as_module(net, random(net)).train()
    for _ in range(3):
        m(PICTURES)
    return net, m.eval()


PICTURES = 3 + 2 * torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0))
WHOLE, LAYER = {"0.weight": pf.LoRA(2), "1": pf.Full()}, {"0.weight": pf.LoRA(2)}


def test_changed_statistics_are_told_before_they_are_lost() -> None:
    net, m = trained(LAYER)
    assert set(pf.buffers_of(m)) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    with pytest.raises(ValueError, match=r"1\.running_mean differs from the base's.*buffers_of"):
        pf.adapter_of(m)
    a = pf.adapter_of(m, buffers=True)
    assert (net.apply(a, PICTURES) - m(PICTURES)).abs().max() > 0.1
    net.model.load_state_dict(pf.buffers_of(m), strict=False)
    assert not pf.buffers_of(m)
    torch.testing.assert_close(net.apply(pf.adapter_of(m), PICTURES), m(PICTURES))


@pytest.mark.parametrize(("format", "rules"), [("native", LAYER), ("native", WHOLE), ("peft", WHOLE)])
def test_changed_statistics_are_saved_and_given_back(format: str, rules: dict[str, Any], tmp_path: Path) -> None:
    net, m = trained(rules)
    pf.save(tmp_path, net, pf.adapter_of(m, buffers=True), format=format, buffers=pf.buffers_of(m))
    fresh = convolutions()
    before = state(fresh)
    with pytest.raises(ValueError, match=r"is a buffer that differs.*buffers=True"):
        pf.load(tmp_path, fresh)
    loaded = pf.load(tmp_path, fresh, buffers=True)
    assert same_state(before, state(fresh)) and loaded.buffers.keys() == pf.buffers_of(m).keys()
    fresh.load_state_dict(dict(loaded.buffers), strict=False)
    torch.testing.assert_close(loaded.net.apply(loaded.adapter, PICTURES), m(PICTURES))
    assert not pf.load(tmp_path, fresh).buffers, "they are the model's now"


@pytest.mark.parametrize("format", ["native", "peft"])
def test_statistics_of_a_norm_that_is_saved_whole_belong_to_it(format: str, tmp_path: Path) -> None:
    """The base's owner put them into the base, so that a fresh base is another one."""
    net, m = trained(WHOLE)
    net.model.load_state_dict(pf.buffers_of(m), strict=False)
    pf.save(tmp_path, net, pf.adapter_of(m), format=format)
    with pytest.raises(ValueError, match="buffers=True"):
        pf.load(tmp_path, convolutions())
    loaded = pf.load(tmp_path, net.model)
    out = functional_call(net.model, loaded.net.merge(loaded.adapter), (PICTURES,))
    torch.testing.assert_close(out, m(PICTURES))


def test_buffers_that_a_file_cannot_have_are_refused(tmp_path: Path) -> None:
    net, m = trained(LAYER)
    a = pf.adapter_of(m, buffers=True)
    with pytest.raises(ValueError, match=r"1\.num_batches_tracked: PEFT saves buffers of modules that are trained"):
        pf.save(tmp_path / "a", net, a, format="peft", buffers=pf.buffers_of(m))
    for format in ("native", "peft"):
        with pytest.raises(ValueError, match=r"buffers has 1\.mean \[4\], which is not there"):
            pf.save(tmp_path / "a", net, a, format=format, buffers={"1.mean": torch.ones(4)})
    assert not (tmp_path / "a").exists()


def test_a_bank_compares_buffers_too(tmp_path: Path) -> None:
    net, m = trained(LAYER)
    pf.save(tmp_path, net, pf.adapter_of(m, buffers=True), buffers=pf.buffers_of(m))
    fresh = pf.adapt(convolutions(), LAYER)
    with pytest.raises(ValueError, match="is a buffer that differs"):
        pf.bank({"a": (fresh, tmp_path / "adapter.safetensors")}).apply(["a"] * 8, PICTURES)
