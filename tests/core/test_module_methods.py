"""Plans with methods at modules: which modules rules find, what a place tells, and what is refused before a call."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers as tf
from support import close, random, state
from torch import Tensor, nn

import peftfn as pf
from peftfn.method import Leaf

TINY: dict[str, Any] = {"vocab_size": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def on_meta(cls: Any, config: Any) -> Any:
    with torch.device("meta"):
        return cls(config)


LLAMA = tf.LlamaConfig(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **TINY
)
QWEN = tf.Qwen3MoeConfig(
    hidden_size=32, intermediate_size=24, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, head_dim=8,
    num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, decoder_sparse_step=1, **TINY,
)  # fmt: skip
T5 = tf.T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0, **TINY)
GPT2 = tf.GPT2Config(n_embd=16, n_layer=1, n_head=4, **TINY)
BERT = tf.BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4, **TINY)
WIDTHS = [
    (tf.LlamaForCausalLM, LLAMA, {"model.layers.0.mlp": 16, "model.layers.1.self_attn": 16, "lm_head": 24}, "model"),
    (tf.Qwen3MoeForCausalLM, QWEN, {"model.layers.0.mlp": 32, "model.layers.0.self_attn": 32}, "model"),
    (tf.T5ForConditionalGeneration, T5, {"encoder.block.0.layer.1.DenseReluDense": 16}, "encoder, decoder"),
    (tf.GPT2LMHeadModel, GPT2, {"transformer.h.0.mlp": 16, "transformer.h.0.attn.c_attn": 48}, "transformer"),
    (tf.BertForSequenceClassification, BERT, {"bert.encoder.layer.0.intermediate": 24, "classifier": 2}, "bert"),
    (tf.LlamaModel, LLAMA, {"layers.0": 16, "": 16}, ""),
]


@pytest.mark.parametrize(("cls", "config", "widths", "backbones"), WIDTHS, ids=[c.__name__ for c, *_ in WIDTHS])
def test_widths_and_backbones_of_real_models(cls: Any, config: Any, widths: dict[str, int], backbones: str) -> None:
    model = on_meta(cls, config)
    found = pf.places(model)
    assert {n: found[n].shape[0] for n in widths} == widths
    assert ", ".join(pf.places(model, backbones=True)) == backbones
    assert not any(isinstance(model.get_submodule(n), nn.ModuleList | nn.ModuleDict) for n in found)


def test_a_pattern_is_matched_at_the_end_of_a_module_s_name() -> None:
    model = on_meta(tf.LlamaForCausalLM, LLAMA)
    named = {
        "mlp": ["model.layers.0.mlp", "model.layers.1.mlp"],
        "1.mlp": ["model.layers.1.mlp"],
        r"layers\.\d": ["model.layers.0", "model.layers.1"],
        "lm_head": ["lm_head"],
        "model": ["model"],
    }
    for pattern, names in named.items():
        assert [s.name for s in pf.describe(model, pattern, what="modules")] == names
        assert list(pf.adapt(model, {pattern: pf.Bottleneck(2)}).plan) == names
    assert list(pf.adapt(model, {"": pf.Bottleneck(2, dim=24)}).plan) == [""]
    mixed = pf.adapt(model, {"down_proj": pf.LoRA(2), r"down_proj$": pf.Bottleneck(2)})
    assert sorted({e.site.kind for e in mixed.plan.values()}) == ["linear", "module"]
    assert len(mixed.plan) == 4


def test_describe_lists_modules_and_backbones() -> None:
    model = on_meta(tf.LlamaForCausalLM, LLAMA)
    lines = str(pf.describe(model, "mlp|self_attn", what="modules")).splitlines()
    assert [line.split() for line in lines] == [
        ["module", "class", "width", "dtype"],
        ["model.layers.[0-1].self_attn", "LlamaAttention", "16", "float32"],
        ["model.layers.[0-1].mlp", "LlamaMLP", "16", "float32"],
        ["4", "modules"],
    ]
    assert [s.name for s in pf.describe(model, what="backbones")] == ["model"]
    with pytest.raises(ValueError, match="what is 'layers'; choose one of"):
        pf.describe(model, what="layers")  # type: ignore[arg-type]
    assert all("." in s.name and s.kind not in ("module", "tokens") for s in pf.describe(model))


@dataclass(frozen=True)
class Odd(pf.ModuleMethod):
    """A method that does one thing wrong."""

    what: str = ""

    def init(self, rng: pf.Rng, m: pf.Place) -> Leaf:
        weight: Any = m.module._parameters["weight"]
        return {"a": weight if self.what == "alias" else rng.zeros(m.width)}

    def after(self, p: Leaf, m: pf.Place, x: Tensor, y: Tensor, *seen: Tensor) -> Tensor:
        if self.what == "shape":
            return y[..., :-1]
        if self.what == "size":
            return y + p["a"][:-1]
        return y + p["a"].sum() if p["a"].sum() > 0 and self.what == "value" else y + p["a"]


@dataclass(frozen=True)
class Idle(pf.ModuleMethod):
    """It defines nothing."""

    def init(self, rng: pf.Rng, m: pf.Place) -> Leaf:
        return {"a": rng.zeros(1)}


REFUSED: list[tuple[pf.Method, str]] = [
    (Odd("alias"), r"0 \[6\]: Odd\.init returns 'a', which shares memory with weight of the module 0.*clone"),
    (Odd("shape"), r"0 \[6\]: Odd\.after returns \[2, 3, 5\] for hidden states \[2, 3, 6\]"),
    (Idle(), r"0 \[6\]: Idle must define before, after or leave"),
    (pf.LlamaAdapter(2), r"0 \[6\]: a Linear has no q_proj, k_proj"),
]


@pytest.mark.parametrize(("method", "match"), REFUSED, ids=lambda v: str(v)[:20])
def test_what_is_wrong_is_found_by_adapt(method: pf.Method, match: str) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    before = state(model)
    with pytest.raises(ValueError, match=match):
        pf.adapt(model, {"0": method})
    assert str(before) == str(state(model))


@pytest.mark.parametrize("what", ["size", "value"])
def test_an_error_of_a_function_says_which(what: str) -> None:
    with pytest.raises(RuntimeError) as info:
        pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"0": Odd(what)})
    notes = " ".join(info.value.__notes__)
    assert "in Odd.after, which runs on the meta device first" in notes and "at 0 [6]: Odd" in notes


def test_rules_that_find_nothing_and_widths_that_nobody_knows() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Linear(8, 6))
    with pytest.raises(ValueError, match=r"rule 'mlp' matches none of the model's 4 modules"):
        pf.adapt(model, {"mlp": pf.Bottleneck(2)})
    for name in ("0", "1"):
        with pytest.raises(ValueError, match=rf"{name} \[0\]: the size of the hidden states .* give the method dim=…"):
            pf.adapt(model, {name: pf.Bottleneck(2)})
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert list(pf.places(encoder)) == [""]  # torch's fast path does not call its parts
    with pytest.raises(TypeError, match=r"derive from peftfn\.Weight.* or from peftfn\.ModuleMethod"):
        type("Neither", (pf.Method,), {})


def test_nothing_of_it_merges_and_the_rest_does() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2)).eval()
    net = pf.adapt(model, {"0.weight": pf.LoRA(2), "2": pf.Bottleneck(2)})
    a = random(net, 1)
    for refused in (net.merge, net.delta):
        with pytest.raises(ValueError, match=r"2: Bottleneck\(rank=2\) acts on what this module takes or returns"):
            refused(a)
    assert not net.bias_deltas(a)
    rest = pf.adapt(model, {"0.weight": pf.LoRA(2)})
    merged = copy.deepcopy(model)
    merged.load_state_dict(rest.merge({"0.weight": a["0.weight"]}))
    x = torch.randn(3, 8)
    close(pf.adapt(merged, {"2": pf.Bottleneck(2)}).apply({"2": a["2"]}, x), net.apply(a, x))


def test_adapters_of_modules_stay_plain_tensors() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"0": pf.Bottleneck(2), "weight": pf.LoRA(2)})
    a = net.init()
    placed = pf.distribute(net, a)
    assert all(placed[n][k] is t for n, leaf in a.items() for k, t in leaf.items())
    assert set(net.weights) == {"0.weight", "0.bias"}


def test_algebra_where_it_has_a_meaning() -> None:
    model = on_meta(tf.LlamaForCausalLM, LLAMA).to_empty(device="cpu")
    net = pf.adapt(model, {"mlp": pf.Bottleneck(2), "self_attn": pf.LlamaAdapter(2)})
    a = net.init()
    with pytest.raises(ValueError, match=r"self_attn: LlamaAdapter\(n=2\) has no scaling and no sum"):
        net.apply(pf.scale(a, 0.5), torch.tensor([[1]]))
    part = {n: pf.scale(a, 0.5)[n] if n.endswith("mlp") else a[n] for n in a}
    net.plan.check(part)
    for methods, error, match in [
        ((pf.Bottleneck(2), pf.LoRA(2)), TypeError, "methods of one family"),
        ((pf.LlamaAdapter(2), pf.Bottleneck(2)), ValueError, "sees the whole output"),
    ]:
        with pytest.raises(error, match=match):
            pf.chain(*methods)


def test_a_module_that_is_another_one_now() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh()).eval()
    net = pf.adapt(model, {"0": pf.Bottleneck(2)})
    a, x = random(net, 1), torch.randn(3, 8)
    net.apply(a, x)
    model[0] = nn.Linear(8, 6)
    fresh = pf.adapt(model, {"0": pf.Bottleneck(2)})
    close(net.apply(a, x), fresh.apply(a, x))
    model.double()
    assert net.apply(a, x.double()).dtype == torch.float64
    model[0] = nn.Linear(8, 5).double()
    for call in (lambda: net.apply(a, x.double()), net.init, lambda: net.prepare(a), lambda: pf.as_module(net, a)):
        with pytest.raises(ValueError, match=r"0: the model's module has shape \[5\] now"):
            call()
    with pytest.raises(KeyError, match=r"params has '0', which is no parameter"):
        net.apply(a, x, params={"0": x})
