"""Folders that the package `adapters` wrote, against the outputs of its own models; and what is refused of them."""

import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import peftfn as pf

STORED = Path(__file__).parent / "stored_adapterhub"
sys.path.insert(0, str(STORED))
from written import CASES, HEADS, MASK, MODELS, SIZES, inputs  # noqa: E402

OUTPUTS = load_file(STORED / "outputs.safetensors")


@cache
def base(name: str) -> Any:
    model = MODELS[name]()
    model.load_state_dict(load_file(STORED / f"{name}.safetensors"))
    return model.eval()


@pytest.mark.parametrize("case", [*CASES, *HEADS])
def test_it_loads_to_the_outputs_of_the_package(case: str) -> None:
    name = case.partition("-")[0]
    model, given = base(name), inputs(name)
    net, a = pf.load(STORED / case, model, pickled=True)
    with torch.no_grad():
        got, plain = net.apply(a, **given)[0], model(**given)[0]
    if got.dim() == 3 and name != "t5":
        got, plain, want = got[MASK.bool()], plain[MASK.bool()], OUTPUTS[case][MASK.bool()]
    else:
        want = OUTPUTS[case]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    assert (plain - want).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["gpt2-prefix", "llama-mam", "gpt2-compacter", "gpt2-parallel"])
def test_mixed_rows_and_generate(case: str) -> None:
    """Also beside a prompt and the base, left-padded; a prefix of the package does not move positions."""
    name = case.partition("-")[0]
    model = base(name)
    prompt = pf.adapt(model, {".*": pf.PromptTuning(2)})
    given = {"hub": tuple(pf.load(STORED / case, model, pickled=True)), "prompt": (prompt, prompt.init(0))}
    ids, mask = inputs(name)["input_ids"].flip(1), MASK.flip(1)
    names, rows = ["hub", "prompt", "__base__"], torch.cat([ids, ids[1:]])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    masks = torch.cat([mask[1:], mask])[[0, 2, 2]]
    got = pf.bank(given).apply(names, rows, attention_mask=masks, method="generate", **options)
    for i, n in enumerate(names[:2]):
        alone: Any = {"attention_mask": masks[i : i + 1], **options}
        want = given[n][0].apply(given[n][1], rows[i : i + 1], method="generate", **alone)
        assert torch.equal(got[i : i + 1], want), n
    plain = model.generate(rows[2:], attention_mask=masks[2:], **options)
    assert torch.equal(got[2:], plain)


@pytest.mark.parametrize("case", ["bert-prefix", "roberta-flat"])
def test_mixed_rows_of_an_encoder(case: str) -> None:
    """Prefixes that move positions, and that do not; RoBERTa counts positions from its padding token's number on."""
    name = case.partition("-")[0]
    model, given = base(name), inputs(name)
    prefix, prompt = (pf.adapt(model, {".*": m}) for m in (pf.PrefixTuning(2), pf.PromptTuning(1)))
    nets: dict[str, Any] = {"hub": tuple(pf.load(STORED / case, model, pickled=True))}
    nets |= {"prefix": (prefix, prefix.init(0)), "prompt": (prompt, prompt.init(0))}
    names = [*nets, "__base__"]
    ids, mask = given["input_ids"][[1, 1, 1, 1]], MASK[[1, 1, 1, 1]]
    got = pf.bank(nets).apply(names, ids, attention_mask=mask).logits
    alone = [net.apply(a, ids[:1], attention_mask=mask[:1]).logits for net, a in nets.values()]
    want = torch.cat([*alone, model(ids[:1], attention_mask=mask[:1]).logits])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)
    assert all((want[i] - want[3]).abs().max() > 1e-3 for i in range(3))


def test_a_native_file_keeps_what_was_read(tmp_path: Path) -> None:
    """Compacter's rule, which its layers share, and a prefix that moves no positions among it."""
    for case in ("gpt2-compacter", "llama-mam", "gpt2-parallel"):
        model = base(case.partition("-")[0])
        net, a = pf.load(STORED / case, model, pickled=True)
        pf.save(tmp_path / case, net, a)
        again, b = pf.load(tmp_path / case, model)
        given = inputs(case.partition("-")[0])
        assert torch.equal(net.apply(a, **given)[0], again.apply(b, **given)[0])


def changed(case: str, tmp_path: Path, **options: Any) -> Path:
    path = tmp_path / case
    shutil.copytree(STORED / case, path)
    whole = json.loads((path / "adapter_config.json").read_text())
    whole["config"] |= options
    (path / "adapter_config.json").write_text(json.dumps(whole))
    return path


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("gpt2-compacter", {"shared_phm_rule": False}, "shared_phm_rule is False; this release reads True"),
        ("gpt2-compacter", {"factorized_phm_rule": True}, "factorized_phm_rule is True"),
        ("gpt2-compacter", {"shared_W_phm": True}, "shared_W_phm is True"),
        ("gpt2-parallel", {"phm_layer": True}, r"the adapter at transformer\.h\.0\.attention_adapters has"),
        ("gpt2-parallel", {"scaling": "learned"}, "scaling is 'learned'"),
        ("gpt2-adapterplus", {"residual_before_ln": True}, "residual_before_ln is True; this release reads False"),
        ("gpt2-prefix", {"use_gating": True}, "use_gating is True"),
        ("gpt2-prefix", {"leave_out": [0]}, r"leave_out is \[0\]"),
        ("gpt2-prefix", {"prefix_length": 5}, "prefix_length is 5"),
    ],
    ids=str,
)
def test_refuses_what_means_something_else(case: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        pf.load(changed(case, tmp_path, **options), base(case.partition("-")[0]), pickled=True)


def test_refuses_a_prefix_of_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="self_prefix of 2 backbones"):
        pf.load(STORED / "gpt2-prefix", base("t5"), pickled=True)


def test_a_rule_that_the_package_left_out(tmp_path: Path) -> None:
    path = tmp_path / "f"
    shutil.copytree(STORED / "gpt2-compacter", path)
    tensors = {k: t for k, t in load_file(path / "adapter.safetensors").items() if "shared_parameters" not in k}
    save_file(tensors, path / "adapter.safetensors")
    with pytest.raises(ValueError, match=r"share a phm_rule, and the file has none; .*BertForSequenceClassification"):
        pf.load(path, base("gpt2"))


def test_refuses_a_head_without_a_place(tmp_path: Path) -> None:
    path = tmp_path / "f"
    shutil.copytree(STORED / "bert-head", path)
    config = json.loads((path / "head_config.json").read_text())
    config["config"]["layers"] = 3
    (path / "head_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers=3.* BertForSequenceClassification has no place for: .*strict=False"):
        pf.load(path, base("bert"))
    assert len(pf.load(path, base("bert"), strict=False).unexpected) == 4


def test_refuses_a_head_of_other_sizes() -> None:
    model = tf.BertForSequenceClassification(tf.BertConfig(**SIZES | {"num_labels": 5}))
    with pytest.raises(ValueError, match=r"has shape \[3.*\], and the model's classifier.* \[5.*\]: .*num_labels=3"):
        pf.load(STORED / "bert-head", model)
