"""Methods on inputs: equal to PEFT, row by row in a mixed batch, in generation, on many architectures."""

import copy
from functools import cache
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from support import AROUND, INPUTS, close, random
from torch import Tensor
from torch.func import grad, vmap

import peftfn as pf
from peftfn.methods.inputs.cartridge import cartridge_of
from peftfn.methods.inputs.cpt import cpt_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning"),
]
IDS = torch.tensor([[5, 6, 7, 8, 9, 3], [4, 4, 9, 2, 7, 3], [9, 8, 7, 6, 5, 4]])
LEFT, RIGHT = torch.ones(3, 6, dtype=torch.long), torch.ones(3, 6, dtype=torch.long)
LEFT[1, :2] = 0
RIGHT[1, 4:] = 0
SIZE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 32,
}
END: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
GPT: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 32, **END}
T5: dict[str, Any] = {"d_model": 16, "d_ff": 24, "num_layers": 2, "num_heads": 2, "d_kv": 8, "vocab_size": 32}
MODELS: dict[str, Any] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=2, **SIZE, **END)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64, **_less("intermediate_size"), **END
        )
    ),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(hidden_size=16, n_layer=2, n_head=4, vocab_size=32, **END)),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZE, **END)),
    "qwen2": lambda: tf.Qwen2ForCausalLM(tf.Qwen2Config(num_key_value_heads=2, **SIZE, **END)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(num_key_value_heads=2, head_dim=8, **SIZE, **END)),
    "gemma2": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=4, **SIZE, **END)
    ),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(num_key_value_heads=2, sliding_window=4, **SIZE, **END)),
    "phi": lambda: tf.PhiForCausalLM(tf.PhiConfig(**SIZE, **END)),
    "falcon": lambda: tf.FalconForCausalLM(
        tf.FalconConfig(
            alibi=False, new_decoder_architecture=False, multi_query=True, **_less("intermediate_size"), **END
        )
    ),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(d_model=16, n_layers=2, n_heads=4, vocab_size=32, **END)),
    "codegen": lambda: tf.CodeGenForCausalLM(tf.CodeGenConfig(rotary_dim=4, **GPT)),
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZE)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(max_position_embeddings=40, **SIZE)),
    "distilbert": lambda: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(dim=16, hidden_dim=24, n_layers=2, n_heads=4, vocab_size=32)
    ),
    "electra": lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(embedding_size=8, **SIZE)),
    "albert": lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(embedding_size=8, **SIZE)),
    "deberta_v2": lambda: tf.DebertaV2ForMaskedLM(tf.DebertaV2Config(**SIZE)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(global_attn_every_n_layers=1, pad_token_id=0, cls_token_id=1, sep_token_id=2, **SIZE)
    ),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(decoder_start_token_id=0, **T5)),
}
DECODERS = [n for n in MODELS if n in list(MODELS)[:13]]
ENCODERS = [n for n in MODELS if n not in DECODERS and n != "t5"]


def _less(name: str) -> dict[str, Any]:
    return {k: v for k, v in SIZE.items() if k != name}


@cache
def model(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]().eval().requires_grad_(False)


def given(name: str, padded: bool = True) -> dict[str, Any]:
    mask = LEFT if name in DECODERS else RIGHT
    more = {"decoder_input_ids": IDS[:, :3]} if name == "t5" else {}
    return {"input_ids": IDS, **({"attention_mask": mask} if padded else {}), **more}


def seen(name: str, y: Tensor, padded: bool = True) -> Tensor:
    """The outputs of tokens that the mask does not take away."""
    return y[given(name)["attention_mask"].bool()] if padded and name != "t5" else y


def two(name: str, method: Any) -> tuple[list[pf.Adapted], list[Any]]:
    """Two nets with 2 and 5 virtual tokens, and an adapter of each."""
    nets = [pf.adapt(model(name), {"encoder" if name == "t5" else ".*": method(n)}) for n in (2, 5)]
    return nets, [net.init(seed=i) for i, net in enumerate(nets)]


def by_itself(name: str, nets: Any, adapters: Any, run: Any) -> Tensor:
    """Rows 0, 1, 2 with adapter 1, none, and adapter 0, each batch by itself."""
    one, other = (run(net.apply, a) for net, a in zip(nets, adapters, strict=True))
    base = run(lambda *_, method=None, **more: model(name).generate(**more) if method else model(name)(**more), None)
    return torch.stack([other[0], base[1], one[2]])


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_rows_with_other_prompts_and_none_are_as_alone(name: str, padded: bool) -> None:
    nets, adapters = two(name, lambda n: pf.PromptTuning(n=n))
    stacks, more = [pf.stack([a]) for a in adapters], given(name, padded)
    got = pf.Nets(nets).mixed(stacks, [1, -1, 0], **more).logits
    want = by_itself(name, nets, adapters, lambda f, a: f(*([a] if a else []), **more).logits)
    assert want.isfinite().all() and got.shape == want.shape
    torch.testing.assert_close(seen(name, got, padded), seen(name, want, padded), rtol=1e-4, atol=2e-5)
    plain = model(name)(**more).logits
    assert (seen(name, got, padded) - seen(name, plain, padded)).abs().max() > 1e-4

    if padded:
        (site,), row = adapters[0], torch.tensor([0.0, 0, 1])[:, None, None]
        t = adapters[0][site]["tokens"].requires_grad_()  # Bloom's own Function knows plain autograd alone
        many = pf.Nets(nets).mixed([{site: {"tokens": t[None]}}, stacks[1]], [1, -1, 0], **more).logits
        (g,) = torch.autograd.grad(seen(name, many).square().sum(), t)
        alone = nets[0].apply({site: {"tokens": t}}, **more).logits * row
        (h,) = torch.autograd.grad(seen(name, alone).square().sum(), t)
        torch.testing.assert_close(g, h, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", [pf.PromptTuning, pf.PrefixTuning], ids=["tokens", "prefix"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_of_mixed_rows_is_that_of_each(name: str, method: Any) -> None:
    nets, adapters = two(name, lambda n: method(n=n))
    more = {**given(name), "max_new_tokens": 4, "do_sample": False, **END, "method": "generate"}
    got = pf.Nets(nets).mixed([pf.stack([a]) for a in adapters], [1, -1, 0], **more)
    assert torch.equal(got, by_itself(name, nets, adapters, lambda f, a: f(*([a] if a else []), **more)))
    without = nets[0].apply(adapters[0], use_cache=False, **more)
    assert torch.equal(nets[0].apply(adapters[0], **more), without)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_a_prefix_for_each_row_and_beams(name: str) -> None:
    nets, adapters = two(name, lambda n: pf.PrefixTuning(n=n))
    more = given(name)
    got = pf.Nets(nets).mixed([pf.stack([a]) for a in adapters], [1, -1, 0], **more).logits
    want = by_itself(name, nets, adapters, lambda f, a: f(*([a] if a else []), **more).logits)
    torch.testing.assert_close(seen(name, got), seen(name, want), rtol=1e-4, atol=1e-5)
    for method in (pf.PromptTuning, pf.PrefixTuning):
        nets, adapters = two(name, lambda n, method=method: method(n=n))
        more = {**given(name), "max_new_tokens": 3, "num_beams": 2, "do_sample": False, **END, "method": "generate"}
        got = pf.Nets(nets).mixed([pf.stack([a]) for a in adapters], [1, -1, 0], **more)
        assert torch.equal(got, by_itself(name, nets, adapters, lambda f, a, m=more: f(*([a] if a else []), **m)))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_embeddings_positions_and_caches_given_by_hand(name: str) -> None:
    nets, adapters = two(name, lambda n: pf.PromptTuning(n=n))
    net, a = nets[0], adapters[0]
    want = net.apply(a, input_ids=IDS).logits
    embedded = model(name).get_input_embeddings()(IDS)
    torch.testing.assert_close(net.apply(a, inputs_embeds=embedded).logits, want)
    torch.testing.assert_close(net.apply(a, IDS).logits, want)
    positions = torch.arange(6)[None]
    torch.testing.assert_close(net.apply(a, input_ids=IDS, position_ids=positions).logits, want)
    first = net.apply(a, input_ids=IDS[:, :4], use_cache=True)
    rest = net.apply(a, input_ids=IDS[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), want, rtol=1e-4, atol=1e-5)


def test_prompt_prefix_lora_and_bottleneck_in_one_net_and_one_batch() -> None:
    rules: Any = {"q_proj": pf.LoRA(rank=2), "mlp": pf.Bottleneck(2), "model": pf.PromptTuning(n=3)}
    all_, prefix = pf.adapt(model("llama"), rules), pf.adapt(model("llama"), {"model": pf.PrefixTuning(n=2)})
    a, b = random(all_), prefix.init(seed=1)
    for more in (
        given("llama"),
        {**given("llama"), "max_new_tokens": 3, "do_sample": False, **END, "method": "generate"},
    ):
        out = lambda y: y if isinstance(y, Tensor) else y.logits  # noqa: E731
        got = out(pf.Nets([all_, prefix]).mixed([pf.stack([a]), pf.stack([b])], [0, -1, 1], **more))
        plain = {k: v for k, v in more.items() if k != "method"}
        base = model("llama").generate(**plain) if "method" in more else model("llama")(**more).logits
        want = torch.stack([out(all_.apply(a, **more))[0], base[1], out(prefix.apply(b, **more))[2]])
        if "method" in more:
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(seen("llama", got), seen("llama", want), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "method",
    [pf.PTuning(n=3, hidden=4), pf.PTuning(n=2, encoder="LSTM", hidden=3), pf.PrefixTuning(n=3, hidden=4)],
    ids=str,
)
def test_what_is_prepared_is_what_runs(method: pf.Method) -> None:
    net = pf.adapt(model("llama"), {"model": method})
    a = random(net)
    prepared = net.prepare(a)
    assert prepared["model"].keys() <= {"tokens", "keys", "values"}
    torch.testing.assert_close(net.apply(prepared, IDS).logits, net.apply(a, IDS).logits)
    many = pf.stack([a, random(net, 1)])
    each = vmap(lambda a: net.apply(a, IDS, use_cache=False).logits)(many)
    torch.testing.assert_close(each[1], net.apply(random(net, 1), IDS).logits, rtol=1e-4, atol=1e-5)


def test_the_lstm_is_torchs() -> None:
    d, h = 16, 3
    net = pf.adapt(model("llama"), {"model": pf.PTuning(n=4, encoder="LSTM", hidden=h)})
    p = random(net, scale=0.5)["model"]
    lstm = torch.nn.LSTM(d, h, num_layers=2, bidirectional=True, batch_first=True)
    names = {"ih": "weight_ih", "hh": "weight_hh", "bih": "bias_ih", "bhh": "bias_hh"}
    with torch.no_grad():
        for k, t in p.items():
            kind, _, at = k.partition("_")
            if at:
                getattr(lstm, f"{names[kind]}_l{at[0]}{'_reverse' if at.endswith('r') else ''}").copy_(t)
        x = lstm(p["inputs"][None])[0][0]
        want = torch.relu(x @ p["w0"].mT + p["b0"]) @ p["w1"].mT + p["b1"]
    torch.testing.assert_close(net.prepare({"model": p})["model"]["tokens"], want)


def test_a_module_view_and_a_file(tmp_path: Any) -> None:
    for method in (pf.PromptTuning(n=3), pf.PrefixTuning(n=3), pf.Cartridge(n=4), pf.CPT(ids=(1, 2))):
        net = pf.adapt(model("llama"), {"model": method})
        a = random(net)
        want = net.apply(a, IDS).logits
        torch.testing.assert_close(pf.as_module(net, a)(IDS).logits, want)
        folder = tmp_path / type(method).__name__
        pf.save(folder, net, a)
        loaded = pf.load(folder, model("llama"))
        assert torch.equal(loaded.net.apply(loaded.adapter, IDS).logits, want)


def test_half_precision() -> None:
    half = copy.deepcopy(model("llama")).bfloat16()
    for method in (pf.PromptTuning(n=3), pf.PrefixTuning(n=3)):
        net = pf.adapt(half, {"model": method})
        y = net.apply(net.init(), IDS).logits
        assert y.dtype is torch.bfloat16 and y.isfinite().all()


def test_prompts_start_where_they_are_told() -> None:
    weight = model("llama").get_input_embeddings().weight
    start = lambda **more: pf.adapt(model("llama"), {"model": pf.PromptTuning(n=5, **more)}).init()["model"]["tokens"]  # noqa: E731
    assert torch.equal(start(ids=(7, 2)), weight[[7, 2, 7, 2, 7]])
    rows = start(start="vocabulary")
    assert all((weight == row).all(1).any() for row in rows)
    with pytest.raises(ValueError, match=r"ids is \(40,\): give ids of tokens, from 0 to 31"):
        start(ids=(40,))


def test_a_cartridge_of_a_text_is_the_text_in_front() -> None:
    text = torch.tensor([[3, 1, 4, 1]])
    net = pf.adapt(model("llama"), {"model": pf.Cartridge(n=4)})
    a = {"model": cartridge_of(model("llama")(text, use_cache=True).past_key_values)}
    want = model("llama")(torch.cat([text.expand(3, -1), IDS], 1)).logits[:, 4:]
    torch.testing.assert_close(net.apply(a, IDS).logits, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="3 rows"):
        cartridge_of(model("llama")(IDS, use_cache=True).past_key_values)


@pytest.mark.parametrize(
    "method", [pf.LoReFT(rank=2, first=1, last=1, init_weights="random"), pf.DeepPrompt(n=1)], ids=str
)
def test_a_prefix_is_no_token_to_methods_that_count_them(method: Any) -> None:
    """The first and the last token of each row, padded on the left, are where they are without a prefix."""
    layer = model("llama").model.layers[1]
    net = pf.adapt(model("llama"), {"model": pf.PrefixTuning(n=3), r"layers\.1": method})
    a = random(net, scale=0.5)
    at = torch.zeros(3, 6, 1, dtype=torch.bool)
    at[0, 0], at[1, 2], at[2, 0] = True, True, True
    p = net.prepare(a)["model.layers.1"]
    if isinstance(method, pf.LoReFT):
        at[:, -1] = True
        change = lambda _, args, y: torch.where(at, y + method.change(p, y), y)  # noqa: E731
        hook = layer.register_forward_hook(change)
    else:
        put = lambda _, args: (torch.where(at, p["tokens"], args[0]), *args[1:])  # noqa: E731
        hook = layer.register_forward_pre_hook(put)
    prefix = pf.adapt(model("llama"), {"model": pf.PrefixTuning(n=3)})
    try:
        want = prefix.apply({"model": a["model"]}, input_ids=IDS, attention_mask=LEFT).logits
    finally:
        hook.remove()
    got = net.apply(a, input_ids=IDS, attention_mask=LEFT).logits
    torch.testing.assert_close(seen("llama", got), seen("llama", want), rtol=1e-4, atol=1e-5)
    plain = prefix.apply({"model": a["model"]}, input_ids=IDS, attention_mask=LEFT).logits
    assert (seen("llama", got) - seen("llama", plain)).abs().max() > 1e-3
    mixed = net.mixed(pf.stack([a, random(net, 1)]), [0, -1, 0], input_ids=IDS, attention_mask=LEFT).logits
    torch.testing.assert_close(mixed[[0, 2]], got[[0, 2]], rtol=1e-4, atol=1e-5)


COUNTING = [m for m in AROUND if m.sees_mask]
PREFIXES = [m for m in INPUTS if type(m) in (pf.PrefixTuning, pf.Cartridge)]


@pytest.mark.parametrize("prefix", PREFIXES, ids=str)
@pytest.mark.parametrize("method", COUNTING, ids=str)
def test_beside_a_prefix_a_row_padded_on_the_left_is_the_row_alone(method: Any, prefix: Any) -> None:
    """A law of every method that counts tokens and every prefix; the method also does something there."""
    net = pf.adapt(model("llama"), {"model": prefix, r"layers\.1": method})
    a = random(net, scale=0.5)
    at = (LEFT.cumsum(-1) - 1).clamp(min=0)  # as in generate: prefix keys are not rotated, so positions count
    every = {"input_ids": IDS, "attention_mask": LEFT, "position_ids": at}
    padded = net.apply(a, **every).logits[1, 2:]
    alone = net.apply(a, **{k: t[1:2, 2:] for k, t in every.items()}).logits[0]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    only = pf.adapt(model("llama"), {"model": prefix}).apply({"model": a["model"]}, **every).logits[1, 2:]
    assert (padded - only).abs().max() > 1e-3


# Errors.


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"attention_mask": torch.ones(3, 1, 6, 6)}, r"model: virtual tokens need an attention mask \[rows, tokens\]"),
        ({"cache_implementation": "static", "max_new_tokens": 2, "method": "generate"}, "dynamic cache"),
        ({"position_ids": torch.zeros(3, 3, 6, dtype=torch.long)}, r"model: virtual tokens shift positions"),
    ],
)
@pytest.mark.parametrize("method", [pf.PromptTuning(n=2), pf.PrefixTuning(n=2)], ids=["tokens", "prefix"])
def test_what_virtual_tokens_cannot_do_is_an_early_error(method: pf.Method, more: Any, text: str) -> None:
    net = pf.adapt(model("llama"), {"model": method})
    with pytest.raises(ValueError, match=text):
        net.apply(net.init(), input_ids=IDS, **more)


def test_fractions_of_tokens_and_prefixes_without_a_cache_are_errors() -> None:
    net = pf.adapt(model("llama"), {"model": pf.PromptTuning(n=2)})
    many = pf.stack([net.init(seed=0), net.init(seed=1)])
    with pytest.raises(ValueError, match=r"model: a fraction of a virtual token"):
        net.gated(many, torch.full((3, 2), 0.5), IDS)
    one = torch.tensor([[1.0, 0], [0, 0], [0, 1]])
    torch.testing.assert_close(net.gated(many, one, IDS).logits, net.mixed(many, [0, -1, 1], IDS).logits)
    for rule in ("mlp", ".*"):
        with pytest.raises(ValueError, match=r"matches none|no backbone"):
            pf.adapt(torch.nn.Sequential(torch.nn.Linear(3, 3)), {rule: pf.PromptTuning()})
    trained = MODELS["llama"]().train()
    trained.gradient_checkpointing_enable()
    net = pf.adapt(trained, {"model": pf.PrefixTuning(n=2)})
    with pytest.raises(ValueError, match="gradient checkpointing drops the cache"):
        net.apply(net.init(), IDS)
    mamba = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32, state_size=4))
    with pytest.raises(ValueError, match=r"no cache of keys and values|takes inputs_embeds"):
        pf.adapt(mamba, {".*": pf.PrefixTuning(n=2)})


# PEFT.


def theirs(name: str, config: Any) -> Any:
    torch.manual_seed(1)
    made = peft.get_peft_model(copy.deepcopy(model(name)), config).eval()
    with torch.no_grad():
        for k, p in made.named_parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(k))))
    return made


def saved(made: Any) -> dict[str, Tensor]:
    out: dict[str, Tensor] = peft.get_peft_model_state_dict(made)
    return out


CAUSAL: Any = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PROMPTS: dict[str, Any] = {
    "PROMPT_TUNING": (lambda: peft.PromptTuningConfig(**CAUSAL), pf.PromptTuning(n=3)),
    "P_TUNING MLP": (lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, **CAUSAL), pf.PTuning(n=3)),
    "P_TUNING LSTM": (
        lambda: peft.PromptEncoderConfig(encoder_hidden_size=8, encoder_reparameterization_type="LSTM", **CAUSAL),
        pf.PTuning(n=3, encoder="LSTM"),
    ),
    "PREFIX_TUNING": (lambda: peft.PrefixTuningConfig(**CAUSAL), pf.PrefixTuning(n=3)),
    "PREFIX_TUNING projected": (
        lambda: peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=8, **CAUSAL),
        pf.PrefixTuning(n=3, hidden=8),
    ),
    "CARTRIDGE": (lambda: peft.CartridgeConfig(**CAUSAL), pf.Cartridge(n=3)),
}


def read(net: pf.Adapted, made: Any) -> Any:
    """PEFT's tensors as a prepared leaf."""
    (site,), prompt = net.plan, saved(made)["prompt_embeddings"]
    if isinstance(net.plan[site].method, pf.Tokens):
        return {site: {"tokens": prompt}}
    layers, heads, size, _ = net.plan[site].frozen["sizes"].shape
    keys, values = prompt.view(len(prompt), layers, 2, heads, size).permute(2, 1, 3, 0, 4)
    return {site: {"keys": keys, "values": values}}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", PROMPTS)
def test_outputs_and_generation_are_pefts(kind: str, name: str) -> None:
    config, method = PROMPTS[kind]
    made, net = theirs(name, config()), pf.adapt(model(name), {".*": method})
    a = read(net, made)
    with torch.no_grad():
        want = made(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    got = net.apply(a, input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(got, want[:, -6:], rtol=1e-4, atol=1e-5)
    more: Any = {"max_new_tokens": 4, "do_sample": False, **END}
    tokens = made.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **more)
    mine = net.apply(a, input_ids=IDS, attention_mask=torch.ones_like(IDS), method="generate", **more)
    assert torch.equal(mine, tokens)


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_gradients_are_pefts(kind: str) -> None:
    config, method = PROMPTS[kind]
    made, net = theirs("llama", config()), pf.adapt(model("llama"), {".*": method})
    labels = IDS.clone()
    labels[:, 0] = -100  # PEFT counts the first token, predicted from the last virtual one
    made.train()
    made(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=labels).loss.backward()
    (theirs_,) = [p.grad for p in made.prompt_encoder.parameters() if p.grad is not None]
    prompt = saved(made)["prompt_embeddings"]
    loss = lambda a: net.apply(a, input_ids=IDS, labels=labels).loss  # noqa: E731
    mine = grad(lambda t: loss({"model": {"tokens" if kind == "PROMPT_TUNING" else "kv": t}}))(prompt)
    torch.testing.assert_close(mine, theirs_, rtol=1e-4, atol=1e-6)


def test_multitask_prompts_are_pefts() -> None:
    config = peft.MultitaskPromptTuningConfig(num_tasks=3, num_ranks=2, **CAUSAL)
    made, net = theirs("llama", config), pf.adapt(model("llama"), {".*": pf.MultitaskPrompt(n=3, rank=2)})
    t = saved(made)
    tasks = {
        "model": {
            "shared": t["prompt_embeddings"].expand(3, -1, -1),
            "cols": t["prefix_task_cols"],
            "rows": t["prefix_task_rows"],
        }
    }
    index = torch.tensor([2, 0, 1])
    with torch.no_grad():
        want = made(input_ids=IDS, attention_mask=torch.ones_like(IDS), task_ids=index).logits[:, -6:]
    torch.testing.assert_close(net.mixed(tasks, index, IDS).logits, want, rtol=1e-4, atol=1e-5)
    shared = grad(
        lambda s: net.mixed({"model": {**tasks["model"], "shared": s.expand(3, -1, -1)}}, index, IDS).logits.sum()
    )
    assert shared(t["prompt_embeddings"]).abs().max() > 0


@pytest.mark.parametrize("decay", [None, 0.8])
def test_cpt_and_its_loss_are_pefts(decay: float | None) -> None:
    context, types = [4, 9, 2, 6, 8, 1], [1, 2, 4, 5, 6, 8]
    config = peft.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=context,
        cpt_mask=[1] * 6,
        cpt_tokens_type_mask=types,
        opt_projection_epsilon=2.0,
        opt_projection_format_epsilon=1.0,
        opt_weighted_loss_type="none" if decay is None else "decay",
        opt_loss_decay_factor=decay or 1.0,
    )
    made = theirs("llama", config)
    method = pf.CPT(ids=tuple(context), types=tuple(types), epsilon=2.0, format_epsilon=1.0)
    net = pf.adapt(model("llama"), {".*": method})
    delta = made.prompt_encoder["default"].delta_embedding.weight
    out = made(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
    out.loss.backward()
    f = lambda d: cpt_loss(net.apply({"model": {"delta": d}}, IDS).logits, IDS, context, types, decay)  # noqa: E731
    torch.testing.assert_close(net.apply({"model": {"delta": delta.detach()}}, IDS).logits, out.logits.detach())
    torch.testing.assert_close(f(delta.detach()), out.loss.detach())
    torch.testing.assert_close(grad(f)(delta.detach()), delta.grad, rtol=1e-4, atol=1e-6)


HEADS: dict[str, Any] = {
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(max_position_embeddings=40, **SIZE)),
    "electra": lambda: tf.ElectraForSequenceClassification(tf.ElectraConfig(embedding_size=16, **SIZE)),
}


@pytest.mark.parametrize("name", HEADS)
def test_virtual_pooling_is_pefts_for_heads_above_the_backbone(name: str) -> None:
    torch.manual_seed(0)
    base = HEADS[name]().eval()
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    made = peft.get_peft_model(copy.deepcopy(base), config).eval()  # its copy of the head is equal to the base's
    net = pf.adapt(base, {".*": pf.PromptTuning(n=3, pooled="virtual")})
    a = read(net, made)
    with torch.no_grad():
        want = made(input_ids=IDS, attention_mask=RIGHT).logits
    torch.testing.assert_close(net.apply(a, input_ids=IDS, attention_mask=RIGHT).logits, want, rtol=1e-4, atol=1e-5)
    own = pf.adapt(base, {".*": pf.PromptTuning(n=3)}).apply(a, input_ids=IDS, attention_mask=RIGHT).logits
    assert not torch.allclose(own, want, atol=1e-4)


def test_t5_prompts_are_pefts() -> None:
    made = theirs("t5", peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3))
    net = pf.adapt(model("t5"), {"encoder": pf.PromptTuning(n=3)})
    a = {"encoder": {"tokens": saved(made)["prompt_embeddings"][:3]}}
    more = {"input_ids": IDS, "attention_mask": RIGHT, "decoder_input_ids": IDS[:, :3]}
    with torch.no_grad():
        torch.testing.assert_close(net.apply(a, **more).logits, made(**more).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_eight_prompts_under_one_vmap_are_eight_calls() -> None:
    net = pf.adapt(model("llama"), {"model": pf.PromptTuning(n=3)})
    adapters = [net.init(seed=s) for s in range(8)]
    run = lambda a: net.apply(a, IDS, use_cache=False).logits  # noqa: E731
    want = torch.stack([run(a) for a in adapters])
    torch.testing.assert_close(vmap(run)(pf.stack(adapters)), want, rtol=1e-4, atol=1e-5)


def test_the_cache_of_a_prompt_is_a_prefix_that_generates_as_the_prompt_does() -> None:
    """Computed once for each adapter, and kept in a bank, instead of once for each row of each call."""
    model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=2, **SIZE, **END)).eval()
    prompt, prefix = pf.adapt(model, {"model": pf.PromptTuning(3)}), pf.adapt(model, {"model": pf.PrefixTuning(3)})
    a = random(prompt)
    with torch.no_grad():
        cache = model(inputs_embeds=a["model"]["tokens"][None], use_cache=True).past_key_values
    kept: Any = {"model": cartridge_of(cache)}
    ids = torch.tensor([[0, 0, 5, 6, 7], [4, 4, 9, 2, 7], [9, 8, 7, 6, 5]])
    mask = ids.ne(0).long()
    close(prefix.apply(kept, ids, attention_mask=mask).logits[1:], prompt.apply(a, ids, attention_mask=mask).logits[1:])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, **END}
    names = ["a", "__base__", "a"]
    got = pf.bank({"a": (prefix, kept)}, prepared=True).apply(names, ids, method="generate", **options)
    want = pf.bank({"a": (prompt, a)}).apply(names, ids, method="generate", **options)
    assert torch.equal(got, want)
