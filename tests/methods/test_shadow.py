"""ShadowPEFT against PEFT itself: outputs, gradients, both losses, generate, files both ways; and what is refused."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support import random, small_gpt2
from torch import Tensor

import peftfn as pf
from peftfn.methods.modules.shadow import shadow_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # PEFT asks for it
IDS = torch.randint(3, 32, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 7, dtype=torch.long)
MASK[1, :2] = 0
SITES = {"llama": "model", "gpt2": "transformer"}
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"shadow_num_hidden_layers": 2, "shadow_hidden_size": 8, "update_hidden_size": 3}),
    ("llama", {"share_embeddings": False, "target_modules": ["model.layers.0", "model.layers.1"]}),
    ("llama", {"modules_to_save": ["lm_head"]}),
    ("gpt2", {}),
]


@cache
def base(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "gpt2":
            return tf.GPT2LMHeadModel(small_gpt2(3)).eval()
        sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "pad_token_id": 0}
        sizes |= {"vocab_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval()


def theirs(name: str, **options: Any) -> Any:
    """PEFT's model in eval mode, with noise in all that is trained."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.ShadowConfig(r=2, task_type="CAUSAL_LM", **options)
        model: Any = peft.get_peft_model(copy.deepcopy(base(name)), config).eval()
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.3 * torch.randn_like(p)
    return model


def shaken(net: pf.Adapted, seed: int = 0) -> Any:
    return random(net, seed, scale=0.3)


def close(a: Tensor, b: Tensor, at: Any = 1.0) -> None:
    torch.testing.assert_close(a * at, b * at, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_equals_peft(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = theirs(name, **options)
    model.save_pretrained(tmp_path)
    net, adapter = loaded = pf.load(tmp_path, base(name))
    assert loaded.extra["auxiliary_loss_weight"] == 0.05
    adapter = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in adapter.items()}
    labels = IDS.masked_fill(MASK == 0, -100)
    want = model(input_ids=IDS, attention_mask=MASK, labels=labels)
    got = net.apply(adapter, IDS, attention_mask=MASK, labels=labels)
    close(got.logits, want.logits, MASK[..., None])
    assert (got.logits - base(name)(IDS, attention_mask=MASK).logits).abs().max() > 1e-2
    loss = got.loss + 0.05 * shadow_loss(net, adapter, IDS, labels, MASK)
    close(loss, want.loss)
    loss.backward()
    want.loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    block, leaf = net.plan.places[0].name, adapter[net.plan.places[0].name]
    last = net.plan[block].companions[-2].at
    for ours, end in {"down": "shadow_down.default", "transform_0": "shadow_update_transform.default.0"}.items():
        close(leaf[ours].grad[-2], trained[f"base_model.model.{last}.{end}.weight"])
    for k, t in leaf.items():
        if k.startswith("mirror__"):
            key = k.removeprefix("mirror__").replace("__", ".")
            close(t.grad, trained[f"base_model.shadow_backbone.default.{key}"])
    assert all(p.grad is None for p in base(name).parameters())

    view = pf.as_module(net, {n: {k: t.detach() for k, t in leaf.items()} for n, leaf in adapter.items()})
    for more in ({}, {"num_beams": 2}, {"use_cache": False}):
        kwargs = {"input_ids": IDS, "attention_mask": MASK, **GREEDY, **more}
        assert torch.equal(view.generate(**kwargs), model.generate(**kwargs)), more  # type: ignore[operator]


@pytest.mark.parametrize(("name", "options"), CASES, ids=str)
def test_peft_reads_what_is_written(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    theirs(name, **options).save_pretrained(tmp_path / "theirs")
    net, adapter = pf.load(tmp_path / "theirs", base(name))
    adapter = {n: {k: t + 0.1 for k, t in leaf.items()} for n, leaf in adapter.items()}
    pf.save(tmp_path / "ours", net, adapter, format="peft", extra={"task_type": "CAUSAL_LM"})
    model: Any = peft.PeftModel.from_pretrained(copy.deepcopy(base(name)), str(tmp_path / "ours")).eval()
    close(model(input_ids=IDS).logits, net.apply(adapter, IDS).logits)
    again, back = pf.load(tmp_path / "ours", base(name))
    site = SITES[name]
    assert again.plan[site].method == net.plan[site].method
    assert all(torch.equal(back[site][k], adapter[site][k]) for k in adapter[site])
    keys = load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    written = load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
    assert keys == written


@pytest.mark.parametrize("name", SITES)
def test_mixed_rows_generate_as_each_alone(name: str) -> None:
    net = pf.adapt(base(name), {SITES[name]: pf.Shadow(rank=2)})
    a, b = shaken(net), shaken(net, 1)
    x, index = torch.cat([IDS, IDS[:1] + 0]), [1, -1, 0]
    kwargs: dict[str, Any] = {"input_ids": x, **GREEDY}
    got = net.mixed(pf.stack([a, b]), index, method="generate", **kwargs)
    alone = [net.apply(leaf, method="generate", input_ids=x, **GREEDY) for leaf in (b, a)]
    assert torch.equal(got[0], alone[0][0]) and torch.equal(got[2], alone[1][2])
    assert torch.equal(got[1], base(name).generate(**kwargs)[1])
    beams = net.mixed(pf.stack([a, b]), index, method="generate", num_beams=2, **kwargs)
    one = net.apply(b, method="generate", num_beams=2, **kwargs)
    assert torch.equal(beams[0], one[0])


def test_beside_prompts_and_weights() -> None:
    """A prompt's tokens are tokens of the mirror; rows of other nets are theirs alone."""
    model = base("llama")
    both = pf.adapt(model, {"model": pf.Shadow(rank=2), "q_proj": pf.LoRA(rank=2, init_weights="random")})
    prompt = pf.adapt(model, {"model": pf.PromptTuning(n=3)})
    a, p = shaken(both), shaken(prompt)
    got = pf.Nets([both, prompt]).mixed([pf.stack([a]), pf.stack([p])], [0, 1], IDS).logits
    close(got[:1], both.apply(a, IDS[:1]).logits)
    close(got[1:], prompt.apply(p, IDS[1:]).logits)


@pytest.mark.parametrize("name", SITES)
def test_the_mirror_has_no_prefix(name: str) -> None:
    """A prefix of other rows is in the model's layers alone: the mirror counts without it."""
    model, at = base(name), SITES[name]
    given = {
        "shadow": pf.adapt(model, {at: pf.Shadow(rank=2)}),
        "prefix": pf.adapt(model, {at: pf.PrefixTuning(3)}),
        "prompt": pf.adapt(model, {at: pf.PromptTuning(2)}),
    }
    adapters: dict[str, Any] = {n: (net, shaken(net, i)) for i, (n, net) in enumerate(given.items())}
    ids, mask = torch.cat([IDS, IDS[:1].flip(1)]), torch.cat([MASK, MASK[1:]])
    options: dict[str, Any] = {"attention_mask": mask, **GREEDY}
    got = pf.bank(adapters).apply([*given], ids, method="generate", **options)
    logits = pf.bank(adapters).apply([*given], ids, attention_mask=mask).logits
    for i, (net, a) in enumerate(adapters.values()):
        row: Any = {**GREEDY, "attention_mask": mask[i : i + 1]}
        assert torch.equal(got[i : i + 1], net.apply(a, ids[i : i + 1], method="generate", **row))
        own = mask[i].bool()
        close(logits[i][own], net.apply(a, ids[i : i + 1], attention_mask=mask[i : i + 1]).logits[0][own])


def test_a_gate_weighs_each_function() -> None:
    net = pf.adapt(base("llama"), {"model": pf.Shadow(rank=2)})
    stack = pf.stack([shaken(net), shaken(net, 1)])
    close(net.gated(stack, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), IDS).logits, net.mixed(stack, [1, 0], IDS).logits)
    half = net.gated(stack, torch.tensor([0.5, 0.25]), IDS, use_cache=False).logits
    assert half.isfinite().all() and (half - net.apply(shaken(net), IDS).logits).abs().max() > 1e-3


class TestRefuses:
    def test_what_is_no_causal_backbone(self) -> None:
        bert = tf.BertModel(tf.BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        with pytest.raises(ValueError, match=r"goes along the blocks of a causal language model"):
            pf.adapt(bert, {".*": pf.Shadow()})
        with pytest.raises(ValueError, match=r"model.*blocks_at is \(2, 1\); give numbers from 0 to 2, in order"):
            pf.adapt(base("llama"), {"model": pf.Shadow(blocks_at=(2, 1))})

    def test_a_cache_that_it_has_not_seen(self) -> None:
        net = pf.adapt(base("llama"), {"model": pf.Shadow(rank=2)})
        cache = base("llama")(IDS, use_cache=True).past_key_values
        with pytest.raises(ValueError, match=r"model: the cache has 7 earlier positions, and the adapter has seen 0"):
            net.apply(net.init(), IDS[:, :1], past_key_values=cache)

    def test_embeddings_of_its_own_without_ids(self) -> None:
        net = pf.adapt(base("llama"), {"model": pf.Shadow(rank=2, shares=False)})
        with pytest.raises(ValueError, match=r"has embeddings of its own for input_ids"):
            net.apply(net.init(), inputs_embeds=torch.zeros(1, 2, 16))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"shadow_model": "some/model"}, "shadow_model is 'some/model'"),
            ({"unheard": 3}, "unheard is 3"),
            ({"r": 3}, "has shape"),
        ],
        ids=str,
    )
    def test_files(self, change: dict[str, Any], message: str, tmp_path: Path) -> None:
        net = pf.adapt(base("llama"), {"model": pf.Shadow(rank=2)})
        pf.save(tmp_path, net, net.init(), format="peft")
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            pf.load(tmp_path, base("llama"))


def test_checkpointing_of_the_model() -> None:
    """The blocks of a model that checkpoints itself find the states they had."""
    model = copy.deepcopy(base("llama")).train()
    net = pf.adapt(model, {"model": pf.Shadow(rank=2)})
    a = {n: {k: t.requires_grad_() for k, t in leaf.items()} for n, leaf in shaken(net).items()}
    want = torch.autograd.grad(net.apply(a, IDS).logits.square().sum(), [*a["model"].values()])
    model.gradient_checkpointing_enable()
    got = torch.autograd.grad(net.apply(a, IDS, use_cache=False).logits.square().sum(), [*a["model"].values()])
    for x, y in zip(got, want, strict=True):
        close(x, y)


def test_a_padding_token_of_the_mirror_begins_as_zero() -> None:
    """As torch and transformers have it: its row of a table gets no gradient, so it would stay at random values."""
    net = pf.adapt(base("llama"), {"model": pf.Shadow(rank=2, shares=False)})
    table = net.init()["model"]["mirror__embed_tokens__weight"]
    assert not table[0].any()
    assert table[1:].any(1).all()
