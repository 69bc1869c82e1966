"""What a file says is used or refused: names that are others than the model's, in keys, patterns and headers."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from models import SMALL, by_name, noise, tokens
from safetensors.torch import load_file, save_file
from support import compare
from test_checkpoint_rules import llama, lora, saved
from test_peft_parity import edit, retensor
from torch import Tensor, nn

import peftfn as pf

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
]
TENSORS = "adapter_model.safetensors"
Q = "self_attn.q_proj"


def logits(loaded: pf.Loaded) -> Tensor:
    return loaded.net.apply(loaded.adapter, tokens(2)).logits


# Patterns and names of a configuration are about the file's own names.


def alphas(net: pf.Adapted) -> list[float]:
    return [e.method.scale * e.method.rank for e in net.plan.values()]


@pytest.mark.parametrize("pattern", ["^layers.0.self_attn.q_proj", r"layers\.0\..*", "^layers.0.self_attn.[qv]_proj"])
def test_patterns_of_a_model_without_its_head(pattern: str, tmp_path: Path) -> None:
    """The file calls a layer `layers.0…`, the model with its head `model.layers.0…`; and the other way."""
    model = llama()
    saved(tmp_path, copy.deepcopy(model.model), lora(target_modules=["q_proj"], alpha_pattern={pattern: 32}))
    net, _ = pf.load(tmp_path, model)
    assert alphas(net) == [32, 3]
    rules = {r"0\.self_attn\.q_proj": pf.LoRA(2, alpha=32), "q_proj": pf.LoRA(3, alpha=2)}
    net = pf.adapt(model, rules)
    pf.save(tmp_path / "own", net, net.init(), format="peft")
    inner, _ = pf.load(tmp_path / "own", model.model)
    assert alphas(inner) == [32, 2] and [e.method.rank for e in inner.plan.values()] == [2, 3]


@pytest.mark.parametrize(
    "options",
    [
        {"alpha_pattern": {r"^decoder\.blocks\.0\.": 7, "^decoder.blocks.0.self_attn.q_proj": 9}},
        {"rank_pattern": {"^decoder.blocks.1.self_attn.q_proj": 2}, "target_modules": r"decoder\.blocks.*q_proj"},
        {"exclude_modules": r"model\.layers.*", "target_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "blocks"},
        {"target_modules": ["decoder.blocks.0.self_attn.q_proj", "decoder.blocks.1.self_attn.q_proj"]},
        {"modules_to_save": ["decoder.blocks.0.input_layernorm"]},
    ],
    ids=str,
)
def test_a_key_mapping_is_about_keys_and_the_configuration_about_the_files_names(
    options: dict[str, Any], tmp_path: Path
) -> None:
    saved(tmp_path, llama(), lora(target_modules=["q_proj"]))
    wanted = dict(options)
    pattern = wanted.get("alpha_pattern", {})
    if len(pattern) == 2:
        pattern.pop(r"^decoder\.blocks\.0\.")  # finds no whole name
    edit(tmp_path, **wanted)
    norm = {"base_model.model.model.layers.0.input_layernorm.weight": torch.full((16,), 2.0)}
    more = norm if "modules_to_save" in options else {}
    tensors = {**load_file(tmp_path / TENSORS), **more}
    save_file({k.replace("model.layers", "decoder.blocks"): t for k, t in tensors.items()}, tmp_path / TENSORS)
    net = pf.load(tmp_path, llama(), key_mapping={r"^decoder\.blocks": "model.layers"}).net
    assert len(net.plan) == 2 + len(more)
    assert more or alphas(net)[:1] == [9 if pattern else 3]


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_of_a_file_that_finds_nothing_is_an_error(pattern: str, tmp_path: Path) -> None:
    saved(tmp_path, llama(), lora(target_modules=["q_proj"]))
    edit(tmp_path, **{pattern: {"v_proj": 2, "q_porj": 5}})
    with pytest.raises(ValueError, match=f"{pattern} has 'q_porj'.*near: q_proj.*strict=False"):
        pf.load(tmp_path, llama())
    assert len(pf.load(tmp_path, llama(), strict=False).net.plan) == 2


# What belongs to the base.


def grown(tie: bool, seed: int) -> nn.Module:
    """A llama with four tokens more, whose rows are new each time."""
    model = llama(tie_word_embeddings=tie)
    torch.manual_seed(seed)
    model.resize_token_embeddings(SMALL["vocab_size"] + 4, mean_resizing=False)
    return model


NEW = torch.arange(SMALL["vocab_size"] - 2, SMALL["vocab_size"] + 4)[None]


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("how", ["a LoRA of the embedding", "its tokens", "whole, beside a LoRA"])
def test_new_tokens_are_the_files_also_where_weights_are_tied(tie: bool, how: str, tmp_path: Path) -> None:
    """PEFT writes the base's values of a grown embedding, inside of the layers it put around it; it reads them into
    the parameter, which a tied head has too."""
    options: dict[str, Any] = {
        "a LoRA of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
        "its tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, SMALL["vocab_size"]]},
        "whole, beside a LoRA": {"target_modules": ["q_proj"]},
    }[how]
    model = saved(tmp_path, grown(tie, 1), lora(**options), save_embedding_layers=True)
    net, adapter = pf.load(tmp_path, grown(tie, 2))
    with torch.no_grad():
        want = model(NEW).logits
        again = peft.PeftModel.from_pretrained(grown(tie, 2), tmp_path).eval()(NEW).logits
        compare(net.apply(adapter, NEW).logits, again)
        if tie or how != "a LoRA of the embedding":  # there PEFT leaves the head's new rows out of its file
            compare(again, want)
        assert (grown(tie, 2)(NEW).logits - want).abs().max() > 1e-2


# Names of adapters in keys.

RAW: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: lora(target_modules=["q_proj"]),
    "DoRA": lambda: lora(target_modules=["q_proj"], use_dora=True),
    "embedding": lambda: lora(target_modules=["embed_tokens"]),
    "a head": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": lambda: lora(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "LoKr": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "VeRA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(
        init_r=2, target_r=1, total_step=9, tinit=1, tfinal=1, target_modules=["q_proj"]
    ),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=9, target_modules=["q_proj"]),
}


@pytest.mark.parametrize("name", ["default", "style_2"])
@pytest.mark.parametrize("case", RAW)
def test_a_state_that_was_saved_by_hand(case: str, name: str, tmp_path: Path) -> None:
    """Its keys have the adapter's name, as `model.state_dict()` does, for every method and every part."""
    model = saved(tmp_path, llama(), RAW[case]())
    ours = {k for k in load_file(tmp_path / TENSORS) if "original_module" not in k}
    raw = {k: t.clone() for k, t in model.state_dict().items() if ".default" in k and "ranknum" not in k}
    assert not ours & raw.keys()
    save_file({k.replace(".default", f".{name}"): t for k, t in raw.items()}, tmp_path / TENSORS)
    with torch.no_grad():
        compare(logits(pf.load(tmp_path, llama())), model(tokens(2)).logits)


def test_two_adapters_in_one_file_are_told(tmp_path: Path) -> None:
    saved(tmp_path, llama(), lora(target_modules=["q_proj"]))
    tensors = load_file(tmp_path / TENSORS)
    named = {k.replace(".weight", f".{n}.weight"): t.clone() for n in ("one", "two") for k, t in tensors.items()}
    save_file(named, tmp_path / TENSORS)
    with pytest.raises(ValueError, match="two adapters: 'one', 'two'"):
        pf.load(tmp_path, llama())


@pytest.mark.parametrize("name", ["", ".default", ".style_2"])
def test_adapters_names_in_a_single_file(name: str, tmp_path: Path) -> None:
    t = {f"blocks.0.lora_A{name}.weight": noise(2, 6), f"blocks.0.lora_B{name}.weight": noise(6, 2, seed=1)}
    magnitude = f"blocks.0.lora_magnitude_vector{name}{'.weight' if name else ''}"
    save_file(t | {magnitude: noise(6, seed=2)}, tmp_path / "a.safetensors")
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 6)])})
    net, adapter = pf.load(tmp_path / "a.safetensors", model)
    assert net.plan["blocks.0.weight"].method == pf.DoRA(2, attached=True)
    assert torch.equal(adapter["blocks.0.weight"]["a"], t[f"blocks.0.lora_A{name}.weight"])


# What says the scale.


@pytest.mark.parametrize(
    "header",
    [
        {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 5, "use_rslora": False})},
        {"lora_adapter_metadata": json.dumps({"r": 2, "lora_alpha": 1, "alpha_pattern": {"^blocks.0": 5}})},
        {"lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 5})},
        {"ss_network_alpha": "5", "ss_network_dim": "2"},
        {"lora_alpha": "10", "rank": "4"},
    ],
    ids=str,
)
def test_the_scale_is_in_the_header(header: dict[str, str], tmp_path: Path) -> None:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(6, 6)])})
    head = "unet." if "unet" in str(header) else ""
    t = {f"{head}blocks.0.lora_A.weight": noise(2, 6), f"{head}blocks.0.lora_B.weight": noise(6, 2, seed=1)}
    save_file(t, tmp_path / "a.safetensors", header)
    net, _ = pf.load(tmp_path / "a.safetensors", model)
    assert net.plan["blocks.0.weight"].method.scale == 2.5
    for bad in ({"ss_network_alpha": "x"}, {"lora_alpha": "0", "rank": "2"}, {"network_alpha": "3"}):
        save_file(t, tmp_path / "a.safetensors", bad)
        with pytest.raises(ValueError, match="the header's"):
            pf.load(tmp_path / "a.safetensors", model)


# What is no adapter, or one of another model.


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    saved(tmp_path, llama(), lora(target_modules=["q_proj"]))
    shuffled = tmp_path / "moved"
    shuffled.mkdir()
    (tmp_path / TENSORS).rename(shuffled / TENSORS)
    for path in (shuffled, shuffled / TENSORS):
        with pytest.raises(FileNotFoundError, match=r"it has adapter_model\.safetensors, but not adapter_config\.json"):
            pf.load(path, llama())
    (shuffled / TENSORS).rename(shuffled / "lora.safetensors")
    with pytest.raises(ValueError, match=r"PEFT's keys, and adapter_config\.json says"):
        pf.load(shuffled / "lora.safetensors", llama())
    (shuffled / "notes.txt").write_text("no adapter")
    with pytest.raises(FileNotFoundError, match=r"it is a \.txt"):
        pf.load(shuffled / "notes.txt", llama())


@pytest.mark.parametrize("suffix", [".bin", ".pt"])
def test_a_single_pickle_is_read_only_when_asked(suffix: str, tmp_path: Path) -> None:
    model, file = nn.ModuleDict({"q": nn.Linear(6, 6)}), tmp_path / f"lora{suffix}"
    torch.save({"q.lora_A.weight": noise(2, 6), "q.lora_B.weight": noise(6, 2)}, file)
    with pytest.raises(ValueError, match=r"is a pickle.*pickled=True"):
        pf.load(file, model)
    assert list(pf.load(file, model, pickled=True).net.plan) == ["q.weight"]


def test_a_file_of_the_other_half_of_a_model_is_told_with_its_cure(tmp_path: Path) -> None:
    """A language model's adapter onto the vision-language model around it, and back."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = tf.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=8)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**SMALL, **sizes), image_token_index=20)
    both = tf.LlavaForConditionalGeneration(config).eval()
    text = tf.LlamaForCausalLM(config.text_config).eval()
    text.model.load_state_dict(both.model.language_model.state_dict())
    text.lm_head.load_state_dict(both.lm_head.state_dict())
    model = saved(tmp_path / "text", copy.deepcopy(text), lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"key_mapping=\{r'\^model\\\.': 'model\.language_model\.'\}"):
        pf.load(tmp_path / "text", both)
    loaded = pf.load(tmp_path / "text", both, key_mapping={r"^model\.": "model.language_model."})
    with torch.no_grad():
        compare(logits(loaded), model(tokens(2)).logits)
    saved(tmp_path / "both", both, lora(target_modules=r".*language_model.*q_proj"))
    with pytest.raises(ValueError, match=r"key_mapping=\{r'\^model\\\.language_model\\\.': 'model\.'\}"):
        pf.load(tmp_path / "both", text)
    assert len(pf.load(tmp_path / "both", text, key_mapping={r"^model\.language_model\.": "model."}).net.plan) == 2


# Experts.


def experts(parts: tuple[str, ...], rslora: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(a LoRA of each of Mixtral's experts, as transformers 4 had them; the stacked parameters' changes)."""
    rows = {"w1": (0, 12, "gate_up_proj"), "w3": (12, 24, "gate_up_proj"), "w2": (0, 16, "down_proj")}
    tensors, change = {}, {"gate_up_proj": torch.zeros(3, 24, 16), "down_proj": torch.zeros(3, 16, 12)}
    for i in range(3):
        for n, part in enumerate(parts):
            a, b, name = *rows[part][:2], rows[part][2]
            in_ = change[name].shape[2]
            down, up = noise(2, in_, seed=10 * i + n), noise(b - a, 2, seed=100 + 10 * i + n)
            key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{i}.{part}.lora_"
            tensors |= {f"{key}A.weight": down, f"{key}B.weight": up}
            change[name][i, a:b] += 3 / (2**0.5 if rslora else 2) * up @ down
    return tensors, change


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("parts", [("w1", "w2", "w3"), ("w2",), ("w1", "w3"), ("w3",)], ids=str)
def test_single_experts_onto_stacked_ones(parts: tuple[str, ...], rslora: bool, tmp_path: Path) -> None:
    tensors, change = experts(parts, rslora)
    save_file(tensors, tmp_path / TENSORS)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": list(parts), "use_rslora": rslora}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    net, adapter = pf.load(tmp_path, by_name["mixtral"].build())
    head = "model.layers.0.mlp.experts."
    got = net.delta(adapter)
    assert {n.removeprefix(head) for n in got} == {n for n, t in change.items() if t.any()}
    for name, t in got.items():
        torch.testing.assert_close(t, change[name.removeprefix(head)])
    gone = next(k for k in tensors if "experts.1" in k)
    retensor(tmp_path, lambda t: t.pop(gone))
    with pytest.raises(ValueError, match=r"experts\.1\..*missing: the model has 3 experts"):
        pf.load(tmp_path, by_name["mixtral"].build())


def test_unsloths_columns_when_asked(tmp_path: Path) -> None:
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    build = by_name["mixtral"].build
    model = saved(tmp_path, build(), lora(target_modules=[], target_parameters=names))
    want = pf.load(tmp_path, build())
    retensor(
        tmp_path,
        lambda t: t.update({k: v.reshape(len(v), 2, 3).mT.flatten(1) for k, v in t.items() if "lora_B" in k}),
    )
    got = pf.load(tmp_path, build(), experts="unsloth")
    for name, leaf in want.adapter.items():
        assert all(torch.equal(t, got.adapter[name][k]) for k, t in leaf.items())
    with torch.no_grad():
        compare(logits(got), model(tokens(2)).logits)
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(2)})
    pf.save(tmp_path / "native", net, net.init())
    with pytest.raises(ValueError, match="experts has no effect on what is read"):
        pf.load(tmp_path / "native", llama(), experts="unsloth")


# Several adapters, and layers at the root.


def test_a_folder_of_several_has_the_default_one_too(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), lora(target_modules=["q_proj"]))
    model.add_adapter("other", lora(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path)
    loaded = pf.load_all(tmp_path, llama())
    assert {n: next(iter(one.net.plan)).split(".")[-2] for n, one in loaded.items()} == {
        "default": "q_proj",
        "other": "v_proj",
    }
    assert list(pf.load_all(tmp_path, llama(), "other")) == ["other"]
    model.save_pretrained(tmp_path / "default")
    with pytest.raises(ValueError, match="both the adapter 'default'"):
        pf.load_all(tmp_path, llama())


def test_a_layer_at_the_root_keeps_its_name_under_a_table_of_old_ones(tmp_path: Path) -> None:
    class Detects(nn.Module):
        _checkpoint_conversion_mapping = {r"^head": "model.head", r"^old": "model"}  # noqa: RUF012

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 6)
            self.model = nn.ModuleDict({"head": nn.Linear(6, 6), "tail": nn.Linear(6, 6)})

    net = pf.adapt(Detects(), {r"^head\.weight": pf.LoRA(2), r"model\.tail": pf.LoRA(3)})
    pf.save(tmp_path, net, net.init(), format="peft")
    assert list(pf.load(tmp_path, Detects()).net.plan) == ["head.weight", "model.tail.weight"]
    tensors = load_file(tmp_path / TENSORS)
    save_file(
        {k.replace("base_model.model.model.", "base_model.model.old."): t for k, t in tensors.items()},
        tmp_path / TENSORS,
    )
    edit(tmp_path, target_modules=r"head|old\.tail", rank_pattern={"^old.tail": 3}, alpha_pattern={})
    assert [e.method.rank for e in pf.load(tmp_path, Detects()).net.plan.values()] == [2, 3]
