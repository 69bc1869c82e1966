"""Adapters that compute in fp32 on a half-precision base: `net.in_fp32()`."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import FIRST, everywhere, random
from torch import Tensor, nn
from torch.func import grad, vmap
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf

TURNS = (pf.OFT, pf.BOFT, pf.DiagOFT, pf.HRA, pf.GLoRALycoris, pf.IA3, pf.InputDoRA, pf.PVeRA, pf.Chain)
"""They change the input or multiply it, and the base's product rounds what they make of it."""


@pytest.mark.parametrize("method", [m for m in FIRST if "linear" in m.kinds], ids=str)
def test_what_a_method_adds_is_rounded_once(method: Any) -> None:
    """|y − y in fp32| is at most what rounding the base's product, its bias and the sum costs, in every call."""
    half = nn.Sequential(nn.Linear(64, 48)).bfloat16().eval()
    wide = copy.deepcopy(half).float()
    net, exact = (everywhere(pf.adapt(m, {"0.weight": method})) for m in (half, wide))
    a, x = random(net, 1, scale=0.3), torch.randn(3, 5, 64).bfloat16()
    full, want, base = net.in_fp32(), exact.apply(a, x.float()), wide(x.float())
    room = (want.abs() + base.abs() + 0.1 * want.abs().max()) * (4 if type(method) in TURNS else 1) * 2**-7
    many = pf.stack([a, a])
    calls = {
        "apply": full.apply(a, x),
        "mixed": full.mixed(many, [0, 1, 0], x),
        "gated": full.gated(many, torch.tensor([0.5, 0.5]), x),
        "as_module": pf.as_module(full, a).eval()(x),
        "vmap": vmap(full.apply, (0, None))(many, x)[1],
    }
    for name, y in calls.items():
        assert y.dtype == torch.bfloat16, name
        assert ((y.float() - want).abs() <= room).all(), f"{name}: {((y.float() - want).abs() / room).max():.2f}"


def peft_config(kind: str) -> Any:
    q = {"target_modules": ["q_proj", "down_proj"]}
    if kind == "LoRA":
        return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj", "embed_tokens"])
    if kind == "DoRA":
        return peft.LoraConfig(r=4, use_dora=True, **q)
    return peft.VeraConfig(r=4, target_modules=["q_proj"]) if kind == "VeRA" else peft.OFTConfig(oft_block_size=4, **q)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "VeRA", "OFT"])
def test_as_peft_computes_to_the_bit(kind: str, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(config).bfloat16().eval()
    ids = torch.randint(0, 50, (2, 9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(copy.deepcopy(base), peft_config(kind)).eval()
        trained = [p for p in theirs.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        for p in trained:
            p.data += (1 if kind == "VeRA" else 0.1) * torch.randn(p.shape)
        theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    net, a = pf.load(tmp_path, base)
    want = theirs(ids).logits
    assert want.dtype == torch.bfloat16
    assert torch.equal(net.in_fp32().apply(a, ids).logits, want)
    assert not torch.equal(net.apply(a, ids).logits, want)  # else nothing was compared


def cosine(a: Any, b: Any) -> float:
    return torch.cosine_similarity(a.flatten().float(), b.flatten().float(), dim=0).item()


def test_gradients_are_nearer_to_those_in_fp32() -> None:
    half = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).bfloat16()
    net = pf.adapt(half, {"weight": pf.LoRA(rank=4)})
    exact = pf.adapt(copy.deepcopy(half).float(), {"weight": pf.LoRA(rank=4)})
    a, x = random(net, 1, scale=0.3), torch.randn(16, 64).bfloat16()

    def slope(net: pf.Adapted, x: Tensor) -> Tensor:
        g = grad(lambda a: net.apply(a, x).float().square().sum())(a)
        return torch.cat([t.flatten() for leaf in g.values() for t in leaf.values()])

    want = slope(exact, x.float())
    far, near = (1 - cosine(slope(n, x), want) for n in (net, net.in_fp32()))
    assert near < far < 1e-2


def test_under_autocast_the_base_multiplies_in_half_precision_and_the_adapter_in_fp32() -> None:
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    model[0].weight.data.zero_()
    net = pf.adapt(model, {"weight": pf.LoRA(rank=4)})
    a, x = random(net, 1, scale=0.3), torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.in_fp32().apply(a, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, net.apply(a, x).bfloat16())


def test_it_compiles() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(16, 8)).bfloat16(), {"weight": pf.LoRA(rank=2)}).in_fp32()
    a, x = random(net), torch.randn(3, 16).bfloat16()
    torch._dynamo.reset()
    run = torch.compile(net.apply, backend="eager", fullgraph=True)
    assert torch.equal(run(a, x), net.apply(a, x))


def test_convolutions_and_norms() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)).bfloat16()
    wide = copy.deepcopy(model).float()
    rules = {"0.weight": pf.LoRA(rank=2), "1": pf.Full()}
    net, exact = pf.adapt(model, rules).in_fp32(), pf.adapt(wide, rules)
    a, x = random(net, 1), torch.randn(2, 4, 7, 7).bfloat16()
    torch.testing.assert_close(net.apply(a, x).float(), exact.apply(a, x.float()), atol=2e-2, rtol=2e-2)


def test_fp32_models_and_other_nets_stay_as_they_are() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(16, 8)), {"weight": pf.LoRA(rank=2)})
    a, x = random(net), torch.randn(3, 16)
    full = net.in_fp32()
    assert torch.equal(full.apply(a, x), net.apply(a, x))
    assert not any(e.fp32 for e in net.plan.values())
    assert torch.equal(full.merge(a)["0.weight"], net.merge(a)["0.weight"])
