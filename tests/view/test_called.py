"""Methods around a module in the module view."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from support import close, random, same_state, state
from torch import nn

import peftfn as pf
from peftfn.view.module import parameters_of

IDS = torch.randint(3, 24, (3, 6), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.LlamaConfig(
            vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, attn_implementation="eager",
        )  # fmt: skip
        return tf.LlamaForCausalLM(config).eval()


def rules() -> dict[str, pf.Method]:
    return {
        "mlp": pf.Bottleneck(3),
        "self_attn": pf.LlamaAdapter(2),
        "q_proj": pf.LoRA(2),
        r"o_proj$": pf.Bottleneck(2),
    }


def test_a_language_model_generates_trains_and_saves_as_a_module(tmp_path: Any) -> None:
    net = pf.adapt(llama(), rules())
    a, before = random(net, 1, scale=0.3), state(net.model)
    m = pf.as_module(net, a)
    assert isinstance(m, tf.LlamaForCausalLM)
    close(m(IDS).logits, net.apply(a, IDS).logits)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(m.generate(IDS, **options), net.apply(a, IDS, method="generate", **options))
    held = parameters_of(m)
    assert sum(p.requires_grad for p in m.parameters()) == sum(len(leaf) for leaf in a.values())
    optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
    m.activation_checkpointing_enable()
    m.train()
    loss = m(IDS, labels=IDS).loss
    loss.backward()
    want = torch.func.grad(lambda a: net.apply(a, IDS, labels=IDS).loss)(a)
    for name, leaf in want.items():
        for key, g in leaf.items():
            close(held[name][key].grad, g, 1e-4)
    optimizer.step()
    m.eval()
    close(m(IDS).logits, net.apply(pf.adapter_of(m), IDS).logits)
    m.save_pretrained(tmp_path)
    saved = {k: t for k, t in load_file(tmp_path / "model.safetensors").items() if t.numel()}
    assert len(saved) == sum(len(leaf) for leaf in a.values())
    assert all("peftfn_call" in k or "parametrizations" in k for k in saved)
    assert same_state(before, state(net.model))


def test_several_adapters_of_several_nets_by_name() -> None:
    model = llama()
    nets = {"one": pf.adapt(model, rules()), "two": pf.adapt(model, {"mlp": pf.Bottleneck(2, of="input")})}
    adapters = {name: random(net, i, scale=0.3) for i, (name, net) in enumerate(nets.items())}
    m = pf.as_module(nets["one"], **{name: (nets[name], a) for name, a in adapters.items()})
    for name, a in adapters.items():
        with m.use(name):
            close(m(IDS).logits, nets[name].apply(a, IDS).logits)
    with m.use(None):
        assert torch.equal(m(IDS).logits, model(IDS).logits)
    pf.copy_(m, nets["two"].init(7), "two")
    kept = pf.offload_(m, "two", "meta")
    pf.onload_(m, "two", kept)
    with m.use("two"):
        close(m(IDS).logits, nets["two"].apply(nets["two"].init(7), IDS).logits)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn: LlamaAdapter\(n=2\) acts on"):
        dict(pf.merged(m))
    assert pf.base_of(m).keys() == {k for k, _ in model.named_parameters()}


def test_containers_that_run_their_parts() -> None:
    """A Sequential with an adapter runs its own parts, and no more."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 6), nn.Tanh()), nn.Linear(6, 2)).eval()
    net = pf.adapt(model, {"^0$": pf.Bottleneck(2), "": pf.Bottleneck(2, dim=2)})
    assert list(net.plan) == ["", "0"]
    a, x = random(net, 1), torch.randn(3, 8)
    m = pf.as_module(net, a)
    assert isinstance(m, nn.Sequential)
    assert len(m) == 2
    assert [type(layer).__name__ for layer in m[0]][-1] == "Tanh"
    assert torch.equal(m(x), net.apply(a, x))
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(other(x), m(x))
    buffer = io.BytesIO()
    torch.save(m.state_dict(), buffer)
    buffer.seek(0)
    fresh = pf.as_module(net, net.init(5))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x), m(x))
    assert m.double()(x.double()).dtype == torch.float64


def test_dropout_follows_the_module_s_own_mode() -> None:
    model = nn.Sequential(nn.Linear(8, 6)).eval()
    net = pf.adapt(model, {"0": pf.Bottleneck(2, dropout=0.5)})
    a, x = random(net, 1, scale=1.0), torch.randn(64, 8)
    m = pf.as_module(net, a)
    assert torch.equal(m(x), net.apply(a, x))
    assert not torch.equal(m.train()(x), m(x))
    assert torch.equal(m.eval()(x), net.apply(a, x))


def test_embeddings_with_an_adapter_are_not_replaced() -> None:
    net = pf.adapt(llama(), {"embed_tokens": pf.Bottleneck(2)})
    m = pf.as_module(net, net.init())
    with pytest.raises(ValueError, match=r"model\.embed_tokens: resize_token_embeddings would replace"):
        m.resize_token_embeddings(30)
    with pytest.raises(ValueError, match="cannot be named 'seen'"):
        pf.as_module(net, seen=net.init())


def test_what_it_says_of_itself() -> None:
    net = pf.adapt(llama(), rules())
    m = pf.as_module(net, net.init())
    assert "Bottleneck(rank=3)" in str(pf.status(m))
    assert "model.layers.0.mlp" in pf.summary(net)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    close(compiled(IDS, use_cache=False).logits, m(IDS).logits)


def test_an_adapter_for_each_row_is_not_swallowed_by_the_model() -> None:
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(rank=2)})
    m = pf.as_module(net, net.init())
    ids = torch.tensor([[1, 2, 3]])
    for run in (m, pickle.loads(pickle.dumps(m)), copy.deepcopy(m)):
        with pytest.raises(TypeError, match=r"PEFT's: write `with m\.use.*bank"):
            run(ids, adapter_names=["one"])
        with pytest.raises(ValueError, match="adapter_names"):  # transformers' own
            run.generate(ids, adapter_names=["one"], max_new_tokens=1)
