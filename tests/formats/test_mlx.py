"""MLX-LM's folders, both ways: its layout as its layers read it, written out by hand here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from support import random
from torch import Tensor
from torch.func import functional_call

import peftfn as pf
from peftfn.cli.inspect import inspect

IDS = torch.arange(6)[None]
PARAMETERS = {"rank": 4, "scale": 20.0, "dropout": 0.0}


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=tied)).eval()


def folder(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapters.safetensors")
    given = {"fine_tune_type": "lora", "num_layers": 3, "lora_parameters": PARAMETERS} | config
    (path / "adapter_config.json").write_text(json.dumps(given))
    return path


def merged(model: Any, tensors: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The weights that MLX-LM's `fuse` makes: W + s (a b)ᵀ, with a magnitude where there is one; E + s a b."""
    out = {k: t.detach().clone() for k, t in model.state_dict().items()}
    for key in [k for k in tensors if k.endswith(".lora_a")]:
        name = key.removesuffix(".lora_a")
        change = scale * tensors[key] @ tensors[f"{name}.lora_b"]
        w = out[f"{name}.weight"] + (change if "embed" in name else change.T)
        if f"{name}.m" in tensors:
            w = (tensors[f"{name}.m"] / w.norm(dim=1))[:, None] * w
        out[f"{name}.weight"] = w
    return out


def factors(name: str, in_: int, out: int, rank: int = 4) -> dict[str, Tensor]:
    return {f"{name}.lora_a": 0.1 * torch.randn(in_, rank), f"{name}.lora_b": 0.1 * torch.randn(rank, out)}


@pytest.mark.parametrize("by_file", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_its_layers_mean_what_they_mean_there(kind: str, by_file: bool, tmp_path: Path) -> None:
    model, tensors = llama(), {}
    for i in (1, 2):
        tensors |= factors(f"model.layers.{i}.self_attn.q_proj", 16, 16)
        tensors |= {f"model.layers.{i}.self_attn.q_proj.m": torch.rand(16)} if kind == "dora" else {}
        tensors |= factors(f"model.layers.{i}.mlp.down_proj", 24, 16)
        tensors |= {f"model.layers.{i}.mlp.down_proj.m": torch.rand(16)} if kind == "dora" else {}
    if kind == "lora":
        tensors |= factors("lm_head", 16, 32) | factors("model.embed_tokens", 32, 16)
    path = folder(tmp_path / "a", tensors, fine_tune_type=kind, num_layers=2)
    net, a = pf.load(path / "adapters.safetensors" if by_file else path, model)
    want = functional_call(model, merged(model, tensors, 20.0), (IDS,)).logits
    torch.testing.assert_close(net.apply(a, IDS).logits, want)
    assert (want - model(IDS).logits).abs().max() > 0.02


def test_whole_weights(tmp_path: Path) -> None:
    model = llama()
    name = "model.layers.2.self_attn.q_proj.weight"
    path = folder(tmp_path / "a", {name: torch.randn(16, 16)}, fine_tune_type="full", num_layers=1)
    net, a = pf.load(path, model)
    torch.testing.assert_close(net.merge(a)[name], load_file(path / "adapters.safetensors")[name])


@pytest.mark.parametrize(
    ("rules", "keys", "layers"),
    [
        ({r"layers\.[12].*q_proj": pf.LoRA(4, 3.0, dropout=0.1)}, ["self_attn.q_proj"], 2),
        ({"embed_tokens|v_proj|lm_head": pf.LoRA(2, 2.0)}, ["model.embed_tokens", "self_attn.v_proj", "lm_head"], 3),
        ({"down_proj": pf.DoRA(2, 8)}, ["mlp.down_proj"], 3),
    ],
    ids=["last layers", "embedding and head", "DoRA"],
)
def test_what_is_written_says_the_same(
    rules: dict[str, pf.Method], keys: list[str], layers: int, tmp_path: Path
) -> None:
    model = llama()
    net = pf.adapt(model, rules)
    a = random(net)
    pf.save(tmp_path, net, a, format="mlx")
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapters.safetensors"),
    )
    assert (config["lora_parameters"]["keys"], config["num_layers"]) == (keys, layers)
    want = functional_call(model, merged(model, tensors, config["lora_parameters"]["scale"]), (IDS,)).logits
    torch.testing.assert_close(net.apply(a, IDS).logits, want)
    loaded, b = pf.load(tmp_path, model)
    assert all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])
    assert {e.method for e in loaded.plan.values()} == {e.method for e in net.plan.values()}


Q = "model.layers.2.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({}, {"fine_tune_type": "qlora"}, "fine_tune_type is 'qlora'"),
        ({}, {"lora_parameters": {"rank": 4}}, "scale None"),
        ({}, {"lora_parameters": PARAMETERS | {"rank": 3}}, "has shape"),
        ({}, {"lora_parameters": PARAMETERS | {"mode": "x"}}, "'mode', which this release does not know"),
        ({}, {"lora_parameters": PARAMETERS | {"keys": [1]}}, "must be a list of names"),
        (
            {},
            {"lora_parameters": PARAMETERS | {"keys": ["self_attn.q_proj", "self_attn.v_proj"]}},
            "lacks .* v_proj|v_p",
        ),
        ({}, {"num_layers": "all"}, "num_layers must be a number"),
        (factors("model.layers.0.self_attn.q_proj", 16, 16), {"num_layers": 1}, "layer 0, and num_layers is 1 of 3"),
        ({"model.layers.2.mlp.switch_mlp.up_proj.lora_a": torch.ones(4, 4, 16)}, {}, "must be a matrix"),
        ({f"{Q}.lora_c": torch.ones(4)}, {}, "no place in this model"),
    ],
    ids=range(10),
)
def test_what_does_not_fit_is_refused(
    tensors: dict[str, Tensor], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = folder(tmp_path / "a", factors(Q, 16, 16) | tensors, **changes)
    with pytest.raises(ValueError, match=message):
        pf.load(path, llama())


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"q_proj": pf.LoRA(2), "v_proj": pf.LoRA(4)}, "one rank and scale for all layers"),
        ({"q_proj": pf.LoHa(2)}, "have no LoHa"),
        ({"embed_tokens": pf.DoRA(2)}, "have no DoRA.*embedding"),
        ({"q_proj": pf.LoRA(2, lora_bias=True)}, "have no LoRA"),
    ],
    ids=["ranks", "method", "layer", "bias"],
)
def test_what_it_has_no_form_for_writes_nothing(rules: dict[str, pf.Method], message: str, tmp_path: Path) -> None:
    net = pf.adapt(llama(), rules)
    with pytest.raises(ValueError, match=message):
        pf.save(tmp_path / "a", net, net.init(), format="mlx")
    assert not (tmp_path / "a").exists()


def test_what_is_said_of_it_without_a_model(tmp_path: Path) -> None:
    facts = inspect(folder(tmp_path / "a", factors(Q, 16, 16)))[""]
    assert (facts["format"], facts["methods"], facts["ranks"], facts["layers"]) == ("mlx", {"lora": 1}, {4: 1}, [Q])
    assert pf.load(tmp_path / "a", llama()).net.plan.keys() == {f"{Q}.weight"}


def test_an_embedding_that_is_the_head_too(tmp_path: Path) -> None:
    """There its LoRA changes the head along with it."""
    path = folder(tmp_path / "a", factors("model.embed_tokens", 32, 16))
    with pytest.raises(ValueError, match=r"changes lm_head\.weight too"):
        pf.load(path, llama(tied=True))


def test_a_file_without_its_configuration_says_what_it_lacks(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", factors(Q, 16, 16))
    (path / "adapter_config.json").unlink()
    for where in (path, path / "adapters.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"has adapters\.safetensors, but not adapter_config\.json"):
            pf.load(where, llama())
