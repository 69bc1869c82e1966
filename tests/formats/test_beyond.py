"""What a model holds beyond the base that it is named after: fresh heads and new tokens, which no base brings back."""

from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers as tf
from models import SMALL, by_name, tokens
from safetensors.torch import load_file
from support import compare, random
from torch import Tensor, nn

import peftfn as pf
from peftfn.formats.beyond import Beyond

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
OLD, NEW = SMALL["vocab_size"], SMALL["vocab_size"] + 3
RULES: dict[str, dict[str, pf.Method]] = {
    "no rule for the head": {"q_proj": pf.LoRA(rank=2)},
    "a trained head": {"q_proj": pf.LoRA(rank=2), "score": pf.Full()},
    "an adapted head": {"q_proj": pf.LoRA(rank=2), "score": pf.LoRA(rank=2)},
    "whole parameters alone": {"model.norm": pf.Full()},
    "a prompt": {".*": pf.PromptTuning(n=2)},
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    by_name["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def classifier(base: Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)  # the head is drawn
    model: nn.Module = tf.LlamaForSequenceClassification.from_pretrained(base, pad_token_id=0)
    return model


def outputs(net: pf.Adapted, a: pf.Adapter, x: Tensor) -> Tensor:
    with torch.no_grad():
        y: Tensor = net.apply(a, x).logits
    return y


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("format", ["native", "peft"])
def test_a_fresh_head_comes_back(format: str, rules: str, base: Path, tmp_path: Path) -> None:
    net = pf.adapt(classifier(base, 1), RULES[rules])
    a, x = random(net), tokens(2)
    want = outputs(net, a, x)
    pf.save(tmp_path / "a", net, a, format=format)
    compare(outputs(*pf.load_model(tmp_path / "a", pad_token_id=0), x), want)
    # and onto a model that somebody else loaded: exactly, or told
    if format == "native":
        with pytest.raises(ValueError, match=r"score\.weight is a parameter that the base did not have.*buffers=True"):
            pf.load(tmp_path / "a", classifier(base, 2))
        model = classifier(base, 2)
        loaded = pf.load(tmp_path / "a", model, buffers=True)
        assert loaded.buffers.keys() == {"score.weight"}
        model.load_state_dict(dict(loaded.buffers), strict=False)
        compare(outputs(*loaded, x), want)
        pf.load(tmp_path / "a", net.model)  # the same one needs nothing
    else:
        compare(outputs(*pf.load(tmp_path / "a", classifier(base, 2)), x), want)
        if rules != "a prompt":
            theirs = peft.PeftModel.from_pretrained(classifier(base, 2), tmp_path / "a").eval()
            with torch.no_grad():
                compare(theirs(x).logits, want)


def grown(base: Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = tf.LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(NEW, mean_resizing=False)
    return model


GROWN: dict[str, dict[str, pf.Method]] = {
    "elsewhere": {"q_proj": pf.LoRA(rank=2)},
    "at the embedding": {"embed_tokens": pf.LoRA(rank=2)},
    "new tokens": {"q_proj": pf.LoRA(rank=2), "embed_tokens": pf.TrainableTokens((OLD, OLD + 1))},
    "in full": {"q_proj": pf.LoRA(rank=2), "embed_tokens": pf.Full()},
    "in full alone": {"embed_tokens": pf.Full()},
}


@pytest.mark.parametrize("rules", GROWN)
@pytest.mark.parametrize("format", ["native", "peft"])
def test_new_tokens_come_back(format: str, rules: str, base: Path, tmp_path: Path) -> None:
    net = pf.adapt(grown(base, 1), GROWN[rules])
    a, x = random(net), torch.arange(OLD - 3, NEW)[None]
    want = outputs(net, a, x)
    pf.save(tmp_path / "a", net, a, format=format)
    compare(outputs(*pf.load_model(tmp_path / "a"), x), want)
    with pytest.raises(ValueError, match=rf"resize_token_embeddings\({NEW}\)|made for another model"):
        pf.load(tmp_path / "a", tf.LlamaForCausalLM.from_pretrained(base))
    if format == "native":
        with pytest.raises(ValueError, match=r"(embed_tokens|lm_head)\.weight has rows of new tokens that differ"):
            pf.load(tmp_path / "a", grown(base, 2))
        stored = load_file(tmp_path / "a" / "adapter.safetensors")
        assert {k: len(t) for k, t in stored.items() if k.startswith("rows/")} == {
            "rows/model.embed_tokens.weight": 3,
            "rows/lm_head.weight": 3,
        }
    else:
        theirs = peft.PeftModel.from_pretrained(grown(base, 2), tmp_path / "a").eval()
        with torch.no_grad():
            compare(theirs(x).logits, want)


def test_what_the_base_has_is_in_no_file(base: Path, tmp_path: Path) -> None:
    """In any spelling of its names, tied or not, and whatever the class."""
    whole = tf.LlamaForCausalLM.from_pretrained(base)
    assert not Beyond.of(whole)
    whole.model.save_pretrained(tmp_path / "inner")
    inner = tf.LlamaForCausalLM.from_pretrained(tmp_path / "inner")
    assert Beyond.of(inner).fresh.keys() == {"lm_head.weight"}  # of names without the prefix
    tied = tf.LlamaForCausalLM.from_pretrained(tmp_path / "inner", tie_word_embeddings=True)
    assert not Beyond.of(tied)
    assert not Beyond.of(tf.LlamaModel.from_pretrained(base))
    for other in (by_name["llama"].build(), nn.Linear(2, 2)):  # without a base
        assert not Beyond.of(other)
    net = pf.adapt(classifier(base, 1), {"q_proj": pf.LoRA(rank=2)})
    pf.save(tmp_path / "a", net, net.init(), format="peft", fresh=False)
    assert not any("score" in k for k in load_file(tmp_path / "a" / "adapter_model.safetensors"))


def test_a_poolers_weights_are_fresh_too(tmp_path: Path) -> None:
    c: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tf.BertForMaskedLM(tf.BertConfig(**SMALL, **c)).save_pretrained(tmp_path / "base")
    model = tf.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    names = {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert Beyond.of(model).fresh.keys() == names


@pytest.mark.parametrize("parts", [False, True], ids=["one file", "several"])
def test_the_base_in_the_hubs_cache(parts: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = tmp_path / "cache" / "models--some--base"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    where = repo / "snapshots" / ("0" * 40)
    tf.LlamaForCausalLM.from_pretrained(base).save_pretrained(where, max_shard_size="10KB" if parts else "1GB")
    assert (where / "model.safetensors.index.json").is_file() == parts
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for model, fresh, rows in ((classifier(base, 1), {"score.weight"}, 0), (grown(base, 1), set(), 2)):
        model.name_or_path = "some/base"
        found = Beyond.of(model)
        assert found.fresh.keys() == fresh and list(found.grown.values()) == [OLD] * rows
        model.name_or_path = "some/other"
        assert not Beyond.of(model)


def test_formats_without_a_place_for_it_refuse(base: Path, tmp_path: Path) -> None:
    net = pf.adapt(classifier(base, 1), {"q_proj": pf.LoRA(rank=2)})
    for format in ("swift", "mlx", "kohya"):
        with pytest.raises(ValueError, match=r"score\.weight has values that are not in the base.*fresh=False"):
            pf.save(tmp_path / "a", net, net.init(), format=format)
    assert not (tmp_path / "a").exists()
    pf.save(tmp_path / "a", net, net.init(), format="swift", fresh=False)
