"""Adapters of several methods active at once, against `peft.PeftMixedModel`, all from PEFT's files."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftfn as pf

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it

IDS = torch.tensor([[1, 5, 9, 3], [2, 2, 7, 4]])
CONFIGS: dict[str, Any] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "v_proj"]),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj", "up_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"]),
}


@cache
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of each method, away from its start."""
    path = tmp_path_factory.mktemp("several")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(base()), config())
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.2 * torch.randn_like(p)
        model.save_pretrained(path / name)
    return path


def mixed(folder: Path, names: list[str]) -> Any:
    model = peft.PeftMixedModel.from_pretrained(copy.deepcopy(base()), str(folder / names[0]), adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(str(folder / name), adapter_name=name)
    model.set_adapter(names)
    return model.eval()


def near(got: Tensor, want: Tensor) -> None:
    assert (want - base()(IDS).logits).abs().max() > 1e-2  # the adapters do something
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("names", [["lora", "loha"], ["lokr", "lora"], ["lora", "loha", "lokr"]], ids="+".join)
def test_all_are_active_in_a_call_and_in_a_module(names: list[str], folder: Path) -> None:
    want = mixed(folder, names)(IDS).logits
    loaded = {n: pf.load(folder / n, base()) for n in names}
    several, stacks = pf.Nets([x.net for x in loaded.values()]), [pf.stack([x.adapter]) for x in loaded.values()]
    near(several.gated(stacks, torch.ones(len(names)), IDS).logits, want)
    first, *_ = names
    m = pf.as_module(loaded[first].net, **{n: (x.net, x.adapter) for n, x in loaded.items()}).eval()
    m.use_(names)
    near(m(IDS).logits, want)
    with m.use(first):
        near(m(IDS).logits, loaded[first].net.apply(loaded[first].adapter, IDS).logits)


def test_they_train_together_as_in_peft(folder: Path) -> None:
    names = ["lora", "loha"]
    theirs = mixed(folder, names)
    for n, p in theirs.named_parameters():
        p.requires_grad_("lora_" in n or "hada_" in n)
    theirs(IDS, labels=IDS).loss.backward()
    loaded = [pf.load(folder / n, base()) for n in names]
    several = pf.Nets([x.net for x in loaded])

    def loss(adapters: Any) -> Tensor:
        stacks = [pf.stack([a]) for a in adapters]
        return several.gated(stacks, torch.ones(2), IDS, labels=IDS).loss  # type: ignore[no-any-return]

    slopes = torch.func.grad(loss)([x.adapter for x in loaded])
    ours = sorted(g.norm().item() for tree in slopes for leaf in tree.values() for g in leaf.values())
    assert ours[0] > 0
    want = sorted(p.grad.norm().item() for p in theirs.parameters() if p.requires_grad)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(want), atol=1e-5, rtol=1e-3)


def test_one_merged_model_of_them_all(folder: Path) -> None:
    want = mixed(folder, ["lora", "loha"]).merge_and_unload()(IDS).logits
    pairs: Any = [pf.load(folder / n, base()) for n in ("lora", "loha")]
    net, a = pf.merging.linear([(net, a) for net, a in pairs], [1.0, 1.0], energy=1.0)
    near(torch.func.functional_call(base(), net.merge(a), (IDS,)).logits, want)


MULTIPLIED: dict[str, Any] = {
    "IA3": lambda: peft.IA3Config(target_modules=["2"], feedforward_modules=[]),
    "OFT": lambda: peft.OFTConfig(target_modules=["2"], r=0, oft_block_size=4),
    "BOFT": lambda: peft.BOFTConfig(target_modules=["2"], boft_block_size=4),
    "HRA": lambda: peft.HRAConfig(target_modules=["2"], r=4),
    "RoAd": lambda: peft.RoadConfig(target_modules=["2"], group_size=4),
}


@pytest.mark.parametrize("kind", MULTIPLIED)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_what_peft_multiplies_is_a_chain(kind: str, tmp_path: Path) -> None:
    """The second adapter acts on what the first gave; OFT's first one is the outer one."""
    torch.manual_seed(0)
    mlp, x, loaded = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)), torch.randn(5, 8), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = peft.get_peft_model(copy.deepcopy(mlp), MULTIPLIED[kind]())
        for p in model.parameters():
            if p.requires_grad:
                p.data += 0.3 * torch.randn_like(p)
        model.save_pretrained(tmp_path / str(seed))
        loaded.append(pf.load(tmp_path / str(seed), mlp))
    both = peft.PeftModel.from_pretrained(copy.deepcopy(mlp), str(tmp_path / "1"), adapter_name="one")
    both.load_adapter(str(tmp_path / "2"), adapter_name="two")
    both.base_model.set_adapter(["one", "two"])
    want = both.eval()(x)

    order = loaded[::-1] if kind == "OFT" else loaded
    net = pf.adapt(mlp, {"2.weight": pf.chain(*(x.net.plan["2.weight"].method for x in order))})
    a = {"2.weight": {f"{i}.{k}": t for i, one in enumerate(order) for k, t in one.adapter["2.weight"].items()}}
    torch.testing.assert_close(net.apply(a, x), want)
    nets, stacks = pf.Nets([x.net for x in loaded]), [pf.stack([x.adapter]) for x in loaded]
    assert (nets.gated(stacks, torch.ones(2), x) - want).abs().max() > 0.05  # the sum is something else
