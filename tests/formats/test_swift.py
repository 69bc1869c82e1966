"""ms-swift's folders: files from a small writer with PEFT's own in-memory names, which are ms-swift's."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfn as pf
from peftfn.formats import swift

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Net(nn.Module):
    """Names with the adapter's name and the word lora in them."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embed_tokens, self.norm = nn.Embedding(7, 8), nn.LayerNorm(8)
            self.default = nn.ModuleDict({"lora_A": nn.Linear(8, 6), "q_proj": nn.Linear(6, 8)})
            self.conv, self.score = nn.Conv2d(2, 3, 2), nn.Linear(9, 5)

    def forward(self, ids: Tensor) -> Tensor:  # [b, 8]
        x = self.norm(self.embed_tokens(ids))
        x = torch.tanh(self.default["q_proj"](torch.tanh(self.default["lora_A"](x))))
        return self.score(torch.tanh(self.conv(x.reshape(len(x), 2, 4, 8)[..., :4])).flatten(2)).mean(1)


IDS = torch.arange(24).reshape(3, 8) % 7
CASES: dict[str, dict[str, Any]] = {
    "lora": {"target_modules": ["q_proj", "lora_A"]},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "conv"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "conv"]},
    "bias": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["score"]},
}
SWIFT = {
    "model_key_mapping": None,
    "use_qa_lora": False,
    "use_merged_linear": False,
    "enable_lora": None,
    "lora_dtype": None,
    "lorap_lr_ratio": 16.0,
    "lorap_emb_lr": 1e-6,
}


def tuned(case: str, name: str = "default", seed: int = 1) -> nn.Module:
    """A model of PEFT's with random values in everything that is trained."""
    config = peft.LoraConfig(r=2, lora_alpha=3, **CASES[case])
    model = peft.get_peft_model(Net(), config, adapter_name=name).eval()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def write(folder: Path, model: Any, name: str = "default", **changes: Any) -> Path:
    """`folder/name` as ms-swift's save_pretrained leaves it (PEERS.md 3.2): PEFT's names in memory, without prefix."""
    out = {}
    for key, p in model.state_dict().items():
        bare = key.removeprefix("base_model.model.")
        if f".modules_to_save.{name}." in bare:
            out[bare.replace(f".modules_to_save.{name}.", ".")] = p.clone()
        elif ".lora_" in bare.replace("default.lora_A.", "default.") or (
            bare.endswith("base_layer.bias") and model.peft_config[name].bias != "none"
        ):
            out[bare] = p.clone()
    config = model.peft_config[name].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    config |= {**SWIFT, "swift_type": "LORA", "peft_type": "LORA", **changes}
    put(folder / name, out, config)
    (folder / "configuration.json").write_text("{}")
    return folder


def put(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True, default=str))


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["default", "q_proj"])
@pytest.mark.parametrize("case", CASES)
def test_a_folder_gives_the_same_outputs(case: str, name: str, tmp_path: Path) -> None:
    model, base = tuned(case, name), Net()
    folder = write(tmp_path / "swift", model, name)
    for where, options in ((folder, {}), (folder, {"subfolder": name}), (folder / name, {})):
        net, adapter = pf.load(where, base, **options)
        torch.testing.assert_close(net.apply(adapter, IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert (model(IDS) - base(IDS)).abs().max() > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_what_we_write_has_swift_names_and_values(case: str, tmp_path: Path) -> None:
    """The writer's files are the reference; so are PEFT's outputs with our tensors under its names in memory."""
    model, base = tuned(case, "tuned"), Net()
    net, adapter = pf.load(write(tmp_path / "theirs", model, "tuned"), base)
    pf.save(tmp_path / "ours", net, adapter, format="swift", name="tuned")
    theirs, ours = (load_file(tmp_path / w / "tuned" / "adapter_model.safetensors") for w in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=1e-6)
    config = json.loads((tmp_path / "ours" / "tuned" / "adapter_config.json").read_text())
    assert {k: config[k] for k in SWIFT} == SWIFT
    assert (config["swift_type"], config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", "LORA", 2, 3)
    again = pf.load(tmp_path / "ours", base)
    torch.testing.assert_close(again.net.apply(again.adapter, IDS), model(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["lora", "dora", "embedding", "head"])
def test_to_peft_keeps_everything(case: str, tmp_path: Path) -> None:
    """ms-swift's own save_pretrained(peft_format=True) loses DoRA's magnitude."""
    model = tuned(case)
    swift.to_peft(write(tmp_path / "swift", model), tmp_path / "peft")
    again = peft.PeftModel.from_pretrained(Net(), str(tmp_path / "peft")).eval()
    torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    assert "swift_type" not in json.loads((tmp_path / "peft" / "adapter_config.json").read_text())


@pytest.mark.parametrize("case", ["lora", "dora", "embedding"])
def test_a_folder_saved_in_peft_format_keeps_its_magnitude(case: str, tmp_path: Path) -> None:
    """ms-swift leaves the adapter's name in DoRA's key there, and PEFT then starts from a fresh magnitude."""
    model, base = tuned(case), Net()
    folder = write(tmp_path / "swift", model) / "default"
    tensors = {}
    for key, t in load_file(folder / "adapter_model.safetensors").items():
        new = re.sub(r"\.(lora_[AB]|lora_embedding_[AB])\.default", r".\1", key)
        tensors[f"base_model.model.{new}"] = t
    put(tmp_path / "peft", tensors, config(tmp_path / "swift"))
    assert case != "dora" or any(k.endswith("lora_magnitude_vector.default.weight") for k in tensors)
    net, adapter = pf.load(tmp_path / "peft", base)
    torch.testing.assert_close(net.apply(adapter, IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_names_are_renamed_exactly(tmp_path: Path) -> None:
    """ms-swift renames by str.replace, which also hits modules that have the adapter's name."""
    one, two = tuned("lora", "q_proj"), tuned("dora", "lora", seed=2)
    write(write(tmp_path / "both", one, "q_proj"), two, "lora")
    with pytest.raises(ValueError, match=r"several adapters: lora, q_proj\. Name one with subfolder="):
        pf.load(tmp_path / "both", Net())
    base = Net()
    for names, want in {
        None: {"lora": two, "q_proj": one},
        ("q_proj",): {"q_proj": one},
        (("q_proj", "default"), ("lora", "q_proj")): {"default": one, "q_proj": two},
    }.items():
        given = dict(names) if names and isinstance(names[0], tuple) else names
        found = pf.load_all(tmp_path / "both", base, given)
        assert found.keys() == want.keys()
        for name, (net, adapter) in found.items():
            torch.testing.assert_close(net.apply(adapter, IDS), want[name](IDS), rtol=1e-5, atol=1e-5)
    with pytest.raises(FileNotFoundError, match="no adapter 'x'; it has lora, q_proj"):
        pf.load_all(tmp_path / "both", base, ["x"])
    with pytest.raises(ValueError, match="two adapters have the same name"):
        pf.load_all(tmp_path / "both", base, {"lora": "a", "q_proj": "a"})


def test_extra_states_belong_to_every_adapter(tmp_path: Path) -> None:
    model, base = tuned("lora"), Net()
    folder = write(tmp_path / "swift", model)
    new = {"norm.weight": noise(8), "score.bias": noise(5, seed=6)}
    put(folder / "extra_states", new, {"extra_state_keys": ["norm.*", "score.bias"]})
    assert pf.load_all(folder, base).keys() == {"default"}
    net, adapter = pf.load(folder, base)
    assert {n for n, e in net.plan.items() if isinstance(e.method, pf.Full)} == new.keys()
    inner = model.base_model.model
    inner.load_state_dict(new, strict=False)
    torch.testing.assert_close(net.apply(adapter, IDS), model(IDS), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="extra_states"):
        swift.to_peft(folder, tmp_path / "peft")
    put(
        tmp_path / "twice" / "default",
        load_file(folder / "default" / "adapter_model.safetensors") | new,
        config(folder),
    )
    put(tmp_path / "twice" / "extra_states", new, {"extra_state_keys": ["norm.*"]})
    with pytest.raises(ValueError, match=r"extra_states.*norm\.weight is in"):
        pf.load(tmp_path / "twice", base)


def config(folder: Path, name: str = "default") -> dict[str, Any]:
    return json.loads((folder / name / "adapter_config.json").read_text())


def test_longlora_has_embeddings_and_norms_in_full(tmp_path: Path) -> None:
    model, base = tuned("lora"), Net()
    folder = write(tmp_path / "swift", model)
    new = {"embed_tokens.weight": noise(7, 8), "norm.weight": base.norm.weight.detach(), "norm.bias": noise(8)}
    long = {"swift_type": "longlora", "peft_type": None, "embedder_and_normalizer": ["embed", "norm"]}
    long |= {"model_type": "llama", "group_size_ratio": 0.25}
    tensors = load_file(folder / "default" / "adapter_model.safetensors")
    put(tmp_path / "long" / "default", tensors | new, config(folder) | long)
    net, adapter = pf.load(tmp_path / "long", base)
    assert {n for n, e in net.plan.items() if isinstance(e.method, pf.Full)} == new.keys(), "also what did not change"
    model.base_model.model.load_state_dict(new, strict=False)
    torch.testing.assert_close(net.apply(adapter, IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_part_is_modules_in_full_both_ways(tmp_path: Path) -> None:
    base, other = Net(), Net()
    new = {"score.weight": noise(5, 9), "score.bias": noise(5), "default.q_proj.weight": noise(8, 6)}
    new["default.q_proj.bias"] = base.default["q_proj"].bias.detach()
    target = {"swift_type": "part", "model_key_mapping": None, "target_modules": r"score|default\.q_proj"}
    put(tmp_path / "part" / "default", new, target)
    net, adapter = pf.load(tmp_path / "part", base)
    assert set(net.plan) == new.keys()
    other.load_state_dict(new, strict=False)
    torch.testing.assert_close(net.apply(adapter, IDS), other(IDS), rtol=1e-5, atol=1e-5)
    pf.save(tmp_path / "ours", net, adapter, format="swift")
    ours = load_file(tmp_path / "ours" / "default" / "adapter_model.safetensors")
    assert ours.keys() == new.keys()
    for key in new:
        torch.testing.assert_close(ours[key], new[key], rtol=1e-6, atol=1e-6)
    written = config(tmp_path / "ours")
    assert written["swift_type"] == "part"
    assert {m for m, _ in base.named_modules() if re.fullmatch(written["target_modules"], m)} == {
        "score",
        "default.q_proj",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"swift_type": "ROME"}, "swift_type is 'ROME'; this release reads LORA, longlora, part"),
        ({"swift_type": None}, "swift_type is 'None'"),
        ({"swift_type": {}}, "swift_type is '{}'"),
        ({"use_qa_lora": True}, "use_qa_lora is True"),
        ({"use_merged_linear": True, "enable_lora": [True]}, "use_merged_linear is True"),
        ({"r": "two"}, "r is 'two'"),
        ({"some_new_option": 3}, "some_new_option is 3, which LoRA does not have"),
    ],
)
def test_what_would_change_the_outputs_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "swift", tuned("lora"), **changes)
    with pytest.raises(ValueError, match=message) as error:
        pf.load(folder, Net())
    assert "adapter_config.json" in str(error.value)


def test_keys_of_two_adapters_in_one_file_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "swift", tuned("lora"))
    tensors = load_file(folder / "default" / "adapter_model.safetensors")
    more = {k.replace("lora_B.default", "lora_B.other"): t for k, t in tensors.items()}
    put(tmp_path / "two" / "default", more, config(folder))
    with pytest.raises(
        ValueError, match=r"lora_A\.default\.weight' and '.*lora_B\.other\.weight' belong to two adapters"
    ):
        pf.load(tmp_path / "two", Net())


def test_what_swift_cannot_say_is_not_written(tmp_path: Path) -> None:
    base = Net()
    for rules, message in {
        (("q_proj", pf.LoHa(rank=2)),): "ms-swift has LoRA and whole modules, and this is PEFT's LOHA",
        (("q_proj", pf.LoRA(rank=2, lora_bias=True)),): "ms-swift's LoRA has no lora_bias",
        (("q_proj", pf.LoRA(rank=2)), ("score", pf.LoRA(rank=3))): "ms-swift's LoRA has no rank_pattern",
    }.items():
        net = pf.adapt(base, dict(rules))
        with pytest.raises(ValueError, match=message):
            pf.save(tmp_path / "no", net, net.init(), format="swift")
    net = pf.adapt(base, {"q_proj": pf.LoRA(rank=2)})
    for name in ("../up", "extra_states", "a.b", ""):
        with pytest.raises(ValueError, match="name is"):
            pf.save(tmp_path / "no", net, net.init(), format="swift", name=name)
    assert not (tmp_path / "no").exists()
