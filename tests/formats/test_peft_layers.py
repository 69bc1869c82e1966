"""PEFT both ways at layers and heads that differ from the usual: what it reads of ours gives what ours gives."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
import yaml
from models import SMALL, noise, tokens
from peft.tuners.lora.config import BdLoraConfig
from safetensors.torch import load_file
from test_checkpoint_rules import classifier, llama, lora, saved
from test_peft_parity import compare
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo.build import subject

import peftfn as pf

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def both_ways(base: nn.Module, config: peft.PeftConfig, x: Tensor, folder: Path) -> pf.Loaded:
    """PEFT's adapter, loaded, saved and read by PEFT again: three times the same outputs."""
    model = saved(folder / "theirs", copy.deepcopy(base), config)
    loaded = pf.load(folder / "theirs", base)
    pf.save(folder / "ours", loaded.net, loaded.adapter, format="peft", extra=loaded.extra)
    with torch.no_grad():
        want = model(x)
        compare(loaded.net.apply(loaded.adapter, x), want)
        compare(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder / "ours").eval()(x), want)
        assert (base(x) - want).abs().max() > 1e-3
    return loaded


TARGET = {"target_modules": ["0"]}
WINDOWS: dict[str, tuple[Any, Any]] = {
    "LoHa": (peft.LoHaConfig, {"r": 2}),
    "LoHa, Tucker": (peft.LoHaConfig, {"r": 2, "use_effective_conv2d": True}),
    "LoKr": (peft.LoKrConfig, {"r": 2}),
    "IA3": (peft.IA3Config, {"feedforward_modules": []}),
}


@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"groups": 2, "dilation": 2}], ids=str)
def test_convolutions_with_groups_and_dilation(case: str, options: dict[str, int], tmp_path: Path) -> None:
    cls, given = WINDOWS[case]
    both_ways(nn.Sequential(nn.Conv2d(4, 8, 3, **options)), cls(**TARGET, **given), noise(2, 4, 9, 9), tmp_path)


def test_a_scale_of_grouped_inputs_has_no_form(tmp_path: Path) -> None:
    net = pf.adapt(nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), {"weight": pf.IA3(feedforward=True)})
    with pytest.raises(ValueError, match=r"0\.weight.*groups=2"):
        pf.save(tmp_path, net, net.init(), format="peft")


def test_super_tunings_places_are_found_in_the_base_where_the_file_leaves_them_out(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    with pytest.warns(UserWarning, match="recomputed"):
        config = peft.SupertuningConfig(target_modules=["0", "2"], sparsity=0.8, r=2, save_precomputed_indices=False)
    loaded = both_ways(base, config, noise(5, 8), tmp_path)
    assert not any("indices" in key for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    assert all(isinstance(e.method, pf.SuperTuning) for e in loaded.net.plan.values())


def test_ia3_ahead_of_a_grouped_convolution_is_refused_by_name(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"], init_ia3_weights=False)
    saved(tmp_path, copy.deepcopy(base), config)
    with pytest.raises(ValueError, match=r"0\.weight: PEFT's feed-forward IA3 scales each of the 4 channels"):
        pf.load(tmp_path, base)


def test_waveft_at_conv1d(tmp_path: Path) -> None:
    both_ways(nn.Sequential(Conv1D(8, 12)), peft.WaveFTConfig(n_frequency=8, **TARGET), noise(2, 12), tmp_path)


@pytest.mark.parametrize("alpha", [8, 3])
@pytest.mark.parametrize("split", [False, True])
def test_lokr_at_conv1d_is_what_peft_computes(alpha: int, split: bool, tmp_path: Path) -> None:
    config = peft.LoKrConfig(r=8 if not split else 1, alpha=alpha, decompose_both=split, **TARGET)
    both_ways(nn.Sequential(nn.Conv1d(8, 8, 3)), config, noise(2, 8, 9), tmp_path)


@pytest.mark.parametrize("r", [256, 1024])
def test_ranks_far_beyond_a_layers_sizes(r: int, tmp_path: Path) -> None:
    both_ways(nn.Sequential(nn.Linear(6, 4)), peft.VeraConfig(r=r, **TARGET), noise(2, 6), tmp_path)


def test_starts_in_capitals_and_patterns_of_no_names(tmp_path: Path) -> None:
    config = lora(init_lora_weights="GAUSSIAN", target_modules=["0"])
    both_ways(nn.Sequential(nn.Linear(6, 4)), config, noise(2, 6), tmp_path)
    file = tmp_path / "theirs" / "adapter_config.json"
    text = file.read_text()
    assert '"layers_pattern": null' in text
    file.write_text(text.replace('"layers_pattern": null', '"layers_pattern": ""'))
    assert list(pf.load(tmp_path / "theirs", nn.Sequential(nn.Linear(6, 4))).net.plan) == ["0.weight"]


def test_a_module_beside_one_of_its_name_in_module(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.foo, self.module = nn.Linear(6, 6), nn.ModuleDict({"foo": nn.Linear(6, 6)})

        def forward(self, x: Tensor) -> Tensor:
            return self.foo(torch.tanh(self.module["foo"](x)))

    loaded = both_ways(Twice(), lora(target_modules=["foo"], rank_pattern={"^foo": 3}), noise(2, 6), tmp_path)
    assert [e.method.rank for e in loaded.net.plan.values()] == [3, 2]


def test_blocks_at_some_of_the_layers(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4))
    blocks = BdLoraConfig(target_modules_bd_b=["1"], nblocks=2, match_strict=False)
    both_ways(base, lora(target_modules=["0", "1"], use_bdlora=blocks), noise(2, 8), tmp_path)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trained_biases_of_an_attention(bias: str, tmp_path: Path) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.mha(x, x, x)[0]

    both_ways(Attends(), lora(target_modules=["mha"], bias=bias), noise(5, 8), tmp_path)
    keys = {k for k in load_file(tmp_path / "theirs" / "adapter_model.safetensors") if "bias" in k}
    assert keys and keys <= load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()


@pytest.mark.parametrize("kind", ["Roberta", "Bert", "DistilBert", "Electra"])
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_heads_of_one_and_of_more_layers(kind: str, task: str | None, tmp_path: Path) -> None:
    """PEFT names the head in its own way where the task says that there is one: so must we."""
    if kind == "DistilBert":
        c = {"dim": 16, "hidden_dim": 24, "n_layers": 1, "n_heads": 2, "dropout": 0.0, "seq_classif_dropout": 0.0}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            options = {k: v for k, v in SMALL.items() if not k.endswith("s_token_id")}
            config = tf.DistilBertConfig(**options, **c, max_position_embeddings=16)
            base = tf.DistilBertForSequenceClassification(config).eval()
    else:
        base = classifier(kind)
    whole = {} if task else {"modules_to_save": ["classifier"]}
    targets = ["q_lin"] if kind == "DistilBert" else ["query"]
    model = saved(tmp_path / "theirs", copy.deepcopy(base), lora(task_type=task, target_modules=targets, **whole))
    loaded = pf.load(tmp_path / "theirs", base)
    pf.save(tmp_path / "ours", loaded.net, loaded.adapter, format="peft", extra={"task_type": "SEQ_CLS"})
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    with torch.no_grad():
        want = model(tokens(2)).logits
        compare(loaded.net.apply(loaded.adapter, tokens(2)).logits, want)
        compare(again(tokens(2)).logits, want)
    bare = pf.adapt(base, {rf"{targets[0]}\.weight": pf.LoRA(2, init_weights="random")})  # and where it is not trained
    pf.save(tmp_path / "bare", bare, bare.init(), format="peft", extra={"task_type": "SEQ_CLS"})
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "bare").eval()
    with torch.no_grad():
        compare(again(tokens(2)).logits, bare.apply(bare.init(), tokens(2)).logits)


@pytest.mark.parametrize("rule", [r"shared_experts\.\w+_proj", r"layers\.0\.mlp\.down_proj"])
def test_layers_that_peft_takes_for_experts_are_refused_by_name(rule: str, tmp_path: Path) -> None:
    c = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 8}
    c |= {"num_attention_heads": 2, "num_key_value_heads": 2, "n_routed_experts": 4, "first_k_dense_replace": 1}
    model = tf.Glm4MoeForCausalLM(tf.Glm4MoeConfig(**SMALL, **c, num_experts_per_tok=2)).eval()
    net = pf.adapt(model, {rule: pf.LoRA(2)})
    with pytest.raises(ValueError, match=rf"{rule}.*native"):
        pf.save(tmp_path, net, net.init(), format="peft")
    assert not any(tmp_path.iterdir())
    net = pf.adapt(model, {r"self_attn\.q_proj": pf.LoRA(2, init_weights="random")})
    pf.save(tmp_path, net, net.init(), format="peft")
    with torch.no_grad():
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
        compare(again(tokens(2)).logits, net.apply(net.init(), tokens(2)).logits)


FORMATS = ["native", "peft", "swift", "kohya"]


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_a_folder_has_one_adapter(first: str, second: str, tmp_path: Path) -> None:
    """What was saved last is what is loaded, and no file of a former adapter is left beside it."""
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(2, init_weights="random")})
    for seed, format in enumerate((first, second)):
        pf.save(tmp_path, net, net.init(seed), format=format)
    _, adapter = pf.load(tmp_path, net.model)
    want = net.init(1)
    assert all(torch.equal(t, want[n][k]) for n, leaf in adapter.items() for k, t in leaf.items())
    assert sum(p.suffix == ".safetensors" for p in tmp_path.iterdir()) == (second != "swift")


def test_a_folder_for_peft_has_a_card_and_a_users_own_stays(tmp_path: Path) -> None:
    model = llama()
    model.name_or_path = "owner/base: the best"
    net = pf.adapt(model, {"q_proj": pf.LoRA(2), "0.self_attn.v_proj": pf.LoRA(2), "model.norm": pf.Full()})
    pf.save(tmp_path, net, net.init(), format="peft")
    text = (tmp_path / "README.md").read_text()
    meta = yaml.safe_load(text.split("---")[1])
    assert meta["base_model"] == "owner/base: the best" and meta["library_name"] == "peft"
    count = sum(t.numel() for t in load_file(tmp_path / "adapter_model.safetensors").values())
    assert f"{count:,} numbers" in text and "| `LoRA(rank=2)` | 3 |" in text and "| `Full()` | 1 |" in text
    (tmp_path / "README.md").write_text("mine")
    pf.save(tmp_path, net, net.init(), format="peft")
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("kind", ["laguna", "mistral_large4_text", "unlimited_ocr"])
def test_names_that_peft_takes_for_old_ones(kind: str, tmp_path: Path) -> None:
    """transformers turns `shared_expert` into `shared_experts`, and would turn the latter into a third name."""
    model = subject(kind).model
    net = pf.adapt(model, {r"shared_experts\.(gate|up|down)_proj": pf.LoRA(2)})
    with pytest.raises(
        ValueError, match=r"shared_experts\.\w+_proj and \d+ more: PEFT renames this layer to .* native"
    ):
        pf.save(tmp_path / "a", net, net.init(), format="peft")
    assert not (tmp_path / "a").exists()
    pf.save(tmp_path / "a", net, net.init())
    assert pf.load(tmp_path / "a", model).adapter.keys() == net.plan.keys()
