"""llama.cpp's adapters. Files are read by the gguf package, and compared in llama.cpp's order of the base's rows."""

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from torch import Tensor

import peftfn as pf
from peftfn.__main__ import main
from peftfn.testing import shaken

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "tie_word_embeddings": False,
}
CASES = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "gemma": transformers.GemmaForCausalLM,
    "gemma2": transformers.Gemma2ForCausalLM,
}
RULES: dict[str, pf.Method] = {
    r"0\..*q_proj": pf.LoRA(rank=3, alpha=6),
    r"[qkvo]_proj": pf.LoRA(rank=2, alpha=6),
    "(gate|up|down)_proj": pf.LoRA(rank=2, alpha=5, rslora=True),  # another scale: it is in B
    "embed_tokens": pf.LoRA(rank=2, alpha=6),
}


def model(name: str = "llama") -> Any:
    torch.manual_seed(0)
    cls: Any = CASES[name]
    return cls(cls.config_class(**SIZES)).eval().requires_grad_(False)


def in_llama_cpps_order(name: str, w: Tensor) -> Tensor:
    """What `LlamaModel.permute` of llama.cpp's converter makes of q's and k's rows: the two halves of each head are
    interleaved."""
    heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
    if heads is None:
        return w
    rows = torch.arange(len(w)).view(heads, -1)
    half = rows.shape[1] // 2
    order = [int(r) for head in rows for pair in zip(head[:half], head[half:], strict=True) for r in pair]
    return w[order]


def file_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    read = gguf.GGUFReader(path)
    values = {k: f.contents() for k, f in read.fields.items()}
    return values, {t.name: torch.from_numpy(t.data.copy()) for t in read.tensors}


@pytest.mark.parametrize("name", CASES)
def test_the_files_change_is_the_adapters_in_llama_cpps_order(name: str, tmp_path: Path) -> None:
    net = pf.adapt(model(name), RULES)
    a = shaken(net.init(1), 1)
    pf.save(tmp_path / "a.gguf", net, a, format="gguf")
    values, tensors = file_of(tmp_path / "a.gguf")
    assert values["general.type"] == "adapter" and values["adapter.type"] == "lora"
    assert values["general.architecture"] == {"mistral": "llama"}.get(name, name)
    names: Any = gguf.get_tensor_name_map(
        next(m for m, n in gguf.MODEL_ARCH_NAMES.items() if n == values["general.architecture"]), 2
    )
    turned = values["general.architecture"] == "llama"
    for site, delta in net.delta(a).items():
        key = names.get_name(site, try_suffixes=(".weight",))
        down, up = tensors.pop(f"{key}.lora_a"), tensors.pop(f"{key}.lora_b")
        if key == "token_embd.weight":  # both are looked up and multiplied: A [vocab, rank]
            got = values["adapter.lora.alpha"] / up.shape[1] * down @ up.T
            torch.testing.assert_close(got, delta, rtol=1e-5, atol=1e-6)
            continue
        got = values["adapter.lora.alpha"] / up.shape[1] * up @ down
        want = in_llama_cpps_order(site, delta) if turned else delta
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=site)
    assert not tensors


@pytest.mark.parametrize("name", CASES)
def test_a_file_is_read_back(name: str, tmp_path: Path) -> None:
    rules: dict[str, pf.Method] = {r"0\..*q_proj": pf.LoRA(3, 6.0), "[qk]_proj": pf.LoRA(2, 6.0)}
    net = pf.adapt(model(name), {**rules, "embed_tokens": pf.LoRA(2, 6.0)})
    a = shaken(net.init(1), 1)
    pf.save(tmp_path / "a.gguf", net, a, format="gguf")
    other, b = pf.load(tmp_path / "a.gguf", net.model)
    assert all(torch.equal(b[n][k], t) for n, leaf in a.items() for k, t in leaf.items()) and a.keys() == b.keys()
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(other.apply(b, ids).logits, net.apply(a, ids).logits)
    facts = pf.inspect(tmp_path / "a.gguf")[""]
    assert facts["format"] == "gguf" and facts["ranks"] == {2: 4, 3: 1} and facts["tensors"] == 10


def test_other_scales_and_no_alpha(tmp_path: Path) -> None:
    net = pf.adapt(model(), RULES)
    a = shaken(net.init(1), 1)
    pf.save(tmp_path / "a.gguf", net, a, format="gguf")
    other, b = pf.load(tmp_path / "a.gguf", net.model)
    for site, delta in net.delta(a).items():
        torch.testing.assert_close(other.delta(b)[site], delta, rtol=1e-5, atol=1e-6)
    raw = bytearray((tmp_path / "a.gguf").read_bytes())
    at = raw.index(b"adapter.lora.alpha") + len(b"adapter.lora.alpha") + 4
    raw[at : at + 4] = struct.pack("<f", 0.0)  # to llama.cpp, a scale of 1
    (tmp_path / "b.gguf").write_bytes(raw)
    plain, c = pf.load(tmp_path / "b.gguf", net.model)
    for site, entry in plain.plan.items():
        assert entry.method.scale == 1 and entry.method.rank == other.plan[site].method.rank
        assert torch.equal(c[site]["b"], b[site]["b"])


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (
            {"q_proj": pf.DoRA(2)},
            r"q_proj\.weight: llama\.cpp has no DoRA\(rank=2\) .*to_lora\(net, adapter\)",
        ),
        ({"q_proj": pf.LoRA(2, lora_bias=True)}, "llama.cpp has no LoRA"),
        ({"norm": pf.Full()}, "llama.cpp has no Full"),
    ],
    ids=str,
)
def test_what_llama_cpp_has_not_is_an_error(rules: dict[str, pf.Method], says: str, tmp_path: Path) -> None:
    net = pf.adapt(model(), rules)
    with pytest.raises(ValueError, match=says):
        pf.save(tmp_path / "a.gguf", net, net.init(), format="gguf")
    assert not any(tmp_path.iterdir())


def test_weights_that_are_tied_and_models_that_are_not_known_are_errors(tmp_path: Path) -> None:
    cls: Any = transformers.LlamaForCausalLM
    tied = cls(cls.config_class(**SIZES | {"tie_word_embeddings": True}))
    net = pf.adapt(tied, {"embed_tokens": pf.LoRA(2)})
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: .* is tied to lm_head\.weight"):
        pf.save(tmp_path / "a.gguf", net, net.init(), format="gguf")
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    other = pf.adapt(gpt, {"c_attn": pf.LoRA(2)})
    with pytest.raises(ValueError, match=r"a GPT2LMHeadModel in a way that is not known here; .*convert_lora_to_gguf"):
        pf.save(tmp_path / "a.gguf", other, other.init(), format="gguf")
    with pytest.raises(ValueError, match=r"one file: give a name that ends in \.gguf"):
        pf.save(tmp_path / "folder", net, net.init(), format="gguf")


@pytest.mark.parametrize("change", ["cut", "magic", "counts", "architecture", "empty", "type", "nan"])
def test_a_broken_file_is_an_error_that_names_it(change: str, tmp_path: Path) -> None:
    net = pf.adapt(model(), {"q_proj": pf.LoRA(2)})
    file = tmp_path / "a.gguf"
    pf.save(file, net, net.init(), format="gguf")
    raw = bytearray(file.read_bytes())
    match change:
        case "cut":
            raw = raw[:-40]
        case "magic":
            raw[0] = 0
        case "counts":
            raw[8:24] = struct.pack("<QQ", 2**60, 2**61)
        case "architecture":
            at = raw.index(b"llama")
            raw[at : at + 5] = b"gemma"
        case "empty":
            raw = bytearray()
        case "type":
            at = raw.index(b"lora_a") + 6 + 4 + 16
            raw[at : at + 4] = struct.pack("<I", 8)
        case "nan":
            raw[-4:] = struct.pack("<f", float("nan"))
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"a\.gguf"):
        pf.load(file, net.model)


def test_the_command_line_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = model()
    base.save_pretrained(tmp_path / "base")
    net = pf.adapt(base, {"[qk]_proj": pf.LoRA(2, 3.0)})
    a = shaken(net.init(1), 1)
    pf.save(tmp_path / "peft", net, a, format="peft")
    out = str(tmp_path / "a.gguf")
    assert main(["convert", str(tmp_path / "peft"), out, "--to", "gguf", "--model", str(tmp_path / "base")]) == 0
    assert "format gguf" in capsys.readouterr().out
    _, b = pf.load(out, base)
    assert all(torch.equal(b[n][k], t) for n, leaf in a.items() for k, t in leaf.items())
    assert main(["inspect", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
