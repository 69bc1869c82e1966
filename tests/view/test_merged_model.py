"""merged_model: a plain model with the adapter in its weights, of any method, kind of layer and architecture."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from models import by_name, tokens
from support import random, same_state, state
from torch import nn

import peftfn as pf
from peftfn import DoRA, Full, LoRA


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_it_is_the_model_with_the_adapter_in_its_weights(name: str) -> None:
    case = by_name[name]
    model = case.build()
    before = state(model)
    net = pf.adapt(model, {r"(q|v)_proj|query|c_attn|SelfAttention\.q": DoRA(2), "norm|LayerNorm|ln_1": Full()})
    a, x = random(net), tokens(2)
    plain, given = pf.merged_model(net, a), {"decoder_input_ids": x} if name == "t5" else {}
    assert type(plain) is type(model) and plain.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(plain(x, **given)[0], net.apply(a, x, **given)[0], rtol=1e-4, atol=1e-5)
    shared = {p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert not shared, "a parameter is the base's own"
    plain.train().requires_grad_(True)
    plain(x, **given)[0].square().mean().backward()
    torch.optim.SGD(plain.parameters(), 1.0).step()
    assert same_state(before, state(model))


def test_it_keeps_modes_gradients_ties_and_buffers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Embedding(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Any) -> Any:
            return self.head(self.norm(self.embed(ids)))

    model = Tied().eval()
    model.norm.weight.requires_grad_(False)
    model.norm.running_mean.fill_(0.5)  # type: ignore[union-attr, operator]
    ids, net = torch.arange(5), pf.adapt(model, {"embed|head": pf.TiedTokens((1, 2)), "norm.bias": Full()})
    a = random(net)
    plain = pf.merged_model(net, a)
    torch.testing.assert_close(plain(ids), net.apply(a, ids))
    assert plain.head.weight is plain.embed.weight and not plain.training
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    one = pf.adapt(model, {"embed": LoRA(2)})
    b = random(one)
    with pytest.raises(ValueError, match="tied to head"):
        pf.merged_model(one, b)
    apart = pf.merged_model(one, b, untied=True)
    assert apart.head.weight is not apart.embed.weight
    torch.testing.assert_close(apart(ids), one.apply(b, ids))


def test_a_configuration_says_that_weights_are_no_longer_tied(tmp_path: Path) -> None:
    config = tf.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    tf.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    net = pf.adapt(model, {"embed_tokens": LoRA(2)})
    a, ids = random(net), torch.arange(6)[None]
    plain = pf.merged_model(net, a, untied=True)
    assert model.config.tie_word_embeddings and not plain.config.tie_word_embeddings
    plain.save_pretrained(tmp_path)
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, net.apply(a, ids).logits, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_merged_is_an_error() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(4, 3, bias=False)), {"0.weight": LoRA(2, lora_bias=True)})
    with pytest.raises(ValueError, match="adds a bias"):
        pf.merged_model(net, random(net))
    with pytest.raises(TypeError, match="merged_model takes"):
        pf.merged_model(nn.Linear(2, 2), {})  # type: ignore[arg-type]
    net = pf.adapt(nn.Linear(4, 3), {"weight": LoRA(2)})
    a = random(net)
    a["weight"]["b"][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"weight: the merged parameter has \d+ values that are not finite"):
        pf.merged_model(net, a, check_finite=True)
