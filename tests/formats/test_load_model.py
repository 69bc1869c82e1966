"""Base and adapter by one path: the base that the file names, and what PEFT's AutoPeftModel makes of our files."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers as tf
from models import SMALL, by_name, tokens
from support import compare, random, randomised
from test_peft_parity import edit
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn

import peftfn as pf

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
FORMATS = ("native", "peft", "swift", "mlx")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    by_name["llama"].build().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved(base: Path, folder: Path, format: str = "peft", **extra: Any) -> tuple[pf.Adapted, pf.Adapter]:
    net = pf.adapt(tf.LlamaForCausalLM.from_pretrained(base), {"q_proj": pf.LoRA(rank=2, alpha=3)})
    a = random(net)
    pf.save(folder, net, a, format=format, **({"extra": extra} if extra else {}))
    return net, a


def outputs(net: pf.Adapted, a: pf.Adapter) -> torch.Tensor:
    with torch.no_grad():
        y: torch.Tensor = net.apply(a, tokens(2)).logits
    return y


@pytest.mark.parametrize("format", FORMATS)
def test_one_path_gives_base_and_adapter(format: str, base: Path, tmp_path: Path) -> None:
    want = outputs(*saved(base, tmp_path / "a", format))
    options = {"model": base} if format == "mlx" else {}  # whose files do not name it here
    net, a = pf.load_model(tmp_path / "a", dtype=torch.float32, **options)
    assert type(net.model) is tf.LlamaForCausalLM and not net.model.training
    compare(outputs(net, a), want)
    assert pf.load_model(tmp_path / "a", dtype=torch.bfloat16, **options).net.model.dtype == torch.bfloat16


TASKS = {
    None: (peft.AutoPeftModel, tf.LlamaForCausalLM),
    "CAUSAL_LM": (peft.AutoPeftModelForCausalLM, tf.LlamaForCausalLM),
    "FEATURE_EXTRACTION": (peft.AutoPeftModelForFeatureExtraction, tf.LlamaModel),
    "SEQ_CLS": (peft.AutoPeftModelForSequenceClassification, tf.LlamaForSequenceClassification),
    "TOKEN_CLS": (peft.AutoPeftModelForTokenClassification, tf.LlamaForTokenClassification),
    "QUESTION_ANS": (peft.AutoPeftModelForQuestionAnswering, tf.LlamaForQuestionAnswering),
}


@pytest.mark.parametrize("task", TASKS)
def test_both_libraries_find_the_class(task: str | None, base: Path, tmp_path: Path) -> None:
    """By the class that is written, and, in a file of PEFT's, by the task alone."""
    auto, cls = TASKS[task]
    if task == "QUESTION_ANS":  # whose backbone has another name in this class alone
        cls(tf.LlamaConfig.from_pretrained(base)).save_pretrained(base)
    net = pf.adapt(cls.from_pretrained(base), {"q_proj": pf.LoRA(rank=2)} | HEADS.get(task, {}))
    a = random(net)
    pf.save(tmp_path / "ours", net, a, format="peft", extra={"task_type": task} if task else None)
    theirs = auto.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        want = net.apply(a, tokens(2))[0]
        compare(theirs(tokens(2))[0], want)
        for folder in ("ours", "theirs"):
            again, b = pf.load_model(tmp_path / folder)
            assert type(again.model) is cls
            compare(again.apply(b, tokens(2))[0], want)
    (facts,) = pf.inspect(tmp_path / "theirs").values()
    assert facts["base_model"] == str(base) and facts.get("task_type") == task and facts["peft_version"]


HEADS: dict[str | None, dict[str, pf.Method]] = {
    "SEQ_CLS": {"score": pf.Full()},
    "TOKEN_CLS": {"score": pf.Full()},
    "QUESTION_ANS": {"qa_outputs": pf.Full()},
}


def test_a_file_that_tells_no_class_leaves_it_to_the_base(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a")
    edit(tmp_path / "a", auto_mapping=None)
    assert type(pf.load_model(tmp_path / "a").net.model) is tf.LlamaForCausalLM
    assert type(pf.load_model(tmp_path / "a", cls=tf.AutoModelForCausalLM).net.model) is tf.LlamaForCausalLM


def tokenizer(folder: Path, words: int) -> None:
    core = Tokenizer(WordLevel({f"w{i}": i for i in range(words)}, unk_token="w0"))
    tf.PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(folder)


@pytest.mark.parametrize("beside", [True, False], ids=["a tokenizer beside it", "the file alone"])
def test_a_grown_vocabulary_is_grown_again(beside: bool, base: Path, tmp_path: Path) -> None:
    """SEMANTICS AutoPeftModel: a longer tokenizer beside the adapter resizes the embedding."""
    model = tf.LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(SMALL["vocab_size"] + 3)
    theirs = randomised(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")))
    theirs.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    if beside:
        tokenizer(tmp_path / "a", SMALL["vocab_size"] + 3)
    net, a = pf.load_model(tmp_path / "a")
    x = torch.arange(SMALL["vocab_size"] - 3, SMALL["vocab_size"] + 3)[None]
    with torch.no_grad():
        compare(net.apply(a, x).logits, theirs(x).logits)
        if beside:
            compare(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "a")(x).logits, theirs(x).logits)


def test_what_reaches_the_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(base, tmp_path / "a")
    edit(tmp_path / "a", base_model_name_or_path="some/base", revision="v2")
    asked: list[Any] = []
    read = tf.LlamaForCausalLM.from_pretrained

    def from_pretrained(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        return read(base)

    monkeypatch.setattr(tf.LlamaForCausalLM, "from_pretrained", from_pretrained)
    pf.load_model(tmp_path / "a", hub_options={"token": "hf_x"}, num_labels=3)
    assert asked.pop() == ("some/base", {"token": "hf_x", "num_labels": 3, "revision": "v2"})
    pf.load_model(tmp_path / "a", model="my/base")
    assert asked.pop() == ("my/base", {})


def test_what_is_not_there_is_told_with_its_cure(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = tmp_path / "a"
    saved(base, a)
    for changes, error, message in (
        ({"base_model_name_or_path": None}, ValueError, r"names no base model.*give load_model\(…, model=…\)"),
        (
            {"base_model_name_or_path": "/no/where"},
            FileNotFoundError,
            r"/no/where, the base model of .*, was not found",
        ),
        (
            {"auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"}},
            ValueError,
            "Popen of subpro",
        ),
        ({"auto_mapping": None, "task_type": "DANCE"}, ValueError, "task_type is 'DANCE'; known are CAUSAL_LM"),
    ):
        kept = (a / "adapter_config.json").read_text()
        edit(a, **changes)
        with pytest.raises(error, match=message):
            pf.load_model(a)
        (a / "adapter_config.json").write_text(kept)
    with pytest.raises(TypeError, match="for a model in memory, use load"):
        pf.load_model(a, model=by_name["llama"].build())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hub_options are for the Hub"):
        pf.load_model(a, hub_options={"max_workers": 2})
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'peftfn\[hf\]'"):
        pf.load_model(a)


def test_inspect_says_what_the_native_file_is_for(base: Path, tmp_path: Path) -> None:
    saved(base, tmp_path / "a", "native", task_type="CAUSAL_LM", revision="v1")
    (facts,) = pf.inspect(tmp_path / "a").values()
    names = ("base_model", "base_revision", "base_class", "task_type")
    assert [facts[k] for k in names] == [str(base), "v1", "LlamaForCausalLM", "CAUSAL_LM"]
    loaded = pf.load(tmp_path / "a", by_name["llama"].build())
    pf.save(tmp_path / "b", *loaded, format="peft", extra=loaded.extra)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    edit_native = tmp_path / "a" / "peftfn.json"
    good = json.loads(edit_native.read_text())
    for extra in ([], {"r": 3}, {"task_type": ["CAUSAL_LM"]}, {"auto_mapping": "x"}):
        edit_native.write_text(json.dumps(good | {"extra": extra}))
        with pytest.raises(ValueError, match="extra"):
            pf.load(tmp_path / "a", by_name["llama"].build())


def test_all_adapters_of_a_repository(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of adapters alone, at the top and below."""
    repo, asked = tmp_path / "repo", list[Any]()
    saved(base, repo)
    saved(base, repo / "two", "native")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **o: asked.append((name, o)) or repo)
    monkeypatch.chdir(tmp_path)
    given = {"revision": "v1", "hub_options": {"token": "hf_x"}}
    assert list(pf.load_all("some/one", by_name["llama"].build(), **given)) == ["default", "two"]
    (name, options) = asked.pop()
    assert (name, options["revision"], options["token"]) == ("some/one", "v1", "hf_x")
    names = ["adapter_config.json", "two/peftfn.json", "two/adapter.safetensors", "model.safetensors", "two/model.json"]
    patterns = {k: options[k] for k in ("allow_patterns", "ignore_patterns")}
    assert list(huggingface_hub.utils.filter_repo_objects(names, **patterns)) == names[:3]
    with pytest.raises(TypeError, match="no subfolder"):
        pf.load_all("some/one", by_name["llama"].build(), subfolder="two")
    assert not asked
