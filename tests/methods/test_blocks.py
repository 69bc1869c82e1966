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
        """Rows of two adapters and of the base: a forward, two steps by hand, and all of `generate`."""
        model, rules = made(kind)
        net = pf.adapt(model, rules)
        adapters, index = [random(net, seed) for seed in (1, 2)], torch.tensor([1, -1, 0])
        want = torch.cat(
            [
                net.apply(adapters[1], IDS[:1], attention_mask=MASK[:1]).logits,
                model(IDS[1:2]).logits,
                net.apply(adapters[0], IDS[2:]).logits,
            ]
        )
        out = net.mixed(pf.stack(adapters), index, IDS[:, :4], attention_mask=MASK[:, :4])
        steps = [out.logits]
        for i in (4, 5):
            more: Any = {"attention_mask": MASK[:, : i + 1], "past_key_values": out.past_key_values}
            steps.append(net.mixed(pf.stack(adapters), index, IDS[:, i : i + 1], **more).logits)
        got = torch.cat(steps, 1)
        close(got[MASK.bool()], want[MASK.bool()])
        alone = [pf.as_module(net, adapters[1]), model, pf.as_module(net, adapters[0])]
        for options in ({}, {"num_beams": 2}):
            ids = net.mixed(
                pf.stack(adapters), index, IDS, attention_mask=MASK, method="generate", **GENERATE, **options
            )
            for i, m in enumerate(alone):
                some: Any = {"attention_mask": MASK[i : i + 1], **GENERATE, **options}
                assert torch.equal(ids[i : i + 1], m.generate(IDS[i : i + 1], **some)), (i, options)

    def test_several_adapters_on_all_rows_with_a_cache(self, kind: str) -> None:
        """Each has a layer of its own, with all rows."""
        model, rules = made(kind)
        net = pf.adapt(model, rules)
        stacked, gates = pf.stack([random(net, seed) for seed in (1, 2)]), torch.tensor([0.5, 0.25]).expand(3, 2)
        whole = net.gated(stacked, gates, IDS, use_cache=False).logits
        first = net.gated(stacked, gates, IDS[:, :4])
        last = net.gated(stacked, gates, IDS[:, 4:], past_key_values=first.past_key_values)
        close(torch.cat([first.logits, last.logits], 1), whole)

    def test_the_gradient_of_mixed_rows_with_a_cache(self, kind: str) -> None:
        model, rules = made(kind)
        net = pf.adapt(model, rules)
        stacked, index = pf.stack([random(net, seed) for seed in (1, 2)]), torch.tensor([1, -1, 0])

        def cached(a: Any) -> Tensor:
            first = net.mixed(a, index, IDS[:, :4])
            last = net.mixed(a, index, IDS[:, 4:], past_key_values=first.past_key_values)
            return torch.cat([first.logits, last.logits], 1).square().mean()

        def whole(a: Any) -> Tensor:
            out: Tensor = net.mixed(a, index, IDS, use_cache=False).logits
            return out.square().mean()

        got, want = torch.func.grad(cached)(stacked), torch.func.grad(whole)(stacked)
        for g, w in zip(pf.leaves(got), pf.leaves(want), strict=True):
            close(g, w)

    def test_all_rows_of_one_adapter_of_a_stack_have_a_cache(self, kind: str) -> None:
        model, rules = made(kind)
        net = pf.adapt(model, rules)
        stacked, index = pf.stack([random(net, seed) for seed in (1, 2)]), torch.tensor([1, 1, 1])
        first = net.mixed(stacked, index, IDS[:, :5])
        last = net.mixed(stacked, index, IDS[:, 5:], past_key_values=first.past_key_values)
        close(last.logits, net.mixed(stacked, index, IDS).logits[:, 5:])


def families() -> dict[str, tuple[Any, Any]]:
    """Adapters of every family for one model, with new blocks among them."""
    model, rules = made("llama")
    nets = {
        "blocks": pf.adapt(model, rules),
        "block": pf.adapt(model, {r"layers\.3": pf.LlamaPro()}),
        "lora": pf.adapt(model, {r"[qv]_proj": pf.LoRA(rank=2)}),
        "bottleneck": pf.adapt(model, {"mlp": pf.Bottleneck(4)}),
        "prompt": pf.adapt(model, {"model": pf.PromptTuning(5)}),
        "prefix": pf.adapt(model, {"model": pf.PrefixTuning(2)}),
        "blocks, prefix": pf.adapt(model, {**rules, "model": pf.PrefixTuning(3)}),
        "blocks, prompt, lora": pf.adapt(
            model, {**rules, "model": pf.PromptTuning(2), r"layers\.[02].*v_proj": pf.LoRA(rank=2)}
        ),
    }
    return {n: (net, random(net, i)) for i, (n, net) in enumerate(nets.items())}


def test_rows_of_every_family_generate_beside_rows_with_new_blocks() -> None:
    given, model = families(), made("llama")[0]
    names = ["__base__", *reversed(given), "blocks"]
    ids = torch.randint(3, 19, (len(names), 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[::2, :2] = 0
    got = pf.bank(given).apply(names, ids, attention_mask=mask, method="generate", **GENERATE)
    logits = pf.bank(given).apply(names, ids, attention_mask=mask).logits
    for i, n in enumerate(names):
        row: Any = (ids[i : i + 1], mask[i : i + 1])
        m: Any = model if n == "__base__" else pf.as_module(*given[n])
        assert torch.equal(got[i : i + 1], m.generate(row[0], attention_mask=row[1], **GENERATE)), n
        close(logits[i][mask[i].bool()], m(row[0], attention_mask=row[1]).logits[0][mask[i].bool()])


def test_a_new_block_has_no_prefix() -> None:
    """The prefix is in the model's own layers: with blocks that add nothing, the outputs are the prefix's alone."""
    model, rules = made("llama")
    prefixed = pf.adapt(model, {"model": pf.PrefixTuning(3)})
    net = pf.adapt(model, {**rules, "model": pf.PrefixTuning(3)})
    a, b = net.init(), random(prefixed)
    a["model"] = b["model"]
    close(net.apply(a, IDS, attention_mask=MASK).logits, prefixed.apply(b, IDS, attention_mask=MASK).logits)
    a = random(net)
    first = net.apply(a, IDS[:, :4])
    steps = [first.logits]
    for i in (4, 5):
        steps.append(net.apply(a, IDS[:, i : i + 1], past_key_values=first.past_key_values).logits)
    close(torch.cat(steps, 1), net.apply(a, IDS).logits)


class TestLlamaProRefuses:
    def test_a_cache_that_the_block_has_not_seen(self) -> None:
        model, rules = made("llama")
        net = pf.adapt(model, rules)
        cache = model(IDS).past_key_values
        with pytest.raises(ValueError, match=r"layers\.1: the cache has 6 earlier positions, and the adapter has"):
            net.apply(net.init(), IDS[:, :1], past_key_values=cache)

    def test_a_cache_that_began_with_other_adapters(self) -> None:
        model, rules = made("llama")
        net = pf.adapt(model, rules)
        a = pf.stack([random(net)])
        cache = net.mixed(a, torch.tensor([-1, -1, -1]), IDS).past_key_values
        with pytest.raises(ValueError, match=r"6 earlier positions, and the adapter has seen 0 .* use_cache=False"):
            net.mixed(a, torch.tensor([0, -1, -1]), IDS[:, :1], past_key_values=cache)

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
