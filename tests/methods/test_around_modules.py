"""Methods around a module: their formulas, written again with torch's modules and hooks, and what they do in models."""

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from support import close, random, rows_are_alone
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F

import peftfn as pf
from peftfn.methods.parts.reft import ends, orthonormal

IDS = torch.randint(3, 24, (4, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :2] = MASK[3, :1] = 0
INDEX = [2, -1, 0, 1]
EAGER: dict[str, Any] = {"attn_implementation": "eager", "initializer_range": 0.2}
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def llama(layers: int = 2) -> Any:
    size: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    ids: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.LlamaConfig(**size, **ids, num_hidden_layers=layers, **EAGER)
        return tf.LlamaForCausalLM(config).eval()


def bert() -> Any:
    size: dict[str, Any] = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.BertConfig(**size, num_hidden_layers=2, **EAGER)
        return tf.BertForSequenceClassification(config).eval()


def gpt2() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        size: dict[str, Any] = {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
        return tf.GPT2LMHeadModel(tf.GPT2Config(**size, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


# Formulas, at one linear layer 8 → 6.


def one(method: pf.Method, layer: nn.Module | None = None, seed: int = 1) -> tuple[nn.Module, Any, Tensor]:
    """(a layer, a leaf with noise, what the adapted layer makes of `X`)."""
    torch.manual_seed(0)
    layer = layer or nn.Linear(8, 6)
    net = pf.adapt(nn.Sequential(layer).eval(), {"0": method})
    a = random(net, seed, scale=0.3)
    return layer, {**a["0"], **a.get(type(method).__name__, {})}, net.apply(a, X).detach()


def test_compacter_is_an_adapter_of_kronecker_products() -> None:
    method = pf.Compacter(rank=4, n=2, phm_rank=2, spread=0.5, scale=0.5, activation="relu")
    layer, p, got = one(method)
    down = sum(torch.kron(p["rule"][i], p["down_left"][i] @ p["down_right"][i]) for i in range(2))
    up = sum(torch.kron(p["rule"][i], p["up_left"][i] @ p["up_right"][i]) for i in range(2))
    y = layer(X)
    close(got, y + 0.5 * ((y @ down + p["c"]).relu() @ up) + p["b"])


def test_the_rule_of_compacter_is_one_for_all_sites() -> None:
    model = llama()
    net = pf.adapt(model, {"mlp|self_attn": pf.Compacter(rank=4, n=2, spread=0.5)})
    a = random(net, 0)
    assert a["Compacter"].keys() == {"rule"}
    assert len(a) == 5
    slope = grad(lambda a: net.apply(a, IDS).logits.square().sum())(a)["Compacter"]["rule"]
    a["Compacter"]["rule"].requires_grad_()
    net.apply(a, IDS).logits.square().sum().backward()
    close(a["Compacter"]["rule"].grad, slope)  # type: ignore[arg-type]
    assert slope.abs().min() > 0


def test_compacter_s_sizes() -> None:
    with pytest.raises(ValueError, match=r"0 .*Compacter.n is 4, which does not divide features of y=6: choose one of"):
        pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"0": pf.Compacter(rank=4, n=4, of="input")})


def test_adapter_plus_scales_each_channel_and_drops_rows() -> None:
    layer, p, got = one(pf.AdapterPlus(rank=3))
    y = layer(X)
    close(got, y + p["g"] * (F.gelu(y @ p["down"].mT + p["c"]) @ p["up"].mT + p["b"]))
    model = nn.Sequential(nn.Linear(8, 6)).train()
    net = pf.adapt(model, {"0": pf.AdapterPlus(rank=3, drop_path=0.5)})
    a, x = random(net, scale=0.3), X[:1].repeat(64, 1, 1)
    torch.manual_seed(0)
    change = net.apply(a, x) - model(x)
    kept = change.abs().amax((1, 2)) > 1e-5
    assert 20 < kept.sum() < 44
    still = pf.adapt(copy.deepcopy(model).eval(), {"0": pf.AdapterPlus(rank=3, drop_path=0.5)})
    close(change[kept][0], 2 * (still.apply(a, x) - model(x))[0])


@pytest.mark.parametrize("activation", ["none", "tanh"])
def test_loreft_sets_h_in_the_span_of_r_to_its_source(activation: Any) -> None:
    layer, p, got = one(pf.LoReFT(rank=2, activation=activation))
    r = orthonormal(p["r"])
    close(r @ r.mT, torch.eye(2))
    close(p["r"] @ r.mT @ r, p["r"])  # the same span
    y, act = layer(X), torch.tanh if activation == "tanh" else nn.Identity()
    source = act(F.linear(y, p["w"], p["b"]))
    close(got, y + (source - y @ r.mT) @ r)
    close(got @ r.mT, source)


def test_the_other_interventions() -> None:
    layer, p, got = one(pf.NoReFT(rank=2, add_bias=True, activation="relu"))
    y = layer(X)
    close(got, y + (F.linear(y, p["w"], p["b"]).relu() - F.linear(y, p["proj"], p["c"])) @ p["proj"])
    _, p, got = one(pf.DiReFT(rank=2))
    close(got, y + F.linear(y, p["w"], p["b"]) @ orthonormal(p["r"]))
    _, p, got = one(pf.DiReFT(rank=2, orthogonal=False, activation="relu"))
    close(got, y + F.linear(y, p["w"], p["b"]).relu() @ p["r"])
    _, p, got = one(pf.ConsReFT(rank=2))
    r = orthonormal(p["r"])
    close(got, y + (p["b"] - y @ r.mT) @ r)
    close(got @ r.mT, p["b"].expand(3, 5, 2))
    _, p, got = one(pf.LobiReFT(rank=2))
    close(got, y + p["b"] @ orthonormal(p["r"]))


def test_orthonormal_rows_are_kept() -> None:
    r = orthonormal(torch.randn(5, 3, 8))
    close(orthonormal(r), r)
    close(orthonormal(-r), -r)


def test_side_networks() -> None:
    layer, p, got = one(pf.Side())
    net = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 6))
    net.load_state_dict({"0.weight": p["down"], "0.bias": p["c"], "2.weight": p["up"], "2.bias": p["b"]})
    s = p["a"].sigmoid()
    close(got, s * layer(X) + (1 - s) * net(X))


def test_a_side_network_of_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 6))
    outer = nn.Sequential(model).eval()
    net, x = pf.adapt(outer, {"^0$": pf.Side("fcn4")}), torch.randn(2, 3, 16, 16)
    a = random(net, scale=0.1)
    p = a["0"]
    steps: list[nn.Module] = []
    for i, (c, d, stride, padding) in enumerate([(3, 16, 1, 1), (16, 16, 2, 0), (16, 32, 2, 0), (32, 64, 1, 0)]):
        conv, norm = nn.Conv2d(c, d, 3, stride, padding, bias=False), nn.GroupNorm(2, d)
        conv.weight.data, norm.weight.data, norm.bias.data = p[f"conv{i}"], p[f"gain{i}"], p[f"bias{i}"]
        steps += [conv, norm, nn.ReLU()]
    head = nn.Linear(64, 6)
    head.weight.data, head.bias.data = p["up"], p["b"]
    side, s = nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head), p["a"].sigmoid()
    close(net.apply(a, x), s * model(x) + (1 - s) * side(x))
    both = pf.stack([a, random(net, 1)])
    close(net.mixed(both, [1, 0], x)[1:], net.apply(a, x[1:]))


def test_scetuning_at_the_output_and_at_the_skipped_channels() -> None:
    layer, p, got = one(pf.SCETuning(ratio=0.5))
    assert p["down"].shape == (3, 6)
    y = layer(X)
    close(got, y + F.linear(F.gelu(F.linear(y, p["down"], p["c"])), p["up"], p["b"]))
    conv = nn.Conv2d(5, 4, 3)
    net, x = pf.adapt(nn.Sequential(conv).eval(), {"0": pf.SCETuning("decoder", dim=2)}), torch.randn(3, 5, 6, 7)
    adapters = [random(net, i, scale=0.3) for i in range(2)]
    p = adapters[0]["0"]
    skipped = x[:, 3:].permute(0, 2, 3, 1)
    skipped = skipped + F.linear(F.gelu(F.linear(skipped, p["down"], p["c"])), p["up"], p["b"])
    want = conv(torch.cat([x[:, :3], skipped.permute(0, 3, 1, 2)], 1))
    close(net.apply(adapters[0], x), want)
    close(net.mixed(pf.stack(adapters), [1, -1, 0], x)[2], want[2])


def test_layer_gates() -> None:
    model = llama()
    net = pf.adapt(model, {r"layers\.\d+": pf.LayerGate()})
    assert len(net.plan) == 2
    a = net.init()
    close(net.apply(a, IDS).logits, model(IDS).logits)
    a["model.layers.1"]["g"] = torch.zeros(1)
    short = copy.deepcopy(model)
    del short.model.layers[1]
    close(net.apply(a, IDS).logits, short(IDS, use_cache=False).logits)
    with pytest.raises(ValueError, match="here 8 features go in and 6 come out: name a module of one width"):
        pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"0": pf.LayerGate()})


def test_layers_are_dropped_in_train_mode_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).train()
    net, x = pf.adapt(model, {"0": pf.LayerDrop(0.25)}), X[:1].repeat(200, 1, 1)
    torch.manual_seed(0)
    y = net.apply(net.init(), x)
    dropped = (y == x).flatten(1).all(1)
    assert 30 <= dropped.sum() <= 70
    close(y[~dropped], model(x)[~dropped])
    net.model.eval()
    close(net.apply(net.init(), x), model(x))


def test_noise_on_embeddings_in_train_mode_alone() -> None:
    model = nn.Sequential(nn.Embedding(24, 32), nn.Linear(32, 2))
    net = pf.adapt(model.train(), {"0": pf.NEFTune(alpha=3.0), "1.weight": pf.LoRA(2)})
    a, found = net.init(), list[Tensor]()
    ids = IDS.repeat(20, 1)
    view = pf.as_module(net, a).train()
    view[1].register_forward_hook(lambda _, args, out: found.append(args[0]))
    view(ids)
    noise, bound = (found[0] - model[0](ids)).detach(), 3.0 / (6 * 32) ** 0.5
    assert 0.99 * bound < noise.abs().max() <= bound * (1 + 1e-5)
    assert abs(noise.mean()) < 0.01 * bound
    close(noise.var(), torch.tensor(bound**2 / 3), 0.01)
    view.eval()
    close(view(ids), model(ids))


def test_res_tuning_follows_a_path_beside_the_model() -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)], nn.Linear(8, 2)).eval()
    net = pf.adapt(model, {"^3$": pf.ResTuning(("^1$", "^2$"), rank=2, root="^0$"), r"0\.0\.weight": pf.LoRA(2)})
    a = random(net, scale=0.3)
    p, merged = a["3"], copy.deepcopy(model)
    w = pf.adapt(model, {r"0\.0\.weight": pf.LoRA(2)}).merge({"0.0.weight": a["0.0.weight"]})
    merged.load_state_dict({**dict(model.state_dict()), "0.0.weight": w["0.0.weight"]})

    def tuned(name: str, h: Tensor) -> Tensor:
        return h + F.linear(F.gelu(F.linear(h, p[f"{name}_down"], p[f"{name}_c"])), p[f"{name}_up"], p[f"{name}_b"])

    b = merged[0](X)
    for i in range(2):
        b = tuned(f"lateral{i}", merged[: i + 2](X)) + tuned(f"vertical{i}", b)
    close(net.apply(a, X), model[3](b))
    slopes = grad(lambda a: net.apply(a, X).square().sum())(a)
    assert all(not t.any() for t in slopes["0.0.weight"].values())
    assert all(t.any() for t in slopes["3"].values())
    with pytest.raises(ValueError, match=r"ResTuning.stems is empty; name modules that it reads"):
        pf.ResTuning()


def test_fusion_attends_to_what_adapters_add() -> None:
    layer = nn.Linear(8, 6)
    model = nn.Sequential(layer).eval()
    each = pf.adapt(model, {"0": pf.Bottleneck(2)})
    adapters = [random(each, i, scale=0.5) for i in range(3)]
    method = pf.AdapterFusion(3, of=pf.Bottleneck(2))
    net = pf.adapt(model, {"0": method})
    p = method.fused(random(net, 9, scale=0.5)["0"], [a["0"] for a in adapters])
    y = layer(X)
    u = torch.stack([each.apply(a, X) - y for a in adapters], -2)
    q, k = F.linear(y, p["query"], p["query_bias"]), F.linear(u, p["key"], p["key_bias"])
    a = (q[..., None, :] @ k.mT).softmax(-1)
    close(net.apply({"0": p}, X), y + (a @ F.linear(u, p["value"]))[..., 0, :])
    with pytest.raises(ValueError, match=r"2 adapters are given, and AdapterFusion\(n=3.* fuses 3: give as many"):
        method.fused(p, [a["0"] for a in adapters[:2]])


# Which tokens an intervention changes.


def test_tokens_of_left_and_right_padded_rows() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    first, last = ends(mask, torch.zeros(4, 6, 2), 2, 1)
    want = [[0, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert first[..., 0].int().tolist() == want
    want = [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert last[..., 0].int().tolist() == want
    first, last = ends(mask, torch.zeros(4, 1, 2), 6, 6)  # one token, with a past
    assert first[..., 0].int().tolist() == [[1], [1], [0], [0]]
    assert not last.any()
    with pytest.raises(ValueError, match=r"hidden states \[24, 2\] have no tokens for an attention mask \[4, 6\]"):
        ends(mask, torch.zeros(24, 2), 1, 0)


@pytest.mark.parametrize("tied", [True, False])
def test_first_and_last_tokens_in_a_model(tied: bool) -> None:
    model = llama()
    net = pf.adapt(model, {r"layers\.\d+": pf.LoReFT(2, first=1, last=2, tied=tied)})
    a = random(net, scale=0.5)
    hooked = copy.deepcopy(model)
    for i, layer in enumerate(hooked.model.layers):
        p = a[f"model.layers.{i}"]

        def change(_: Any, args: Any, out: Tensor, p: Any = p) -> Tensor:
            out = out.clone()
            for row, mask in enumerate(MASK):
                places = mask.nonzero()[:, 0].tolist()
                for at, name in [(places[:1], "first_"), (places[-2:], "last_")]:
                    w, b, r = (p[k if tied else name + k] for k in ("w", "b", "r"))
                    r = orthonormal(r)
                    h = out[row, at]
                    out[row, at] = h + (F.linear(h, w, b) - h @ r.mT) @ r
            return out

        layer.register_forward_hook(change)
    close(net.apply(a, IDS, attention_mask=MASK).logits, hooked(IDS, attention_mask=MASK).logits)


def test_interventions_on_a_prompt_in_generate() -> None:
    """With a cache the first and the last tokens of the prompt alone are changed: as in a forward of the prompt,
    whose cache an unchanged model goes on with."""
    model = llama()
    net = pf.adapt(model, {r"layers\.\d+": pf.LoReFT(2, first=1, last=2)})
    a = random(net, scale=0.8)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": MASK}
    got = net.apply(a, IDS, method="generate", **options)
    places = (MASK.cumsum(1) - 1).clamp(min=0)
    out = net.apply(a, IDS, attention_mask=MASK, position_ids=places, use_cache=True)
    ids, mask, cache = IDS, MASK, out.past_key_values
    for _ in range(5):
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, torch.ones(4, 1, dtype=mask.dtype)], 1)
        places = (mask.cumsum(1) - 1)[:, -1:]
        out = model(ids[:, -1:], attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
    stop = got.shape[1]
    for row in range(4):
        made = got[row, 6:].tolist()
        end = made.index(2) + 1 if 2 in made else len(made)
        assert made[:end] == ids[row, 6:stop].tolist()[:end]
    assert not torch.equal(got, model.generate(IDS, **options))
    early = pf.adapt(model, {r"layers\.\d+": pf.LoReFT(2, first=8)})  # more than the prompt has
    with_cache = early.apply(a, IDS, method="generate", **options)
    assert torch.equal(early.apply(a, IDS, method="generate", use_cache=False, **options), with_cache)


def test_what_chooses_no_tokens() -> None:
    with pytest.raises(ValueError, match=r"LoReFT.first is -1; it counts tokens: give first >= 0"):
        pf.LoReFT(first=-1)
    with pytest.raises(ValueError, match=r"DiReFT\(tied=False\) has tensors for the first tokens and others"):
        pf.DiReFT(first=2, tied=False)
    with pytest.raises(ValueError, match=r"0: .*reads the attention mask, and no backbone is around this module"):
        pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"0": pf.LoReFT(2, first=1)})
    with pytest.raises(ValueError, match=r"LoReFT.rank is 9, above width=6: give rank <= 6"):
        pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"0": pf.LoReFT(9)})


# In models: mixed rows are each row alone, gradients too, and generate is the same with and without a cache.

LAYER, NORM = r"layers\.\d+|layer\.\d+", "model.norm"
LIVE: list[dict[str, pf.Method]] = [
    {"mlp|output": pf.Compacter(rank=4, n=2, spread=0.3)},
    {"mlp|output": pf.AdapterPlus(rank=3)},
    {LAYER: pf.LoReFT(2)},
    {LAYER: pf.LoReFT(2, first=2, last=1, tied=False)},
    {LAYER: pf.NoReFT(2, last=1), "self_attn|attention": pf.DiReFT(2, first=1)},
    {LAYER: pf.chain(pf.ConsReFT(2, first=1, last=1), pf.LobiReFT(2))},
    {"mlp|intermediate.dense": pf.Side()},
    {"mlp|output": pf.SCETuning(ratio=0.5), LAYER: pf.LayerGate()},
    {"down_proj|output.dense": pf.SCETuning("decoder", dim=5)},
    {"mlp|output": pf.AdapterFusion(2, of=pf.Bottleneck(2))},
    {
        LAYER: pf.LayerDrop(0.5),
        "embed_tokens|word_embeddings": pf.NEFTune(),
        r"[qv]_proj\.weight|query\.weight": pf.LoRA(2),
    },
]
ONES: list[dict[str, pf.Method]] = [
    {NORM: pf.ResTuning(("layers.0", "layers.1"), rank=2, root="embed_tokens")},
    {"mlp": pf.ResTuning(("layers.0.self_attn",), rank=2, of="output")},
]


def cases() -> list[Any]:
    all_ = [(make, rules) for make in (llama, bert) for rules in LIVE] + [(llama, rules) for rules in ONES]
    names = [f"{make.__name__}: {', '.join(str(m) for m in rules.values())}" for make, rules in all_]
    return [pytest.param(*case, id=name) for case, name in zip(all_, names, strict=True)]


@pytest.mark.parametrize(("make", "rules"), cases())
def test_rows_of_a_batch_and_generate(make: Any, rules: dict[str, pf.Method]) -> None:
    model = make()
    net = pf.adapt(model, rules)
    adapters = [random(net, i, scale=0.3) for i in range(3)]
    stack = pf.stack(adapters)

    def row(a: Any, i: int) -> Tensor:
        ids, mask = IDS[i : i + 1], MASK[i : i + 1]
        out = model(ids, attention_mask=mask) if a is None else net.apply(a, ids, attention_mask=mask)
        y: Tensor = out.logits
        return y[:, -1] if make is llama else y

    def rows(s: Any) -> Tensor:
        y: Tensor = net.mixed(s, INDEX, IDS, attention_mask=MASK).logits
        return y[:, -1] if make is llama else y

    rows_are_alone(INDEX, adapters, row, rows)
    each = vmap(lambda a: net.apply(a, IDS).logits)(stack)
    close(each[1], net.apply(adapters[1], IDS).logits, 1e-4)
    if make is llama:
        generates(net, adapters)


def generates(net: pf.Adapted, adapters: list[Any]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    got = net.mixed(pf.stack(adapters), INDEX, IDS, attention_mask=MASK, method="generate", **options)
    base: Any = net.model
    for i, k in enumerate(INDEX):
        at = {**options, "attention_mask": MASK[i : i + 1], "inputs": IDS[i : i + 1]}
        want = base.generate(**at) if k < 0 else net.apply(adapters[k], method="generate", **at)
        assert got[i, : want.shape[1]].tolist() == want[0].tolist()
    if not any(getattr(m, "last", 0) or hasattr(m, "methods") for m in (e.method for e in net.plan.values())):
        again = net.mixed(
            pf.stack(adapters), INDEX, IDS, attention_mask=MASK, method="generate", use_cache=False, **options
        )
        assert torch.equal(again, got)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_llama_adapter_at_gpt2_is_peft_s() -> None:
    import peft

    model = gpt2()
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, t in theirs.named_parameters():
        if "adaption_gate" in name:
            t.data.fill_(0.7)
    state = peft.get_peft_model_state_dict(theirs)
    net = pf.adapt(model, {"attn": pf.LlamaAdapter(n=3)})
    keys = {site: f"base_model.model.{site}.adaption" for site in net.plan}
    a = {site: {"prompt": state[f"{k}_prompt"][0], "gate": state[f"{k}_gate"]} for site, k in keys.items()}
    close(net.apply(a, IDS).logits, theirs(IDS).logits)
    assert not torch.allclose(net.apply(a, IDS).logits, model(IDS).logits, atol=1e-2)
    theirs(IDS).logits.square().sum().backward()
    slopes = grad(lambda a: net.apply(a, IDS).logits.square().sum())(a)
    for site in net.plan:
        (prompt,) = [t.grad for n, t in theirs.named_parameters() if site in n and n.endswith("adaption_prompt")]
        close(slopes[site]["prompt"], prompt[0], 1e-3)  # type: ignore[index]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    want = theirs.generate(input_ids=IDS, **options)
    assert torch.equal(net.apply(a, IDS, method="generate", **options), want)
    adapters = [random(net, i, scale=0.5) for i in range(3)]
    close(net.mixed(pf.stack(adapters), INDEX, IDS).logits[2:3], net.apply(adapters[0], IDS[2:3]).logits)


def test_a_bottleneck_beside_a_norm_reads_what_goes_into_it() -> None:
    """He's parallel adapter on the residual stream, for one adapter and for each row's own."""
    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=19, num_attention_heads=2, **size)).eval()
    at, norm = "model.layers.1.mlp", "model.layers.1.post_attention_layernorm"
    method = pf.Bottleneck(4, of="input", source=norm.removeprefix("model."))
    net, ids = pf.adapt(model, {at: method}), torch.tensor([[1, 2, 3], [4, 5, 6]])
    adapters: list[Any] = [random(net, seed) for seed in (1, 2)]

    def want(a: Any) -> Tensor:
        seen: list[Tensor] = []
        handles = [model.get_submodule(norm).register_forward_pre_hook(lambda m, x: seen.append(x[0]))]
        change = lambda m, x, y: method.changed(a[at], y, seen[-1])  # noqa: E731
        handles.append(model.get_submodule(at).register_forward_hook(change))
        out: Tensor = model(ids).logits
        for handle in handles:
            handle.remove()
        return out

    each = [want(a) for a in adapters]
    close(net.apply(adapters[0], ids).logits, each[0])
    close(net.mixed(pf.stack(adapters), torch.tensor([1, 0]), ids).logits, torch.stack([each[1][0], each[0][1]]))
    with pytest.raises(ValueError, match=r'source is .*layernorm.*, and of is .*output.*: give of="input"'):
        pf.Bottleneck(4, source=norm)
    with pytest.raises(ValueError, match=r"reads at 'other', and 0 modules of the model"):
        pf.adapt(model, {at: pf.Bottleneck(4, of="input", source="other")})
    with pytest.raises(ValueError, match=r"the module is a norm, and this Linear makes 24 features of 16"):
        pf.adapt(model, {r"layers\.0\.mlp\.up_proj": pf.Bottleneck(4, of="normed")})
