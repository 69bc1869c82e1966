"""check finds each thing that it looks for, and nothing else."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import noise
from support import random
from torch import nn
from transformers import LlamaConfig

import peftfn as pf

SIZES = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "pad_token_id": 0,
}  # fmt: skip


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))


def kinds(found: tuple[pf.Finding, ...]) -> list[tuple[str, str]]:
    assert all(f.what and f.cure and str(f).startswith(f.kind) for f in found)
    return [(f.kind, f.where) for f in found]


@pytest.mark.parametrize("method", [pf.LoRA(2), pf.DoRA(2), pf.IA3(), pf.OFT(2), pf.BEFT(), pf.Full()], ids=str)
def test_a_trained_adapter_has_no_finding_and_a_fresh_one_is_the_identity(method: pf.Method) -> None:
    net, x = pf.adapt(plain(), {"weight": method}), noise(3, 8)
    loss = lambda a: net.apply(a, x).square().sum()  # noqa: E731
    assert kinds(pf.check(net)) == []
    assert kinds(pf.check(net, random(net), loss)) == []
    assert kinds(pf.check(net, net.init(), loss)) == [("identity", "")]


def test_sites_that_stay_and_gradients_that_do_not_come() -> None:
    net, x = pf.adapt(plain(), {"weight": pf.LoRA(2)}), noise(3, 8)
    a = random(net)
    half = a | {"2.weight": net.init()["2.weight"]}
    assert kinds(pf.check(net, half)) == [("dead", "2.weight")]
    first = lambda a: (x @ (a["0.weight"]["b"] @ a["0.weight"]["a"]).T).square().sum()  # noqa: E731
    assert kinds(pf.check(net, a, first)) == [("untrained", "2.weight")]
    assert kinds(pf.check(net, a, lambda a: net.model(x).sum() + 0 * a["0.weight"]["a"].sum())) == [("untrained", "")]


def test_numbers_that_are_none_and_half_precision() -> None:
    net, x = pf.adapt(plain(), {"weight": pf.LoRA(2)}), noise(3, 8)
    a = random(net)
    bad = a | {"0.weight": {"a": a["0.weight"]["a"] / 0, "b": a["0.weight"]["b"]}}
    assert ("nan", "0.weight") in kinds(pf.check(net, bad))
    assert kinds(pf.check(net, a, lambda a: (net.apply(a, x) * float("nan")).sum())) == [
        ("nan", "0.weight"), ("nan", "2.weight")
    ]  # fmt: skip
    halves = {n: {k: t.bfloat16() for k, t in leaf.items()} for n, leaf in a.items()}
    assert kinds(pf.check(net, halves)) == [("dtype", "0.weight"), ("dtype", "2.weight")]
    with torch.no_grad():
        net.model[0].weight[0, 0] = float("inf")
    assert kinds(pf.check(net, a))[0] == ("nan", "0.weight")


def test_a_head_that_no_rule_trains() -> None:
    model = transformers.LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3))
    net = pf.adapt(model, pf.targets(model, pf.LoRA(2)))
    assert kinds(pf.check(net)) == [("head", "score")]
    assert kinds(pf.check(pf.adapt(model, pf.targets(model, pf.LoRA(2), task="SEQ_CLS")))) == []
    assert kinds(pf.check(pf.adapt(model, {"score": pf.LoRA(2)}))) == []


def test_a_grown_vocabulary(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert kinds(pf.check(pf.adapt(model, {"q_proj": pf.LoRA(2)}))) == []
    model.resize_token_embeddings(23)
    (found,) = pf.check(pf.adapt(model, {"q_proj": pf.LoRA(2)}))
    assert (found.kind, found.where) == ("vocabulary", "model.embed_tokens") and "range(20, 23)" in found.cure
    tokens = pf.TrainableTokens(tokens=(20, 21, 22))
    assert kinds(pf.check(pf.adapt(model, {"q_proj": pf.LoRA(2), "embed_tokens": tokens}))) == []


def test_statistics_ties_and_modes() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4))
    assert kinds(pf.check(pf.adapt(model, {r"0\.weight": pf.LoRA(1)}))) == [("statistics", "1")]
    assert kinds(pf.check(pf.adapt(model, {r"0\.weight": pf.LoRA(1), "1": pf.Full()}))) == []
    model.eval()
    assert kinds(pf.check(pf.adapt(model, {r"0\.weight": pf.LoRA(1)}))) == []
    assert kinds(pf.check(pf.adapt(model, {r"0\.weight": pf.LoRA(1, dropout=0.1)}))) == [("mode", "0.weight")]
    tied: Any = transformers.LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    assert kinds(pf.check(pf.adapt(tied, {"embed_tokens": pf.LoRA(1)}))) == [("tied", "model.embed_tokens.weight")]
    assert kinds(pf.check(pf.adapt(tied, {"embed_tokens|lm_head": pf.LoRA(1)}))) == [
        ("tied", "model.embed_tokens.weight")
    ]
    assert kinds(pf.check(pf.adapt(tied, {"lm_head": pf.TiedTokens(tokens=(1, 2))}))) == [("tied", "lm_head.weight")]
    assert kinds(pf.check(pf.adapt(tied, {"embed_tokens|lm_head": pf.TiedTokens(tokens=(1, 2))}))) == []


def test_what_is_refused() -> None:
    net = pf.adapt(plain(), {"weight": pf.LoRA(2)})
    with pytest.raises(TypeError, match="not Sequential"):
        pf.check(net.model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="give the adapter too"):
        pf.check(net, loss=lambda a: torch.zeros(()))
    with pytest.raises(KeyError, match="lacks"):
        pf.check(net, {})


def test_the_page_has_a_line_for_each_kind() -> None:
    source = (Path(pf.__file__).parent / "tools" / "check.py").read_text()
    known = set(re.findall(r'Finding\(\s*"(\w+)"', source))
    page = (Path(pf.__file__).parent.parent / "docs" / "troubleshooting.md").read_text()
    assert len(known) >= 9 and all(f"| `{kind}`" in page or f", or `{kind}`" in page for kind in known)
