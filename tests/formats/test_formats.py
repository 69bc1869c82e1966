"""Loading and saving: what must hold beside the parity with PEFT (test_peft_parity.py)."""

import copy
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SMALL, by_name, tokens
from peft.tuners.lora.config import BdLoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import compare, random, randomised
from test_peft_parity import A, both_ways, edit, retensor
from torch import Tensor, nn

import peftfn as pf
from peftfn.formats import tensor_files
from peftfn.formats.peft_common import targets

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # PEFT takes AdaLoRA's rank_pattern, which it writes itself, for LoRA's
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]
LORA = {"r": 2, "lora_alpha": 3}
B = A.replace("lora_A", "lora_B")


def llama() -> nn.Module:
    return by_name["llama"].build()


def theirs(folder: Path, base: nn.Module, config: peft.PeftConfig, **options: Any) -> nn.Module:
    """PEFT's random adapter, saved."""
    model = randomised(peft.get_peft_model(base, config))
    model.save_pretrained(folder, **options)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs(tmp_path, llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **LORA))
    return tmp_path


def native(folder: Path, rules: dict[str, pf.Method] | None = None) -> tuple[pf.Adapted, pf.Adapter]:
    net = pf.adapt(llama(), rules or {"q_proj": pf.LoRA(2, init_weights="random"), "norm": pf.Full()})
    pf.save(folder, net, net.init(1))
    return net, net.init(1)


def same(x: dict[str, Any], y: dict[str, Any]) -> None:
    assert x.keys() == y.keys()
    for n, leaf in x.items():
        assert leaf.keys() == y[n].keys()
        assert all(torch.equal(leaf[k], y[n][k]) and not leaf[k].isnan().any() for k in leaf), n


# Missing and unexpected tensors.


def test_a_good_file_lacks_nothing(folder: Path) -> None:
    loaded = pf.load(folder, llama(), strict=False)
    assert (loaded.missing, loaded.unexpected) == ((), ())


@pytest.mark.parametrize("gone", [[B], [A, B]], ids=["one tensor", "a layer"])
def test_missing_tensors_are_listed_and_start_afresh(folder: Path, gone: list[str]) -> None:
    retensor(folder, lambda t: [t.pop(k) for k in gone])
    with pytest.raises(ValueError, match=f"lacks {len(gone)} tensors.*q_proj.*strict=False"):
        pf.load(folder, llama())
    net, adapter = loaded = pf.load(folder, llama(), strict=False)
    assert (set(loaded.missing), loaded.unexpected) == (set(gone), ())
    site = "model.layers.0.self_attn.q_proj.weight"
    assert not adapter[site]["b"].any() and adapter[site]["a"].any()
    assert len(net.plan) == 4


def test_unexpected_tensors_are_listed_and_left_out(folder: Path) -> None:
    odd = [A.replace("q_proj", "x_proj"), A.replace("lora_A", "lora_C")]
    retensor(folder, lambda t: t.update({k: t[A].clone() for k in odd}))
    with pytest.raises(ValueError, match="2 tensors have no place"):
        pf.load(folder, llama())
    loaded = pf.load(folder, llama(), strict=False)
    assert (loaded.missing, set(loaded.unexpected)) == ((), set(odd))


def test_a_native_file_lists_both(tmp_path: Path) -> None:
    net, adapter = native(tmp_path)
    site = "model.layers.0.self_attn.q_proj.weight"
    path, odd = tmp_path / "adapter.safetensors", f"adapter/{site}/c"
    with tensor_files.opened(path) as file:
        tensors = {k: file.tensor(k, exact=True) for k in file.meta}
        metadata = file.metadata
    tensors[odd] = tensors.pop(f"adapter/{site}/a")
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=r"lacks 1 tensors.*1 tensors have no place"):
        pf.load(tmp_path, net.model)
    loaded = pf.load(tmp_path, net.model, strict=False)
    assert (loaded.missing, loaded.unexpected) == ((f"adapter/{site}/a",), (odd,))
    assert torch.equal(loaded.adapter[site]["b"], adapter[site]["b"])


def test_modules_to_save_that_are_not_there_are_missing(folder: Path) -> None:
    edit(folder, modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        pf.load(folder, llama())


def test_other_shapes_are_an_error_or_listed(folder: Path, tmp_path: Path) -> None:
    """PEFT's ignore_mismatched_sizes."""
    good = pf.load(folder, llama()).adapter
    retensor(folder, lambda t: t.update({A: torch.zeros(2, 5)}))
    with pytest.raises(ValueError, match=r"has shape \[2, 5\], and the model needs \[2, 16\]"):
        pf.load(folder, llama())
    loaded = pf.load(folder, llama(), strict=False)
    assert loaded.mismatched == {A: ((2, 5), (2, 16))} and loaded.missing == (A,) and not loaded.unexpected
    site = A.removeprefix("base_model.model.").replace("lora_A.", "")
    assert torch.equal(loaded.adapter[site]["a"], loaded.net.init()[site]["a"])
    assert torch.equal(loaded.adapter[site]["b"], good[site]["b"])


def test_a_head_of_other_classes_is_an_error_or_listed(tmp_path: Path) -> None:
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(2), "lm_head": pf.Full()})
    pf.save(tmp_path, net, net.init(), format="peft")
    key = "base_model.model.lm_head.weight"
    retensor(tmp_path, lambda t: t.update({key: torch.zeros(5, 16)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight has shape \[5, 16\]"):
        pf.load(tmp_path, llama())
    loaded = pf.load(tmp_path, llama(), strict=False)
    assert loaded.mismatched.keys() == {key} and "lm_head.weight" not in loaded.net.plan


def test_a_native_file_lists_other_shapes(tmp_path: Path) -> None:
    net, adapter = native(tmp_path)
    key = next(f"adapter/{n}/b" for n in net.plan if "q_proj" in n)
    path = tmp_path / "adapter.safetensors"
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
    save_file(load_file(path) | {key: torch.zeros(3, 3)}, path, meta)
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        pf.load(tmp_path, llama())
    loaded = pf.load(tmp_path, llama(), strict=False)
    assert loaded.mismatched[key][0] == (3, 3) and loaded.missing == (key,) and not loaded.unexpected
    other = next(n for n in net.plan if n != key.split("/")[1])
    assert all(torch.equal(t, adapter[other][k]) for k, t in loaded.adapter[other].items())


BARE: dict[str, tuple[dict[str, pf.Method], pf.Method]] = {
    "ranks of the keys, alpha the rank": ({"q_proj": pf.LoRA(2), "v_proj": pf.LoRA(3)}, pf.LoRA()),
    "ranks of the keys, one alpha": ({"q_proj": pf.LoRA(2, alpha=8), "v_proj": pf.LoRA(3, alpha=8)}, pf.LoRA(alpha=8)),
    "DoRA and a trained norm": ({"q_proj": pf.DoRA(2), "model.norm": pf.Full()}, pf.DoRA()),
    "without ranks": ({"q_proj": pf.IA3()}, pf.IA3()),
    "of inputs": ({"down_proj": pf.IA3(feedforward=True)}, pf.IA3(feedforward=True)),
    "LoHa": ({"q_proj": pf.LoHa(2), "v_proj": pf.LoHa(3)}, pf.LoHa()),
    "what its fields say": ({"q_proj": pf.VeRA(3)}, pf.VeRA(3)),
}


@pytest.mark.parametrize("named", [False, True], ids=["as saved", "with the adapter's name"])
@pytest.mark.parametrize("case", BARE)
def test_tensors_without_a_configuration(case: str, named: bool, tmp_path: Path) -> None:
    rules, method = BARE[case]
    net = pf.adapt(llama(), rules)
    a = random(net)
    tensors, _ = pf.state_dict(net, a)
    if named:
        ends = (".lora_A", ".lora_B", ".lora_magnitude_vector")
        tensors = {
            next((k.replace(e, f"{e}.default") for e in ends if f"{e}." in k or k.endswith(e)), k): t
            for k, t in tensors.items()
        }
    save_file(tensors, tmp_path / "some.safetensors")
    (tmp_path / "folder").mkdir()
    save_file(tensors, tmp_path / "folder" / "adapter_model.safetensors")
    want = net.apply(a, tokens(2)).logits
    for again, b in (
        pf.load(tmp_path / "some.safetensors", llama(), method=method),
        pf.load(tmp_path / "folder", llama(), method=method),
        pf.from_state_dict(llama(), tensors, method=method),
    ):
        compare(again.apply(b, tokens(2)).logits, want)
    for where in ("some.safetensors", "folder"):
        with pytest.raises((ValueError, FileNotFoundError), match=r"adapter_config\.json"):
            pf.load(tmp_path / where, llama())


def test_a_method_for_what_has_a_configuration_or_none_of_pefts(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"method= is for tensors without a configuration.*leave it out"):
        pf.load(folder, llama(), method=pf.LoRA())
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"PEFT has no .*Bottleneck"):
        pf.load(folder, llama(), method=pf.Bottleneck(2))
    with pytest.raises(TypeError, match="method is a str"):
        pf.load(folder, llama(), method="lora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format is 'kohya'"):
        pf.load(folder, llama(), method=pf.LoRA(), format="kohya")
    with pytest.raises(ValueError, match="8 tensors have no place"):
        pf.load(folder, llama(), method=pf.IA3())
    with pytest.raises(TypeError, match="give the configuration of the tensors, or method="):
        pf.from_state_dict(llama(), {})


def test_an_unknown_key_is_ignored_only_by_name(folder: Path, tmp_path: Path) -> None:
    want = pf.load(folder, llama()).adapter
    edit(folder, new_key=True, other_key=3)
    with pytest.raises(ValueError, match="other_key is 3"):
        pf.load(folder, llama(), ignore=["new_key"])
    same(pf.load(folder, llama(), ignore=["new_key", "other_key"]).adapter, want)
    for known in ("r", "use_dora", "peft_type", "rank_pattern", "target_modules"):
        with pytest.raises(ValueError, match=f"ignore has '{known}', which this release reads"):
            pf.load(folder, llama(), ignore=[known])
    with pytest.raises(TypeError, match=r"give a list of keys, \['new_key'\]"):
        pf.load(folder, llama(), ignore="new_key")
    net, _ = native(tmp_path / "native")
    with pytest.raises(ValueError, match=r"ignore has no effect on what is read at .*leave it out"):
        pf.load(tmp_path / "native", net.model, ignore=["x"])


# Names.


@pytest.mark.parametrize("prefix", ["_orig_mod.", "_fsdp_wrapped_module.", "module."])
def test_names_from_wrapped_models(folder: Path, prefix: str) -> None:
    """SEMANTICS P21."""
    want = pf.load(folder, llama()).adapter
    head = "base_model.model."
    retensor(folder, lambda t: [t.update({head + prefix + k.removeprefix(head): t.pop(k)}) for k in list(t)])
    same(pf.load(folder, llama(), key_mapping={r"^module\.": ""} if prefix == "module." else None).adapter, want)


def test_a_key_mapping_renames_and_a_wrong_one_is_an_error(folder: Path) -> None:
    """SEMANTICS P27."""
    want = pf.load(folder, llama()).adapter
    retensor(folder, lambda t: [t.update({k.replace("model.layers", "decoder.blocks"): t.pop(k)}) for k in list(t)])
    same(pf.load(folder, llama(), key_mapping={"^nothing": "x", r"^decoder\.blocks": "model.layers"}).adapter, want)
    for wrong in (None, {"blocks": "layer"}, {"decoder": "model"}):
        for strict in (True, False):
            with pytest.raises(ValueError, match="have no place"):
                pf.load(folder, llama(), key_mapping=wrong, strict=strict)
    with pytest.raises(ValueError, match="both become"):
        pf.load(folder, llama(), key_mapping={r"^decoder\.blocks\.\d": "model.layers.0"})


def llava() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tf.LlamaConfig(**SMALL, **sizes)
    vision = tf.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=8)
    model = tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=20, attn_implementation="eager")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.LlavaForConditionalGeneration(model).eval()


@pytest.mark.parametrize("old", [True, False], ids=["old names", "new names"])
def test_both_layouts_of_a_vision_language_model(tmp_path: Path, old: bool) -> None:
    model = theirs(tmp_path, llava(), peft.LoraConfig(target_modules=r".*language_model.*q_proj", **LORA))
    new, was = "base_model.model.model.language_model.", "base_model.model.language_model.model."
    if old:
        retensor(tmp_path, lambda t: [t.update({k.replace(new, was): t.pop(k)}) for k in list(t)])
    with torch.no_grad():
        want = model(tokens(2)).logits
        compare(peft.PeftModel.from_pretrained(llava(), tmp_path).eval()(tokens(2)).logits, want)
        net, adapter = pf.load(tmp_path, llava())
        compare(net.apply(adapter, tokens(2)).logits, want)


class Named(nn.Module):
    """Layers whose names are what PEFT's own keys are made of."""

    NAMES = ("weight_proj", "default_head", "lora_A", "lin0", "base_layer", "bar_query", "query")

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for name in self.NAMES:
                self.add_module(name, nn.Linear(4, 4))
            self.weight = nn.ModuleDict({"default": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for name in self.NAMES:
            x = x + torch.tanh(getattr(self, name)(x))
        return self.weight["default"](x)


@pytest.mark.parametrize("name", ["weight_proj", "default_head", "lin0", "query", "weight.default"])
def test_names_that_look_like_keys(name: str, tmp_path: Path) -> None:
    """SEMANTICS P1, P2, P11."""
    net = pf.adapt(Named(), {rf"^{name}\.weight$": pf.LoRA(2, init_weights="random")})
    a, x = net.init(), torch.linspace(-1, 1, 8).view(2, 4)
    assert len(net.plan) == 1
    for format in ("native", "peft"):
        pf.save(tmp_path / format, net, a, format=format)
        loaded = pf.load(tmp_path / format, Named())
        same(loaded.adapter, a)
        assert torch.equal(loaded.net.apply(loaded.adapter, x), net.apply(a, x))
    if name != "weight.default":  # PEFT takes the adapter's name out of the middle of a key
        again = peft.PeftModel.from_pretrained(Named(), tmp_path / "peft", adapter_name="other")
        compare(again(x), net.apply(a, x))


def test_modules_to_save_by_whole_names(tmp_path: Path) -> None:
    """SEMANTICS P10, P23: "classifier" is no part of "classifier2"."""
    make = lambda: nn.ModuleDict({n: nn.Linear(3, 3) for n in ("lin", "classifier", "classifier2")})  # noqa: E731
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = make()
    config = peft.LoraConfig(target_modules=["lin"], modules_to_save=["classifier", "classifier2"], r=1)
    state = {k: t.clone() for k, t in base.state_dict().items()}
    model = theirs(tmp_path, base, config)
    mine = make()
    mine.load_state_dict(state)
    net, adapter = pf.load(tmp_path, mine)
    for n in ("classifier", "classifier2"):
        trained = model.base_model.model[n].modules_to_save["default"].weight
        compare(net.merge(adapter)[f"{n}.weight"], trained)
        assert (trained - state[f"{n}.weight"]).abs().max() > 1e-2


NAMES = st.lists(st.sampled_from(["foo", "bar", "foo_bar", "0", "1", "q", "k_q"]), min_size=1, max_size=3)


@settings(deadline=None, max_examples=200)
@given(st.sets(NAMES.map(".".join), min_size=1, max_size=12), st.data())
def test_short_target_modules_find_what_they_stand_for(known: set[str], data: st.DataObject) -> None:
    """SEMANTICS P12."""
    wanted = data.draw(st.sets(st.sampled_from(sorted(known)), min_size=1))
    names = targets(wanted, known)
    tuner = peft.tuners.tuners_utils.check_target_module_exists
    config = peft.LoraConfig(target_modules=names)
    assert {k for k in known if tuner(config, k)} == wanted


def test_the_keys_peft_writes(tmp_path: Path) -> None:
    """SEMANTICS P28, C6.5 103, 118: the same keys, shapes and dtypes as PEFT's own file."""
    for config in (
        peft.LoraConfig(target_modules=["query", "value"], use_dora=True, **LORA),
        peft.VeraConfig(target_modules=["query"], r=3),
        peft.LoKrConfig(target_modules=["query"], r=2),
    ):
        theirs(tmp_path / "theirs", by_name["bert"].build(), config)
        pf.save(tmp_path / "mine", *pf.load(tmp_path / "theirs", by_name["bert"].build()), format="peft")
        a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "mine"))
        assert {k: (t.shape, t.dtype) for k, t in a.items()} == {k: (t.shape, t.dtype) for k, t in b.items()}
        assert all(torch.equal(t, b[k]) for k, t in a.items())


# What a file may be.


@pytest.mark.filterwarnings("ignore:.*parse .*invariant")  # other versions of torch say so of the file's sparse tensor
def test_a_pickle_is_read_only_when_asked_and_never_run(folder: Path) -> None:
    """SEMANTICS C6.5 104."""
    want = pf.load(folder, llama()).adapter
    state = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(state, folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled=True"):
        pf.load(folder, llama())
    same(pf.load(folder, llama(), pickled=True).adapter, want)

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "ran"),)

    for bad in ({A: Evil()}, [state], {1: state[A]}, {A: "text"}, {A: state[A].to_sparse()}):
        torch.save(bad, folder / "adapter_model.bin")
        with pytest.raises(ValueError, match=r"adapter_model\.bin"):
            pf.load(folder, llama(), pickled=True)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        pf.load(folder, llama(), pickled=True)
    assert not (folder / "ran").exists()


def test_an_old_oft_is_refused(folder: Path) -> None:
    """SEMANTICS P29."""
    edit(folder, peft_type="OFT", module_dropout=0.0)
    with pytest.raises(ValueError, match=r"PEFT 0\.13 or older"):
        pf.load(folder, llama())


def test_a_minimal_configuration_means_pefts_defaults(tmp_path: Path) -> None:
    """SEMANTICS C6.1 26, C6.5 120: nothing but the type, the names, and no README."""
    for config in (peft.LoraConfig, peft.IA3Config, peft.LoHaConfig):
        options = {"feedforward_modules": []} if config is peft.IA3Config else {}
        model = theirs(tmp_path, llama(), config(target_modules=["q_proj"], **options))
        (tmp_path / "README.md").unlink()
        written = {"peft_type": model.peft_config["default"].peft_type.value, "target_modules": ["q_proj"]}
        (tmp_path / "adapter_config.json").write_text(json.dumps(written))
        net, adapter = pf.load(tmp_path, llama())
        with torch.no_grad():
            compare(net.apply(adapter, tokens(2)).logits, model(tokens(2)).logits)


def test_folders_of_named_adapters(tmp_path: Path) -> None:
    """SEMANTICS C6.5 101, 102."""
    config = peft.LoraConfig(target_modules=["q_proj"], **LORA)
    model = peft.get_peft_model(llama(), config, adapter_name="other")
    randomised(model).save_pretrained(tmp_path)
    assert (tmp_path / "other" / "adapter_config.json").is_file()
    want = pf.load(tmp_path / "other", llama()).adapter
    same(pf.load(tmp_path, llama(), subfolder="other").adapter, want)
    with pytest.raises(FileNotFoundError, match="no adapter"):
        pf.load(tmp_path, llama())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        pf.load(tmp_path, llama(), subfolder="nowhere")


# The hub.


def test_a_repository_of_the_hub_from_its_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = pf.load(folder, llama()).adapter
    repo = tmp_path / "cache" / "models--some-one--an.adapter"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = repo / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns("cache"))
    shutil.copytree(snapshot, snapshot / "checkpoint-5")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    same(pf.load("some-one/an.adapter", llama()).adapter, want)
    same(pf.load("some-one/an.adapter", llama(), subfolder="checkpoint-5", revision="main").adapter, want)


def test_what_is_asked_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, **options: Any) -> str:
        asked.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    pf.load("a/b", llama(), revision="v1")
    name, options = asked.pop()
    assert (name, options["revision"]) == ("a/b", "v1")
    names = ["adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "deep/adapter_config.json"]
    chosen = huggingface_hub.utils.filter_repo_objects(
        names, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
    )
    assert list(chosen) == ["adapter_config.json", "adapter_model.safetensors"]
    pf.load("a/b", llama(), hub_options={"token": "hf_x", "local_files_only": True})
    _, options = asked.pop()
    assert (options["token"], options["local_files_only"]) == ("hf_x", True)
    with pytest.raises(ValueError, match="hub_options has 'revision', which load itself gives"):
        pf.load("a/b", llama(), hub_options={"revision": "v1"})
    for wrong in ("a/b/c", "../a", "/etc/x", "a/..", "https://a/b", "a b/c", Path("a/b")):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            pf.load(wrong, llama())
    assert not asked
    for only in ({"revision": "v1"}, {"hub_options": {"token": "hf_x"}}):
        with pytest.raises(ValueError, match="local path"):
            pf.load(folder, llama(), **only)


@pytest.mark.parametrize("format", ["native", "peft"])
def test_the_dtype_of_what_is_loaded(tmp_path: Path, format: str) -> None:
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(2)})
    pf.save(tmp_path, net, net.init(1, dtype=torch.bfloat16), format=format)
    kept = {"native": torch.bfloat16, "peft": torch.float32}[format]
    for asked, want in ((None, kept), (torch.float16, torch.float16), (torch.float64, torch.float64)):
        found = pf.load(tmp_path, llama(), dtype=asked).adapter
        assert {t.dtype for leaf in found.values() for t in leaf.values()} == {want}
    found = pf.load(tmp_path, llama(), dtype="file").adapter
    assert {t.dtype for leaf in found.values() for t in leaf.values()} == {torch.bfloat16}
    for wrong in (torch.int8, "bf16"):
        with pytest.raises(ValueError, match=f"dtype is {wrong}"):
            pf.load(tmp_path, llama(), dtype=wrong)  # type: ignore[arg-type]
    if format == "peft":
        retensor(tmp_path, lambda t: t.update({A: t[A].float()}))
        with pytest.raises(ValueError, match=r"its tensors are bfloat16, float32.*give one"):
            pf.load(tmp_path, llama(), dtype="file")


# Reading and writing itself.


@pytest.mark.parametrize("format", ["native", "peft"])
def test_each_tensor_is_read_once(tmp_path: Path, format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = pf.adapt(
        llama(), {"q_proj": pf.VeRA(3), "v_proj": pf.VeRA(3)} if format == "native" else {"q_proj": pf.VeRA(3)}
    )
    pf.save(tmp_path, net, net.init(), format=format)
    read: list[str] = []
    tensor = tensor_files.Tensors.tensor

    def counted(self: tensor_files.Tensors, key: str, *args: Any, **kwargs: Any) -> Tensor:
        read.append(key)
        return tensor(self, key, *args, **kwargs)

    monkeypatch.setattr(tensor_files.Tensors, "tensor", counted)
    pf.load(tmp_path, llama())
    with tensor_files.opened(next(tmp_path.glob("*.safetensors"))) as file:
        assert sorted(read) == sorted(file.meta)


@pytest.mark.parametrize("format", ["native", "peft"])
def test_loading_onto_a_model_without_values(tmp_path: Path, format: str) -> None:
    """Tensors go to their site's device; on the meta device they have none."""
    net = pf.adapt(llama(), {"q_proj": pf.VeRA(3)})
    pf.save(tmp_path, net, net.init(), format=format)
    other, adapter = pf.load(tmp_path, llama().to("meta"))
    assert all(t.is_meta for leaf in adapter.values() for t in leaf.values())
    assert all(t.is_meta for e in other.plan.values() for t in e.frozen.values())


def test_a_loaded_tensor_does_not_hang_on_its_file(folder: Path) -> None:
    adapter = pf.load(folder, llama()).adapter
    kept = {n: {k: t.clone() for k, t in leaf.items()} for n, leaf in adapter.items()}
    path = folder / "adapter_model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    same(adapter, kept)


@pytest.mark.parametrize("format", ["native", "peft"])
@pytest.mark.parametrize("stop", ["os.replace", "os.fsync", "peftfn.formats.files.save_file"])
def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, format: str, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(2, init_weights="random")})
    pf.save(tmp_path, net, net.init(1), format=format)
    before = sorted(p.name for p in tmp_path.iterdir())

    def crash(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stop, crash)
        with pytest.raises(KeyboardInterrupt):
            pf.save(tmp_path, net, net.init(2), format=format)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    same(pf.load(tmp_path, net.model).adapter, net.init(1))


def test_half_a_save_is_never_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two files of the native format are renamed one after the other."""
    native(tmp_path, {"q_proj": pf.LoRA(2, alpha=1)})
    replace, done = os.replace, []

    def once(*args: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(replace(*args))

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(KeyboardInterrupt):
        native(tmp_path, {"q_proj": pf.LoRA(2, alpha=7)})
    with pytest.raises(ValueError, match="different saves"):
        pf.load(tmp_path, llama())


def test_what_cannot_be_saved_writes_nothing(tmp_path: Path) -> None:
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(2), "v_proj": pf.IA3()})
    with pytest.raises(ValueError, match="one method in a folder"):
        pf.save(tmp_path, net, net.init(), format="peft")
    with pytest.raises(ValueError, match="'pickle' is not a format"):
        pf.save(tmp_path, net, net.init(), format="pickle")
    assert not list(tmp_path.iterdir())


def test_several_folders_when_asked(tmp_path: Path) -> None:
    rules = {"q_proj": pf.LoRA(2, init_weights="random"), "v_proj": pf.IA3(), "lm_head": pf.Full()}
    net = pf.adapt(llama(), rules)
    a = {n: {k: t + 0.3 for k, t in leaf.items()} for n, leaf in net.init().items()}
    pf.save(tmp_path, net, a, format="peft", split=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ia3", "lora"]
    parts: dict[str, Any] = {}
    for kind in ("lora", "ia3"):
        part, b = pf.load(tmp_path / kind, llama())
        parts |= b
        with torch.no_grad():
            model = peft.PeftModel.from_pretrained(llama(), tmp_path / kind).eval()
            compare(part.apply(b, tokens(2)).logits, model(tokens(2)).logits)
    assert parts.keys() == a.keys()
    for n in a:
        for k in a[n]:
            compare(parts[n][k], a[n][k])


# Methods whose files have more than one form.


def test_adalora_with_fewer_ranks(tmp_path: Path) -> None:
    """PEFT saves the triplets that are left, and scales by the rank that it started with."""
    config = peft.AdaLoraConfig(target_modules=["q_proj", "v_proj"], init_r=4, target_r=2, total_step=10, lora_alpha=3)
    model = peft.get_peft_model(llama(), config)
    randomised(model)
    keep = {"0.self_attn.q": [True, False, True, False], "1.self_attn.q": [False] * 4, "0.self_attn.v": [True] * 4}
    config.rank_pattern = {
        f"model.layers.{k}_proj.lora_E": mask
        for k, mask in {**keep, "1.self_attn.v": [False, True, True, True]}.items()
    }
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path).eval()
    net, adapter = pf.load(tmp_path, llama())
    with torch.no_grad():
        want = loaded(tokens(2)).logits
        compare(net.apply(adapter, tokens(2)).logits, want)
        assert (net.model(tokens(2)).logits - want).abs().max() > 1e-3
        pf.save(tmp_path / "mine", net, adapter, format="peft")
        compare(peft.PeftModel.from_pretrained(llama(), tmp_path / "mine").eval()(tokens(2)).logits, want)
    edit(tmp_path, rank_pattern={"model.layers.0.self_attn.q_proj.lora_E": [True, False, False, False]})
    with pytest.raises(ValueError, match=r"lora_A.* keeps 1 triplets"):
        pf.load(tmp_path, llama())


def test_vblora_with_the_topk_weights_alone(tmp_path: Path) -> None:
    config = peft.VBLoRAConfig(
        target_modules=["q_proj", "v_proj"], r=2, num_vectors=6, vector_length=4, topk=3, save_only_topk_weights=True
    )
    model = theirs(tmp_path, llama(), config)
    assert any(k.endswith("_topk_indices") for k in load_file(tmp_path / "adapter_model.safetensors"))
    net, adapter = pf.load(tmp_path, llama())
    with torch.no_grad():
        compare(net.apply(adapter, tokens(2)).logits, model(tokens(2)).logits)
    index = next(k for k in load_file(tmp_path / "adapter_model.safetensors") if k.endswith("_topk_indices"))
    retensor(tmp_path, lambda t: t.update({index: t[index] + 250}))
    with pytest.raises(ValueError, match="it must be from 0 to 5: the bank has 6 vectors"):
        pf.load(tmp_path, llama())


@pytest.mark.parametrize("init_weights", [True, "bat"])
def test_bone_is_what_miss_was_called(init_weights: Any, tmp_path: Path) -> None:
    """PEFT's own script renames the type and the keys, and nothing else."""
    model = theirs(tmp_path, llama(), peft.MissConfig(target_modules=["q_proj"], r=4, init_weights=init_weights))
    edit(tmp_path, peft_type="BONE")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ("mini_r", "miss_dropout")  # which Bone had not
    (tmp_path / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
    retensor(tmp_path, lambda t: [t.update({k.replace("miss_block", "bone_block"): t.pop(k)}) for k in list(t)])
    assert len(pf.inspect(tmp_path)[""]["layers"]) == 2
    net, adapter = pf.load(tmp_path, llama())
    assert {type(e.method) for e in net.plan.values()} == {pf.MiSSBat if init_weights == "bat" else pf.MiSS}
    with torch.no_grad():
        compare(net.apply(adapter, tokens(2)).logits, model(tokens(2)).logits)
    pf.save(tmp_path / "now", net, adapter, format="peft")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "now").eval()
    with torch.no_grad():
        compare(again(tokens(2)).logits, model(tokens(2)).logits)


@pytest.mark.parametrize("windows", [False, True], ids=["integers", "as floats"])
def test_shira_with_a_mask_of_ones_own(windows: bool, tmp_path: Path) -> None:
    def first(layer: nn.Linear, r: int, **_: Any) -> Tensor:
        count = r * sum(layer.weight.shape)
        return (torch.arange(layer.weight.numel()) < count).reshape(layer.weight.shape).to(layer.weight)

    config = peft.ShiraConfig(target_modules=["q_proj"], r=2, mask_type="mine")
    config.mask_fn = first
    model = theirs(tmp_path, llama(), config)
    if windows:
        ends = ".shira_indices"
        retensor(tmp_path, lambda t: t.update({k: v.float() for k, v in t.items() if k.endswith(ends)}))
    net, adapter = pf.load(tmp_path, llama())
    with torch.no_grad():
        compare(net.apply(adapter, tokens(2)).logits, model(tokens(2)).logits)
    pf.save(tmp_path / "ours", net, adapter, format="peft")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    with torch.no_grad():
        compare(again(tokens(2)).logits, model(tokens(2)).logits)
    retensor(tmp_path, lambda t: [t.pop(k) for k in list(t) if k.endswith("indices")])
    with pytest.raises(ValueError, match=r"lacks .*shira_indices"):
        pf.load(tmp_path, llama())


@pytest.mark.parametrize("seed", [7, None])
def test_a_raw_state_of_shira_has_no_places(seed: int | None) -> None:
    """They follow from a seed; without one, nothing says them."""
    config = peft.ShiraConfig(target_modules=["q_proj"], r=2, random_seed=seed)
    model = randomised(peft.get_peft_model(llama(), config))
    raw = {k: t for k, t in model.state_dict().items() if "shira" in k}
    if seed is None:
        with pytest.raises(ValueError, match=r"lacks .*shira_indices"):
            pf.from_state_dict(llama(), raw, config)
        return
    net, adapter = pf.from_state_dict(llama(), raw, config)
    with torch.no_grad():
        compare(net.apply(adapter, tokens(2)).logits, model(tokens(2)).logits)


COMPACT: dict[str, tuple[pf.Method, str]] = {
    "VeRA": (pf.VeRA(3), "vera_A"),
    "RandLoRA": (pf.RandLoRA(2), "randlora_A"),
    "PVeRA": (pf.PVeRA(3), "pvera_A"),
    "UniLoRA": (pf.UniLoRA(2, length=20), "unilora_indices_A"),
    "VBLoRA": (pf.VBLoRA(2, vectors=40, length=4, topk=3), "vblora_logits_A"),
    "VBLoRA of one vector": (pf.VBLoRA(2, vectors=300, length=4, topk=1), "vblora_logits_A"),
}


@pytest.mark.parametrize("case", COMPACT)
def test_a_compact_file_is_what_peft_and_we_read(case: str, tmp_path: Path) -> None:
    method, gone = COMPACT[case]
    net = pf.adapt(llama(), {"q_proj|down_proj": method} if case in ("VeRA", "VBLoRA") else {"q_proj": method})
    a = random(net)
    want = net.apply(a, tokens(2)).logits
    pf.save(tmp_path / "whole", net, a, format="peft")
    pf.save(tmp_path / "compact", net, a, format="peft", compact=True)
    sizes = [(tmp_path / n / "adapter_model.safetensors").stat().st_size for n in ("compact", "whole")]
    assert sizes[0] < sizes[1]
    stored = load_file(tmp_path / "compact" / "adapter_model.safetensors")
    assert not any(k.endswith(gone) or k.endswith(f"{gone}.weight") for k in stored)
    again, b = pf.load(tmp_path / "compact", llama())
    compare(again.apply(b, tokens(2)).logits, want)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "compact").eval()
    with torch.no_grad():
        compare(theirs(tokens(2)).logits, want)


def test_what_no_seed_determines_is_not_left_out(tmp_path: Path) -> None:
    net = pf.adapt(llama(), {"q_proj": pf.VeRA(3)})
    pf.save(tmp_path / "a", net, net.init(), format="peft")
    retensor(tmp_path / "a", lambda t: t.update({"base_model.vera_A": t["base_model.vera_A"] + 1}))
    other, a = pf.load(tmp_path / "a", llama())
    with pytest.raises(ValueError, match=r"q_proj\.weight: its constant A is not the one that VeRA.*by its seed"):
        pf.save(tmp_path / "b", other, a, format="peft", compact=True)
    lora = pf.adapt(llama(), {"q_proj": pf.LoRA(3)})
    with pytest.raises(ValueError, match="PEFT's LORA has no shorter form"):
        pf.save(tmp_path / "b", lora, lora.init(), format="peft", compact=True)
    assert not (tmp_path / "b").exists()


def test_bdlora_with_blocks_on_both_sides(tmp_path: Path) -> None:
    sides = BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], use_bdlora=sides, r=4, lora_alpha=3)
    net, _ = both_ways(tmp_path, "llama", config)
    assert {n.split(".")[4]: e.method.side for n, e in net.plan.items()} == {"q_proj": "b", "o_proj": "a"}
    rules = {"0.self_attn.q_proj": pf.BDLoRA(4, blocks=2), "q_proj": pf.BDLoRA(4, blocks=2, side="b")}
    net = pf.adapt(llama(), rules)
    with pytest.raises(ValueError, match="use_bdlora"):  # PEFT sees nothing of a name but its last part
        pf.save(tmp_path / "no", net, net.init(), format="peft")


def test_statistics_that_no_adapter_has(tmp_path: Path) -> None:
    """SEMANTICS C6.5 107."""
    make: Callable[[], nn.Module] = lambda: nn.ModuleDict({"lin": nn.Linear(3, 3), "bn": nn.BatchNorm1d(3)})  # noqa: E731
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = make()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["lin"], modules_to_save=["bn"], r=1))
    model.base_model.model["bn"].modules_to_save["default"](torch.randn(5, 3))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a buffer that differs.*buffers=True.*put it into the model"):
        pf.load(tmp_path, make())
    loaded, mine = pf.load(tmp_path, base := make(), buffers=True), model.base_model.model["bn"]
    base.load_state_dict(dict(loaded.buffers), strict=False)
    got = {**dict(base.named_buffers()), **loaded.net.merge(loaded.adapter)}
    for part in ("weight", "bias", "running_mean", "running_var"):
        want = getattr(mine.modules_to_save["default"], part)
        torch.testing.assert_close(got[f"bn.{part}"], want)


def test_the_head_of_a_classifier_comes_back(tmp_path: Path) -> None:
    """SEMANTICS C6.5 106: PEFT adds it to modules_to_save by itself, under two names of which one exists."""

    def build() -> nn.Module:
        c = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return tf.BertForSequenceClassification(tf.BertConfig(**SMALL, **c, max_position_embeddings=16)).eval()

    model = theirs(tmp_path, build(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], **LORA))
    net, adapter = pf.load(tmp_path, build())
    assert isinstance(net.plan["classifier.weight"].method, pf.Full)
    with torch.no_grad():
        compare(net.apply(adapter, tokens(2)).logits, model(tokens(2)).logits)


def test_tensors_that_the_configuration_does_not_name(folder: Path) -> None:
    """SEMANTICS P19: as PEFT, we leave them out; unlike PEFT, not in silence."""
    edit(folder, target_modules=["v_proj"])
    with pytest.raises(ValueError, match="4 tensors have no place"):
        pf.load(folder, llama())
    loaded = pf.load(folder, llama(), strict=False)
    assert len(loaded.unexpected) == 4 and all("q_proj" in k for k in loaded.unexpected)
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(llama(), folder).eval()
        compare(loaded.net.apply(loaded.adapter, tokens(2)).logits, theirs(tokens(2)).logits)


def test_names_of_another_model_leave_it_to_the_keys(folder: Path) -> None:
    want = pf.load(folder, llama()).adapter
    edit(folder, target_modules=r"^(language_model(?=\.).*\.(q_proj|v_proj))$")
    same(pf.load(folder, llama()).adapter, want)


# Keys as training frameworks leave them.

WRAPPED: dict[str, Callable[[str], str]] = {
    "compiled": lambda k: f"_orig_mod.{k}",
    "layers compiled": lambda k: k.replace(".layers.0.", ".layers.0._orig_mod."),
    "compiled inside": lambda k: k.replace("base_model.model.", "base_model.model._orig_mod."),
    "FSDP": lambda k: k.replace(".layers.1.", ".layers.1._fsdp_wrapped_module."),
    "checkpointed": lambda k: k.replace(".self_attn.", ".self_attn._checkpoint_wrapped_module."),
    "DDP": lambda k: f"module.{k}",
    "DDP of a compiled model": lambda k: f"module._orig_mod.{k}",
    "a compiled DDP": lambda k: f"_orig_mod.module.{k}",
    "DDP inside": lambda k: k.replace("base_model.model.", "base_model.model.module."),
    "the adapter's name": lambda k: k.replace(".weight", ".default.weight"),
    "the model's names alone": lambda k: k.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_leave_names_in_keys(how: str, folder: Path) -> None:
    """PEFT itself loads such a file without a word, and without its tensors."""
    want = pf.load(folder, llama()).adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({WRAPPED[how](k): t for k, t in tensors.items()}, folder / "adapter_model.safetensors")
    again = pf.load(folder, llama())
    same(again.adapter, want)
    twice = {WRAPPED[how](k): t.clone() for k, t in tensors.items()} | tensors
    save_file(twice, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"both become|are the same tensor"):
        pf.load(folder, llama())


def test_a_module_named_module_keeps_its_name(tmp_path: Path) -> None:
    inner = nn.ModuleDict({"module": nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), "q_proj": nn.Linear(4, 4)})
    net = pf.adapt(inner, {r"^module\.q_proj\.weight": pf.LoRA(2, init_weights="random")})
    pf.save(tmp_path, net, net.init(), format="peft")
    assert list(pf.load(tmp_path, inner).net.plan) == ["module.q_proj.weight"]


def test_biases_of_a_trained_head_are_there_three_times(tmp_path: Path) -> None:
    """bias="all" has PEFT save the biases inside its wrapper of the head too, which it does not read itself."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        c = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        base = tf.BertForSequenceClassification(tf.BertConfig(**SMALL, **c, max_position_embeddings=16)).eval()
    config = peft.LoraConfig(target_modules=["query"], bias="all", task_type="SEQ_CLS", **LORA)
    model = theirs(tmp_path, copy.deepcopy(base), config)
    assert "base_model.model.classifier.original_module.bias" in load_file(tmp_path / "adapter_model.safetensors")
    net, adapter = loaded = pf.load(tmp_path, base)
    assert not loaded.unexpected
    compare(net.apply(adapter, tokens(2)).logits, model(tokens(2)).logits)
    retensor(tmp_path, lambda t: t.pop("base_model.model.classifier.bias"))
    with pytest.raises(ValueError, match=r"no place.*classifier\.(modules_to_save|original_module)\.bias"):
        pf.load(tmp_path, base)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_that_peft_ties(target: str, dora: bool, tmp_path: Path) -> None:
    """ensure_weight_tying: PEFT adapts head and embedding where the configuration names one of the two."""
    config = tf.LlamaConfig(
        **SMALL,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = tf.LlamaForCausalLM(config).eval()
    options = {"target_modules": ["q_proj", target], "ensure_weight_tying": True, "use_dora": dora}
    model = theirs(tmp_path, copy.deepcopy(base), peft.LoraConfig(**options, **LORA))
    net, adapter = pf.load(tmp_path, base)
    assert {"lm_head.weight", "model.embed_tokens.weight"} < net.plan.keys()
    compare(net.apply(adapter, tokens(2)).logits, model(tokens(2)).logits)
    pf.save(tmp_path / "again", net, adapter, format="peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    compare(again(tokens(2)).logits, model(tokens(2)).logits)
    gone = [k for k in load_file(tmp_path / "adapter_model.safetensors") if "lm_head.lora" in k]
    retensor(tmp_path, lambda t: [t.pop(k) for k in gone])
    with pytest.raises(ValueError, match=r"lacks .*lm_head"):
        pf.load(tmp_path, base)


def test_a_larger_vocabulary_is_told_with_its_cure(tmp_path: Path) -> None:
    """Tokens were added before training: PEFT saves the resized embedding."""
    big = llama()
    big.resize_token_embeddings(30, mean_resizing=False)
    theirs(tmp_path, big, peft.LoraConfig(target_modules=["embed_tokens"], **LORA))
    with pytest.raises(ValueError, match=r"\[30, 16\].*resize_token_embeddings\(30\)"):
        pf.load(tmp_path, llama())


def test_an_unknown_key_is_told_with_its_cure(folder: Path) -> None:
    edit(folder, unsloth_fixed=True)
    with pytest.raises(ValueError, match=r"unsloth_fixed is True.*delete it from the file"):
        pf.load(folder, llama())


def test_a_repository_of_several_folders_says_so(folder: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-20"):
        shutil.copytree(folder, folder.parent / "run" / name)
    (folder.parent / "run" / "trainer_state.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"holds no adapter.*checkpoint-10, checkpoint-20 do: pass subfolder="):
        pf.load(folder.parent / "run", llama())


def test_an_adapter_of_the_model_without_its_head(tmp_path: Path) -> None:
    """Trained on AutoModel, loaded onto AutoModelForCausalLM, and the other way: transformers' own prefix tells."""
    whole = llama()
    for trained, other in ((whole.model, whole), (whole, whole.model)):
        theirs(tmp_path, copy.deepcopy(trained), peft.LoraConfig(target_modules=["q_proj"], **LORA))
        loaded, want = pf.load(tmp_path, other), pf.load(tmp_path, trained)
        assert [n.removeprefix("model.") for n in loaded.net.plan] == [n.removeprefix("model.") for n in want.net.plan]
        for mine, wanted in zip(loaded.adapter.values(), want.adapter.values(), strict=True):
            assert torch.equal(mine["b"], wanted["b"])


@pytest.mark.parametrize("old", [False, True])
def test_clips_text_model_under_its_old_names(old: bool, tmp_path: Path) -> None:
    """transformers 4 had a `text_model` in it, and 5 has not."""
    c = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = tf.CLIPTextModel(tf.CLIPTextConfig(vocab_size=24, bos_token_id=1, eos_token_id=2, **c)).eval()
    model = theirs(tmp_path, copy.deepcopy(base), peft.LoraConfig(target_modules=["q_proj"], **LORA))
    if old:
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        tensors = {k.replace("base_model.model.", "base_model.model.text_model."): t for k, t in tensors.items()}
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    net, adapter = pf.load(tmp_path, base)
    compare(net.apply(adapter, tokens(2)).last_hidden_state, model(tokens(2)).last_hidden_state)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_of_the_folder_means_the_folder(name: str, folder: Path) -> None:
    same(pf.load(folder / name, llama()).adapter, pf.load(folder, llama()).adapter)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.attn, self.lin = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.attn(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj", "lin"], ["attn", "out_proj"]], ids=str)
def test_an_out_projection_that_peft_does_not_reach(targets: Any, tmp_path: Path) -> None:
    """nn.MultiheadAttention never calls its out_proj: a LoRA on it alone has no effect in PEFT, and trains to none."""
    model = theirs(tmp_path, Attends(), peft.LoraConfig(target_modules=targets, **LORA))
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
    inside = [k for k in load_file(tmp_path / "adapter_model.safetensors") if ".attn.out_proj.lora_" in k]
    with pytest.raises(ValueError, match=r"2 tensors have no place.*attn\.out_proj\.lora_A"):
        pf.load(tmp_path, Attends())
    loaded = pf.load(tmp_path, Attends(), strict=False)
    assert set(loaded.unexpected) == set(inside) and not loaded.missing
    retensor(tmp_path, lambda t: [t[k].zero_() for k in inside if "lora_B" in k])
    for net, adapter in (loaded, pf.load(tmp_path, Attends())):
        compare(net.apply(adapter, x), model(x))
        pf.save(tmp_path / "again", net, adapter, format="peft")
        compare(peft.PeftModel.from_pretrained(Attends(), tmp_path / "again").eval()(x), model(x))


# What a configuration says beside the method.

TOKENS = [5, 9]
ACTIVATED = {"alora_invocation_tokens": TOKENS, "task_type": "CAUSAL_LM"}


def test_an_activated_lora_is_loaded_and_acts_as_in_peft(tmp_path: Path) -> None:
    """And what is saved again is activated, too."""
    x = torch.tensor([[5, 9, 3, 4, 6, 7], [3, 4, 6, 8, 5, 9], [3, 4, 6, 7, 8, 5]])
    model = theirs(tmp_path, llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **ACTIVATED, **LORA))
    want = model(input_ids=x).logits
    net, adapter = loaded = pf.load(tmp_path, llama())
    assert loaded.extra == ACTIVATED
    gates = pf.alora_gates(x, [loaded.extra["alora_invocation_tokens"]])
    compare(net.gated(pf.stack([adapter]), gates, x).logits, want)
    compare(net.apply(adapter, x).logits, want)
    compare(pf.as_module(net, adapter)(x).logits, want)
    assert {e.method for e in net.plan.values()} == {pf.ALoRA(rank=2, alpha=3, invocation=(5, 9))}
    pf.save(tmp_path / "again", net, adapter, format="peft", extra=loaded.extra)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "again").eval()
    compare(again(input_ids=x).logits, want)
    assert again.peft_config["default"].task_type == "CAUSAL_LM"
    with pytest.raises(ValueError, match=r"extra has 'r'; it may have .*task_type"):
        pf.save(tmp_path / "no", net, adapter, format="peft", extra={"r": 3})


def test_an_activated_lora_is_merged_by_no_way(tmp_path: Path) -> None:
    """Nor after it was saved in the native format, which knows what it is."""
    theirs(tmp_path / "a", llama(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **ACTIVATED, **LORA))
    net, a = pf.load(tmp_path / "a", llama())
    pf.save(tmp_path / "native", net, a)
    again, b = pf.load(tmp_path / "native", net.model)
    assert again.plan["model.layers.0.self_attn.q_proj.weight"].method.invocation == (5, 9)
    m = pf.as_module(net, a).eval()
    ways: list[Callable[[], Any]] = [
        lambda: net.merge(a),
        lambda: net.merge(pf.scale(a, 0.5)),
        lambda: net.merge(net.prepare(a)),
        lambda: again.merge(b),
        lambda: net.delta(pf.add(a, a)),
        lambda: dict(pf.merged(m)),
        lambda: pf.to_lora(net, a),
        lambda: pf.to_lora(net, a, rank=2),
        lambda: pf.merging.linear([(net, a)]),
        lambda: pf.merging.ties([(net, a), (again, b)], rank=2),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight: ALoRA.*depends on the input"):
            way()


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}], ids=str)
def test_what_peft_does_not_gate_is_not_loaded_for_gates(options: dict[str, Any], tmp_path: Path) -> None:
    """It acts on all tokens there, and net.gated would act on some."""
    theirs(tmp_path, llama(), peft.LoraConfig(**{"target_modules": ["q_proj"], **ACTIVATED, **LORA, **options}))
    with pytest.raises(ValueError, match=r"(lm_head|embed_tokens).*which PEFT does not gate"):
        pf.load(tmp_path, llama())
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(2), "norm": pf.Full()})
    with pytest.raises(ValueError, match=r"norm.*which PEFT does not gate"):
        pf.save(tmp_path / "no", net, net.init(), format="peft", extra=ACTIVATED)


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("spans", [[[0, 2], [1, 2]], [[1, 2], [0, 1]], [[0, 1]]], ids=str)
def test_repeated_layers_are_repeated(name: str, spans: list[list[int]], tmp_path: Path) -> None:
    """PEFT changes the model it is given; here the net has a copy with these layers."""
    target = "q_proj" if name == "llama" else "query"
    case = by_name[name]
    config = peft.LoraConfig(target_modules=[target], layer_replication=spans, **LORA)
    (args, kwargs), out = case.inputs(2), case.output
    want = out(theirs(tmp_path, case.build(), config)(*args, **kwargs))
    base = case.build()
    before = {k: t.clone() for k, t in base.state_dict().items()}
    net, adapter = loaded = pf.load(tmp_path, base)
    assert loaded.extra["layer_replication"] == spans and len(adapter) == sum(e - s for s, e in spans)
    compare(out(net.apply(adapter, *args, **kwargs)), want)
    assert base.state_dict().keys() == before.keys() and base.config.num_hidden_layers == 2
    assert all(torch.equal(t, before[k]) for k, t in base.state_dict().items())
    mine = {p.data_ptr() for p in base.parameters()}
    assert {p.data_ptr() for p in net.model.parameters()} <= mine, "a copy of the weights"

    pf.save(tmp_path / "again", net, adapter, format="peft")
    again = peft.PeftModel.from_pretrained(case.build(), tmp_path / "again").eval()
    compare(out(again(*args, **kwargs)), want)
    pf.save(tmp_path / "native", net, adapter)
    (mine, same_model), b = (pf.load(tmp_path / "native", m) for m in (case.build(), net.model)), adapter
    for again in (mine, same_model):
        same(again.adapter, b)
        compare(out(again.net.apply(b, *args, **kwargs)), want)
    assert same_model.net.model is net.model
    with pytest.raises(ValueError, match=r"repeated layers.*'swift' cannot express"):
        pf.save(tmp_path / "no", net, adapter, format="swift")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_replication": [[0, 3]]}, r"give spans \[start, end\) of 2 layers"),
        ({"layer_replication": [[0, 1]] * 1001}, "at most 1000"),
        ({"layer_replication": "all"}, "give spans"),
        ({"layer_replication": [[0, True]]}, "give spans"),
        ({"layer_replication": [[0, 1]]}, "no place in this model"),
        ({"alora_invocation_tokens": "ab"}, "list of token ids"),
        ({"alora_invocation_tokens": [1.5]}, "list of token ids"),
        ({"arrow_config": {"top_k": 2}}, r"router over other adapters.*net\.gated"),
    ],
    ids=str,
)
def test_bad_words_beside_the_method(changes: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message) as e:
        pf.load(folder, llama())
    assert "adapter_" in str(e.value)


@pytest.mark.parametrize("alpha", [0, -3, 0.5])
@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_any_alpha_that_peft_takes(alpha: float, dora: bool, tmp_path: Path) -> None:
    base = llama()
    config = peft.LoraConfig(target_modules=["q_proj"], r=4, lora_alpha=alpha, use_dora=dora, init_lora_weights=False)
    model = theirs(tmp_path, copy.deepcopy(base), config)
    net, a = pf.load(tmp_path, base)
    torch.testing.assert_close(net.apply(a, tokens(2)).logits, model(tokens(2)).logits)
    assert (alpha == 0 and not dora) == torch.equal(net.apply(a, tokens(2)).logits, base(tokens(2)).logits)
    pf.save(tmp_path / "again", net, a, format="peft")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_alpha"] == alpha


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_file_in_fp8_is_what_peft_reads(dtype: torch.dtype, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k: t.to(dtype) for k, t in load_file(file).items()}, file)
    model = peft.PeftModel.from_pretrained(llama(), folder).eval()
    net, a = pf.load(folder, llama())
    assert {t.dtype for leaf in a.values() for t in leaf.values()} == {torch.float32}
    torch.testing.assert_close(net.apply(a, tokens(2)).logits, model(tokens(2)).logits)


def test_fp8_without_a_value_is_refused_and_native_files_have_none(folder: Path, tmp_path: Path) -> None:
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    first = min(whole)
    save_file({k: (t * torch.nan if k == first else t).to(torch.float8_e4m3fn) for k, t in whole.items()}, file)
    with pytest.raises(ValueError, match=rf"{re.escape(first)} contains \d+ NaN"):
        pf.load(folder, llama())
    native(tmp_path / "native")
    file = tmp_path / "native" / "adapter.safetensors"
    with safe_open(file, "pt") as held:
        metadata = held.metadata()
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in load_file(file).items()}, file, metadata)
    with pytest.raises(ValueError, match="float8_e4m3fn, in which no adapter computes"):
        pf.load(tmp_path / "native", llama())


def test_a_file_in_parts_is_told_with_its_cure(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.rename(folder / "adapter_model-00001-of-00001.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"written in 1 parts \(adapter_model-00001-of-00001\.safetensors.*save_file"
    ):
        pf.load(folder, llama())


def test_what_peft_does_not_read_of_a_configuration_is_no_reason_to_refuse(tmp_path: Path) -> None:
    """OSF's target_svd_config, which no code of PEFT 0.21.2 looks at."""
    base = llama()
    config = peft.OSFConfig(target_modules=["q_proj"], effective_rank=5, target_svd_config={"q_proj.weight": 3})
    model = theirs(tmp_path, copy.deepcopy(base), config)
    net, a = pf.load(tmp_path, base)
    torch.testing.assert_close(net.apply(a, tokens(2)).logits, model(tokens(2)).logits)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_lora_across_the_groups_of_a_convolution_is_refused_by_name(dora: bool, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    theirs(tmp_path, copy.deepcopy(base), peft.LoraConfig(target_modules=["0"], r=4, use_dora=dora))
    with pytest.raises(ValueError, match=r"0\.weight: PEFT's LoRA at a convolution of 2 groups mixes the groups"):
        pf.load(tmp_path, base)
