"""What holds for every format: an option acts or is refused, and `save` takes what `load` says beside the adapter."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import transformers as tf
from safetensors.torch import save_file

import peftfn as pf
from peftfn.formats import FORMATS
from peftfn.formats.files import Options
from peftfn.formats.peft_extra import INVOCATION, KEYS, REPLICATION

D, LAYER = 16, "model.layers.0"
SAID = {"task_type": "CAUSAL_LM", "base_model_name_or_path": "own/er", "revision": "main"}
LORA = {"q_proj": pf.LoRA(rank=2)}


def model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": D, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 32}
    config = tf.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, pad_token_id=0)
    return tf.LlamaForCausalLM(config).eval()


def written(format: str, rules: dict[str, Any], **options: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "a.gguf" if format == "gguf" else folder / "a"
        spans = options.get("extra", {}).get(REPLICATION)
        net = pf.adapt(pf.replicate(model(), spans) if spans else model(), rules)
        pf.save(path, net, net.init(), format=format, **options)
        return path

    return write


def adapterhub(folder: Path) -> Path:
    config = {"architecture": "lora", "r": 2, "alpha": 4}
    whole = {"config": config, "name": "task", "model_name": "own/er", "version": "adapters.1.3.0"}
    at = f"{LAYER}.self_attn.q_proj.loras.task"
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    save_file({f"{at}.lora_A": torch.ones(2, D), f"{at}.lora_B": torch.ones(D, 2)}, folder / "adapter.safetensors")
    return folder


def pyreft(folder: Path) -> Path:
    tensors = {"learned_source.weight": torch.ones(2, D), "learned_source.bias": torch.ones(2)}
    tensors["proj_layer.weight"] = torch.ones(2, D)
    torch.save(tensors, folder / "intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin")
    types = ["<class 'pyreft.interventions.NodireftIntervention'>"]
    (folder / "config.json").write_text(json.dumps({"intervention_types": types}))
    return folder


def swift_adapter(folder: Path) -> Path:
    at = f"{LAYER}.mlp.adapter_default"
    shapes = {"linear1.weight": (2, D), "linear1.bias": (2,), "linear2.weight": (D, 2), "linear2.bias": (D,)}
    (folder / "default").mkdir()
    (folder / "default" / "adapter_config.json").write_text(json.dumps({"swift_type": "ADAPTER"}))
    tensors = {f"{at}.{k}": torch.ones(s) for k, s in shapes.items()}
    save_file(tensors, folder / "default" / "adapter_model.safetensors")
    return folder


@dataclass(frozen=True)
class Case:
    format: str
    write: Callable[[Path], Path]
    takes: set[str] = field(default_factory=set)  # options that mean something
    more: dict[str, Any] = field(default_factory=dict)  # what `load` needs
    extra: dict[str, Any] = field(default_factory=dict)  # what the file says
    peft: bool = True  # whether PEFT has a form for it


PEFT = {"key_mapping", "experts", "ignore", "stored"}
ALLOW = {"strict", "pickled", "buffers"}
"""What lets a file have or lack something, and so is refused by no format."""
ALORA = SAID | {INVOCATION: [3, 4], REPLICATION: [[0, 2], [1, 2]]}
PROMPT, SHADOW = SAID | {"tokenizer_name_or_path": "own/er"}, SAID | {"auxiliary_loss_weight": 0.0}
CASES = {
    "native": Case("native", written("native", LORA, extra=SAID), {"stored", "base"}, extra=SAID),
    "lora": Case("peft", written("peft", LORA, extra=ALORA), PEFT, extra=ALORA),
    "prompt": Case(
        "peft",
        written("peft", {"^model$": pf.PromptTuning(n=2)}, extra=PROMPT),
        {"ignore", "stored"},
        extra=PROMPT,
    ),
    "shadow": Case(
        "peft", written("peft", {"^model$": pf.Shadow(rank=2)}, extra=SHADOW), {"ignore", "stored"}, extra=SHADOW
    ),
    "swift": Case("swift", written("swift", LORA), PEFT),
    "swift's modules": Case("swift", swift_adapter, peft=False),
    "mlx": Case("mlx", written("mlx", LORA), {"key_mapping", "stored"}),
    "kohya": Case("kohya", written("kohya", LORA), {"key_mapping", "stored"}),
    "gguf": Case("gguf", written("gguf", LORA), {"stored"}),
    "adapterhub": Case("adapterhub", adapterhub, extra={"base_model_name_or_path": "own/er"}),
    "pyreft": Case("pyreft", pyreft, more={"method": pf.DiReFT(first=1), "pickled": True}, peft=False),
}
GIVEN: dict[str, dict[str, Any]] = {
    "strict": {"strict": False},
    "key_mapping": {"key_mapping": {r"^nothing\.": "no."}},
    "pickled": {"pickled": True},
    "experts": {"experts": "unsloth"},
    "buffers": {"buffers": True},
    "ignore": {"ignore": ["a_key_of_tomorrow"]},
    "stored": {"dtype": "file"},
    "base": {"base": "same"},
}
"""Option → how `load` gets another value than its default."""


def test_there_is_a_case_for_each_format_and_each_option() -> None:
    assert {c.format for c in CASES.values()} == FORMATS.keys()
    assert GIVEN.keys() == {f.name for f in fields(Options)}
    hint = get_type_hints(Options.only)["taken"]
    assert {*get_args(hint)} | ALLOW == GIVEN.keys()


@pytest.mark.parametrize("option", GIVEN)
@pytest.mark.parametrize("name", CASES)
def test_an_option_has_a_meaning_or_is_refused(name: str, option: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = case.write(tmp_path)
    if option in case.takes | ALLOW:
        net, a = pf.load(path, model(), **{**case.more, **GIVEN[option]})
        net.plan.check(a)
    else:
        said = next(iter(GIVEN[option]))
        with pytest.raises(ValueError, match=f"load: {said}"):
            pf.load(path, model(), **{**case.more, **GIVEN[option]})


@pytest.mark.parametrize("to", ["native", "peft"])
@pytest.mark.parametrize("name", CASES)
def test_save_takes_what_load_says_beside_the_adapter(name: str, to: str, tmp_path: Path) -> None:
    case = CASES[name]
    loaded = pf.load(case.write(tmp_path), model(), **case.more)
    assert loaded.extra.keys() <= KEYS
    assert case.extra.items() <= loaded.extra.items()
    if to == "native" or case.peft:
        pf.save(tmp_path / "again", *loaded, format=to, extra=loaded.extra)
        again = pf.load(tmp_path / "again", model())
        kept = {k: v for k, v in case.extra.items() if to == "peft" or k != REPLICATION}  # which its plan has
        assert kept.items() <= again.extra.items()
        assert again.net.plan.keys() == loaded.net.plan.keys()


def test_peft_has_no_key_of_another_type(tmp_path: Path) -> None:
    net = pf.adapt(model(), LORA)
    with pytest.raises(ValueError, match="extra has 'auxiliary_loss_weight', which is of SHADOW, and this is LORA"):
        pf.save(tmp_path / "a", net, net.init(), format="peft", extra={"auxiliary_loss_weight": 0.1})
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"shadow"}))  # which needs the values of the base's buffers
def test_each_leaf_is_on_the_device_of_its_site(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, a = pf.load(case.write(tmp_path), model().to("meta"), **case.more)
    assert {t.device.type for leaf in a.values() for t in leaf.values()} == {"meta"}
