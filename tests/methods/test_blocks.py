"""Methods that add blocks to a model: against the model that has them, and in generate."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from support import close, random
from torch import Tensor, nn

import peftfn as pf

IDS = torch.randint(3, 19, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :2] = 0
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
GENERATE: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def made(kind: str) -> tuple[Any, dict[str, pf.Method]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "gpt2":
            config: Any = tf.GPT2Config(vocab_size=19, n_embd=16, n_layer=4, n_head=2, bos_token_id=1, eos_token_id=2)
            return tf.GPT2LMHeadModel(config).eval(), {r"h\.(1|3)": pf.LlamaPro(zeroed=("c_proj",))}
        if kind == "mistral":
            config = tf.MistralConfig(vocab_size=19, num_key_value_heads=1, sliding_window=4, **SIZES)
            return tf.MistralForCausalLM(config).eval(), {r"layers\.(1|3)": pf.LlamaPro()}
        config = tf.LlamaConfig(vocab_size=19, num_key_value_heads=1, **SIZES)
        return tf.LlamaForCausalLM(config).eval(), {r"layers\.(1|3)": pf.LlamaPro()}


def expanded(net: Any, adapter: Any) -> Any:
    """The model with the new blocks among its own, as modules with indices of their own."""
    model = copy.deepcopy(net.model)
    backbone = model.model if hasattr(model, "model") else model.transformer
    where = "layers" if hasattr(backbone, "layers") else "h"
    blocks: list[nn.Module] = []
    for i, block in enumerate(getattr(backbone, where)):
        blocks.append(block)
        leaf = next((leaf for name, leaf in adapter.items() if name.endswith(f"{where}.{i}")), None)
        if leaf is not None:
            blocks.append(copy.deepcopy(block))
            blocks[-1].load_state_dict({k.replace("__", "."): t for k, t in leaf.items()}, strict=False)
    for i, block in enumerate(blocks):
        for part in block.modules():
            if hasattr(part, "layer_idx"):
                part.layer_idx = i  # type: ignore[assignment]
    setattr(backbone, where, nn.ModuleList(blocks))
    model.config.num_hidden_layers = len(blocks)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[0]] * len(blocks)
    return model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
class TestLlamaPro:
    def test_it_is_the_model_with_the_new_blocks(self, kind: str) -> None:
        model, rules = made(kind)
        net = pf.adapt(model, rules)
        close(net.apply(net.init(), IDS, attention_mask=MASK).logits, model(IDS, attention_mask=MASK).logits)
        a = random(net)
        other = expanded(net, a)
        close(net.apply(a, IDS, attention_mask=MASK).logits, other(IDS, attention_mask=MASK).logits.detach())
        view = pf.as_module(net, a)
        for more in ({}, {"num_beams": 2}, {"use_cache": False}):
            got = view.generate(IDS, attention_mask=MASK, **GENERATE, **more)
            assert torch.equal(got, other.generate(IDS, attention_mask=MASK, **GENERATE, **more)), more

    def test_a_cache_carried_by_hand(self, kind: str) -> None:
        model, rules = made(kind)
        net = pf.adapt(model, rules)
        a = random(net)
        want = net.apply(a, IDS).logits
        first = net.apply(a, IDS[:, :4])
        rest = [first.logits]
        for i in (4, 5):
            rest.append(net.apply(a, IDS[:, i : i + 1], past_key_values=first.past_key_values).logits)
        close(torch.cat(rest, 1), want)

    def test_mixed_rows_and_their_cache(self, kind: str) -> None:
        model, rules = made(kind)
        net = pf.adapt(model, rules)
        adapters = [random(net, seed) for seed in (1, 2)]
        out = net.mixed(pf.stack(adapters), torch.tensor([1, -1, 0]), IDS)
        rows = [net.apply(adapters[1], IDS), model(IDS), net.apply(adapters[0], IDS)]
        close(out.logits, torch.stack([row.logits[i] for i, row in enumerate(rows)]))
        with pytest.raises(ValueError, match=r"6 earlier tokens .* its own rows alone: .*use_cache=False"):
            net.mixed(pf.stack(adapters), torch.tensor([1, -1, 0]), IDS[:, :1], past_key_values=out.past_key_values)

    def test_all_rows_of_one_adapter_of_a_stack_have_a_cache(self, kind: str) -> None:
        model, rules = made(kind)
        net = pf.adapt(model, rules)
        stacked, index = pf.stack([random(net, seed) for seed in (1, 2)]), torch.tensor([1, 1, 1])
        first = net.mixed(stacked, index, IDS[:, :5])
        last = net.mixed(stacked, index, IDS[:, 5:], past_key_values=first.past_key_values)
        close(last.logits, net.mixed(stacked, index, IDS).logits[:, 5:])


class TestLlamaProRefuses:
    def test_a_cache_that_the_block_has_not_seen(self) -> None:
        model, rules = made("llama")
        net = pf.adapt(model, rules)
        cache = model(IDS).past_key_values
        with pytest.raises(ValueError, match=r"layers\.1: the cache has 6 earlier tokens that the new block"):
            net.apply(net.init(), IDS[:, :1], past_key_values=cache)

    def test_several_adapters_on_all_rows_of_a_cache(self) -> None:
        model, rules = made("llama")
        net = pf.adapt(model, rules)
        stacked, gates = pf.stack([random(net, seed) for seed in (1, 2)]), torch.full((3, 2), 0.5)
        first = net.gated(stacked, gates, IDS)
        close(first.logits, net.gated(stacked, gates, IDS, use_cache=False).logits)
        with pytest.raises(ValueError, match="the cache has 6 earlier tokens"):
            net.gated(stacked, gates, IDS[:, :1], past_key_values=first.past_key_values)

    def test_a_cache_of_fixed_size(self) -> None:
        model, rules = made("llama")
        net = pf.adapt(model, rules)
        with pytest.raises(ValueError, match="a StaticCache has no room for one: give a DynamicCache"):
            pf.as_module(net, random(net)).generate(IDS, cache_implementation="static", **GENERATE)

    @pytest.mark.parametrize(
        ("at", "zeroed", "text"),
        [
            ("self_attn", ("o_proj", "down_proj"), "a LlamaAttention has no down_proj: name a block"),
            (r"layers\.0", (), "has no parts to begin at 0"),
            ("norm", ("o_proj",), "its parts are none"),
        ],
    )
    def test_a_module_that_is_no_block(self, at: str, zeroed: tuple[str, ...], text: str) -> None:
        with pytest.raises(ValueError, match=text):
            pf.adapt(made("llama")[0], {at: pf.LlamaPro(zeroed=zeroed)})


def test_the_gradient_of_a_new_block() -> None:
    """At the start, the last projections alone have one, since what is before them is multiplied by 0."""
    model, rules = made("llama")
    net = pf.adapt(model, rules)

    def loss(a: Any) -> Tensor:
        out: Tensor = net.apply(a, IDS, labels=IDS).loss
        return out

    for name, leaf in torch.func.grad(loss)(net.init()).items():
        moving = {k for k, g in leaf.items() if g.abs().max() > 0}
        assert moving == {"self_attn__o_proj__weight", "mlp__down_proj__weight"}, name
    assert all(g.abs().max() > 0 for leaf in torch.func.grad(loss)(random(net)).values() for g in leaf.values())
