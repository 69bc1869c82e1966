"""Where virtual tokens stand in a batch, what is cut from outputs, and which backbones count in their own way."""

import copy
import logging
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor

import peftfn as pf
from peftfn.model.place import is_encoder_of_two
from peftfn.slots.virtual import Virtual

IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [4, 4, 9, 2, 7, 3], [9, 8, 7, 6, 5, 4]])
LEFT, RIGHT = torch.ones(3, 6, dtype=torch.long), torch.ones(3, 6, dtype=torch.long)
LEFT[1, :2] = 0
RIGHT[1, 4:] = 0
END: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
}
BART: dict[str, Any] = {
    "d_model": 16,
    "vocab_size": 32,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
    "init_std": 0.3,  # so that prompts matter
    **{f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")},
    **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
}
MODELS: dict[str, Any] = {
    "bart": lambda: tf.BartForConditionalGeneration(tf.BartConfig(**BART, **END)),
    "mamba": lambda: tf.MambaForCausalLM(
        tf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=32, state_size=4, **END)
    ),
    "mixtral": lambda: tf.MixtralForCausalLM(
        tf.MixtralConfig(num_key_value_heads=2, num_local_experts=4, **SIZE, **END)
    ),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(num_key_value_heads=2, head_dim=8, sliding_window=4, **SIZE, **END)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(d_model=16, d_ff=24, num_layers=2, num_heads=2, d_kv=8, vocab_size=32, decoder_start_token_id=0)
    ),
}


def model(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def mixed_and_alone(
    base: Any, method: Any, pattern: str, more: Any, index: tuple[int, ...], n: Any = (2, 5)
) -> tuple[Tensor, Tensor]:
    """Rows with two adapters of n virtual tokens, or none, in one batch; and each row of its own batch."""
    nets = [pf.adapt(base, {pattern: method(n=k)}) for k in n]
    adapters = [net.init(seed=i) for i, net in enumerate(nets)]
    generates = "method" in more
    plain = {k: v for k, v in more.items() if k != "method"}
    every = [
        *(net.apply(a, **more) for net, a in zip(nets, adapters, strict=True)),
        base.generate(**plain) if generates else base(**plain),
    ]
    got = pf.Nets(nets).mixed([pf.stack([a]) for a in adapters], list(index), **more)
    if generates:
        return got, torch.stack([every[k][i] for i, k in enumerate(index)])
    return got.logits, torch.stack([every[k].logits[i] for i, k in enumerate(index)])


def test_holes_stand_in_front_where_attention_is_causal_and_last_elsewhere() -> None:
    counts, own = torch.tensor([2, 0, 1]), torch.arange(10, 19).view(3, 3)
    causal, other = Virtual(2, counts, True), Virtual(2, counts, False)
    assert causal.mine(own.device).tolist() == [[True, True], [False, False], [False, True]]
    assert other.mine(own.device).tolist() == [[True, True], [False, False], [True, False]]
    virtual = torch.tensor([[1, 2], [-1, -1], [3, -1]])
    got = other.joined(virtual, own)
    assert got.tolist() == [[1, 2, 10, 11, 12], [13, 14, 15, -1, -1], [3, 16, 17, 18, -1]]
    assert causal.order(3, own.device) is None
    assert Virtual(2, None, False).joined(virtual[:1], own)[:, 2:].equal(own)


@pytest.mark.parametrize("beams", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "method", "pattern"),
    [
        ("bart", pf.PromptTuning, "encoder"),
        ("t5", pf.PromptTuning, "encoder"),
        ("t5", pf.PromptTuning, "decoder"),
        ("t5", pf.PrefixTuning, "decoder"),
        ("mamba", pf.PromptTuning, ".*"),
        ("mixtral", pf.PromptTuning, ".*"),
        ("mixtral", pf.PrefixTuning, ".*"),
        ("gemma3", pf.PrefixTuning, ".*"),
    ],
)
def test_rows_are_as_alone(name: str, method: Any, pattern: str, beams: int) -> None:
    two = name in ("bart", "t5")
    more: dict[str, Any] = {"input_ids": IDS, "attention_mask": RIGHT if two else LEFT}
    if beams:
        more |= {"max_new_tokens": 3, "do_sample": False, "num_beams": beams, "method": "generate"}
        assert torch.equal(*mixed_and_alone(model(name), method, pattern, more, (1, -1, 0)))
        return
    got, want = mixed_and_alone(
        model(name), method, pattern, more | ({"decoder_input_ids": IDS[:, :3]} if two else {}), (1, -1, 0)
    )
    assert want.isfinite().all() and got.shape == want.shape
    seen: Any = slice(None) if two else LEFT.bool()
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-5)
    plain = model(name)(**more, **({"decoder_input_ids": IDS[:, :3]} if two else {})).logits
    assert all((got[i] - plain[i]).abs().max() > 1e-3 for i in (0, 2))


# A decoder that counts positions by its cache.


@pytest.mark.parametrize("method", [pf.PromptTuning, pf.PrefixTuning])
def test_a_decoder_that_counts_by_its_cache_has_rows_of_one_number(method: Any) -> None:
    base = model("bart")
    more = {"input_ids": IDS, "attention_mask": RIGHT, "decoder_input_ids": IDS[:, :3]}
    got, want = mixed_and_alone(base, method, "decoder", more, (1, 0, 1), n=(3, 3))
    assert got.shape == (3, 3, 32)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for index, n in (((1, -1, 0), (3, 3)), ((1, 0, 1), (2, 3))):
        with pytest.raises(ValueError, match=r"model\.decoder: a BartDecoder counts positions by its cache"):
            mixed_and_alone(base, method, "decoder", more, index, n)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_barts_prompts_are_pefts() -> None:
    torch.manual_seed(1)
    base = model("bart")
    config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    made = peft.get_peft_model(copy.deepcopy(base), config).eval()
    net = pf.adapt(base, {"encoder": pf.PromptTuning(n=3)})
    a = {"model.encoder": {"tokens": peft.get_peft_model_state_dict(made)["prompt_embeddings"][:3]}}
    more = {"input_ids": IDS, "attention_mask": RIGHT, "decoder_input_ids": IDS[:, :3]}
    with torch.no_grad():
        want = made(**more).logits
    assert (want - base(**more).logits).abs().max() > 1e-3
    torch.testing.assert_close(net.apply(a, **more).logits, want, rtol=1e-4, atol=1e-5)


def test_an_encoder_is_told_from_its_decoder_and_has_no_prefix() -> None:
    for name, prefix in (("bart", "model."), ("t5", "")):
        base = model(name)
        encoder, decoder = (base.get_submodule(prefix + side) for side in ("encoder", "decoder"))
        assert is_encoder_of_two(encoder, encoder.config) and not is_encoder_of_two(decoder, decoder.config)
        with pytest.raises(ValueError, match=rf"{prefix}encoder.*leaves no cache of keys and values"):
            pf.adapt(base, {"encoder": pf.PrefixTuning(n=2)}).init()


# Outputs.


def test_routers_are_cut_so_that_the_loss_of_experts_counts_real_tokens() -> None:
    base = model("mixtral")
    net = pf.adapt(base, {".*": pf.PromptTuning(n=2)})
    a, more = net.init(), {"input_ids": IDS, "labels": IDS, "output_router_logits": True}
    whole, cut = net.apply(a, **more), net.apply(a, attention_mask=torch.ones_like(IDS), **more)
    assert [tuple(r.shape) for r in cut.router_logits] == [(18, 4)] * 2
    torch.testing.assert_close(cut.aux_loss, whole.aux_loss)
    assert net.apply(a, attention_mask=LEFT, **more).loss.isfinite()
    states = [base.get_input_embeddings()(IDS), a["model"]["tokens"].expand(3, 2, 16)]
    theirs = base(inputs_embeds=torch.cat(states[::-1], 1), output_router_logits=True).router_logits
    for got, want in zip(cut.router_logits, theirs, strict=True):
        torch.testing.assert_close(got, want.view(3, 8, 4)[:, 2:].reshape(18, 4), rtol=1e-4, atol=1e-6)


def test_only_rows_that_ask_for_it_are_pooled_at_the_first_virtual_token() -> None:
    torch.manual_seed(0)
    base = tf.RobertaForSequenceClassification(tf.RobertaConfig(max_position_embeddings=40, **SIZE)).eval()
    methods = (pf.PromptTuning(n=2), pf.PromptTuning(n=3, pooled="virtual"))
    nets = [pf.adapt(base, {".*": method}) for method in methods]
    adapters = [net.init(seed=i) for i, net in enumerate(nets)]
    got = pf.Nets(nets).mixed([pf.stack([a]) for a in adapters], [0, 1, -1], IDS, RIGHT).logits
    each = [net.apply(a, IDS, RIGHT).logits for net, a in zip(nets, adapters, strict=True)]
    torch.testing.assert_close(
        got, torch.stack([each[0][0], each[1][1], base(IDS, RIGHT).logits[2]]), rtol=1e-4, atol=1e-5
    )
    token = pf.adapt(base, {".*": pf.PromptTuning(n=3)}).apply(adapters[1], IDS, RIGHT).logits
    assert not torch.allclose(token, each[1], atol=1e-4)


def test_generation_from_embeddings_is_that_from_ids() -> None:
    base = model("gemma3")
    net = pf.adapt(base, {".*": pf.PromptTuning(n=2)})
    a, more = net.init(), {"max_new_tokens": 4, "do_sample": False, **END, "method": "generate"}
    embedded = base.get_input_embeddings()(IDS)
    got = net.apply(a, inputs_embeds=embedded, attention_mask=LEFT, **more)
    assert torch.equal(got, net.apply(a, input_ids=IDS, attention_mask=LEFT, **more)[:, 6:])


def test_kernels_without_a_fake_form_are_no_noise(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(caplog.handler)  # torch's loggers hand nothing on
    try:
        net = pf.adapt(model("mixtral"), {".*": pf.PrefixTuning(n=2)})
        assert net.init()["model"]["kv"].shape == (2, 2 * 2 * 2 * 4)
    finally:
        log.removeHandler(caplog.handler)
    assert not caplog.records and not log.disabled
