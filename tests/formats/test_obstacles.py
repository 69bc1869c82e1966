"""What vLLM and SGLang take: adapters × engines; each cure cures, and what is accepted means the same there."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from models import SMALL, gpt2, ids, llama, mixtral
from safetensors.torch import load_file, save_file
from support import ROOT, close, random
from torch import Tensor, nn

import peftfn as pf
from peftfn.cli.on_adapters import ENGINES as NAMED
from peftfn.core.method import Weight, registry
from peftfn.formats.engines import CURES, ENGINES, RULES
from peftfn.formats.obstacles import table

QKV = "(q|k|v)_proj"
WEIGHTS = r"(q|k|v)_proj\.weight"
PLAIN = {WEIGHTS: pf.LoRA(rank=2)}


@dataclass(frozen=True)
class Case:
    """An adapter, and for each engine what stands in its way: (where, the name of its cure).

    wider: the rules of the net that adapts the others too.
    """

    rules: dict[str, pf.Method]
    vllm: list[tuple[str, str]] = field(default_factory=list)
    sglang: list[tuple[str, str]] = field(default_factory=list)
    make: Callable[[], nn.Module] = llama
    options: dict[str, Any] = field(default_factory=dict)
    wider: dict[str, pf.Method] = field(default_factory=dict)


def lora(rank: int, **options: Any) -> pf.Method:
    return pf.LoRA(rank=rank, **options)


def both(*found: tuple[str, str]) -> dict[str, list[tuple[str, str]]]:
    return {"vllm": list(found), "sglang": list(found)}


def conv() -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"o_proj": nn.Conv2d(4, 6, 3)})])})


def numbered() -> nn.Module:
    """Experts that are layers, each with a number."""
    names = ("gate_proj", "up_proj", "down_proj")
    experts = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in names}) for _ in range(2))
    return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": experts})])})


CASES = {
    "LoRA": Case(PLAIN),
    "LoRA at all linear layers": Case({r"\w+_proj": lora(2)}),
    "LoRA at the embedding and the head": Case({"embed_tokens|lm_head": lora(2)}),
    "rsLoRA": Case({QKV: lora(2, rslora=True)}, sglang=[("`use_rslora`", "plain")]),
    "several alphas": Case({"q_proj": lora(2, alpha=6), "(k|v)_proj": lora(2)}, sglang=[("`alpha_pattern`", "plain")]),
    "several ranks": Case({"q_proj": lora(3), "(k|v)_proj": lora(2, alpha=3)}, sglang=[("the tensors", "plain")]),
    "a bias of B": Case(
        {QKV: lora(2, lora_bias=True)},
        [("`lora_bias`", "merge")],
        [("the tensors", "merge")],
        make=lambda: llama(attention_bias=True),
    ),
    "DoRA": Case({QKV: pf.DoRA(rank=2)}, **both(("`use_dora`", "lora"))),
    "PiSSA": Case({QKV: pf.PiSSA(rank=2)}, **both(("`init_lora_weights`", "lora"))),
    "KaSA": Case({QKV: pf.KaSA(rank=2, truncate=True)}, **both(("the tensors", "merge"))),
    "BD-LoRA": Case({QKV: pf.BDLoRA(rank=2, blocks=2)}, **both(("`use_bdlora`", "lora"))),
    "QA-LoRA": Case({QKV: pf.QALoRA(rank=2, group=2, pool="groups")}, **both(("`use_qalora`", "lora"))),
    "modules_to_save": Case(
        {QKV: lora(2), "lm_head": pf.Full()}, [("`modules_to_save`", "merge")], [("the tensors", "merge")]
    ),
    "a norm in full": Case(
        {QKV: lora(2), "input_layernorm": pf.Full()}, [("`modules_to_save`", "merge")], [("the tensors", "merge")]
    ),
    "trained tokens": Case({QKV: lora(2), "embed_tokens": pf.TrainableTokens((4,))}, **both(("the tensors", "merge"))),
    "a large rank": Case({QKV: lora(32)}, vllm=[("`r`, `rank_pattern`", "rank")]),
    "a large rank at some layers": Case(
        {"q_proj": lora(32, alpha=2), "(k|v)_proj": lora(2)},
        [("`r`, `rank_pattern`", "rank")],
        [("the tensors", "plain")],
    ),
    "a rank above all": Case({QKV: lora(513)}, vllm=[("`r`, `rank_pattern`", "lora")]),
    "OFT": Case({QKV: pf.OFT(block_size=2)}, **both(("`peft_type`", "lora"))),
    "LN-tuning": Case({"input_layernorm": pf.Full()}, **both(("`peft_type`", "merge"))),
    "a prompt": Case({"model": pf.PromptTuning(3)}, **both(("`peft_type`", "none"))),
    "a prefix": Case({"model": pf.PrefixTuning(3)}, **both(("`peft_type`", "none"))),
    "activated LoRA": Case({QKV: pf.ALoRA(rank=2, invocation=(5,))}, **both(("`alora_invocation_tokens`", "none"))),
    "repeated layers": Case(
        {QKV: lora(2)},
        **both(("`layer_replication`", "none")),
        make=lambda: pf.replicate(llama(), [[0, 2], [1, 2]]),
    ),
    "the native format": Case({QKV: lora(2)}, **both(("the files", "peft")), options={"format": "native"}),
    "kohya's format": Case({QKV: lora(2)}, **both(("the files", "peft")), options={"format": "kohya"}),
    "experts": Case({"experts": lora(2)}, sglang=[("the tensors", "merge")], make=mixtral),
    "experts with numbers": Case({r".*_proj\.weight": lora(2)}, make=numbered),
    "experts, the second parameter alone": Case(
        {r"experts\.down_proj": lora(2)},
        [("the tensors", "wider")],
        [("the tensors", "merge")],
        make=mixtral,
        wider={"experts": lora(2)},
    ),
    "q_proj alone": Case({"q_proj": lora(2)}, sglang=[("the tensors", "wider")], wider={QKV: lora(2)}),
    "v_proj alone": Case({"v_proj": lora(2)}, sglang=[("the tensors", "wider")], wider={QKV: lora(2)}),
    "up_proj alone": Case({"up_proj": lora(2)}, sglang=[("the tensors", "wider")], wider={"(gate|up)_proj": lora(2)}),
    "layers called h": Case({"c_attn": lora(2)}, sglang=[("the tensors", "merge")], make=gpt2),
    "a convolution": Case({"o_proj": lora(2)}, **both(("the tensors", "merge")), make=conv),
}


def saved(path: Path, case: Case) -> tuple[pf.Adapted, pf.Adapter]:
    torch.manual_seed(0)
    net = pf.adapt(case.make().eval(), case.rules)
    adapter = random(net)
    extra = {"extra": {"task_type": "CAUSAL_LM"}} if case.options.get("format", "peft") == "peft" else {}
    pf.save(path, net, adapter, **({"format": "peft", **extra} | case.options))
    return net, adapter


def names(path: Path, engine: str, **options: Any) -> list[tuple[str, str]]:
    by_text = {text: name for name, text in CURES.items()}
    return [(o.at, by_text[o.cure]) for o in pf.obstacles(path, engine, **options)]


def served(path: Path, engine: str) -> dict[str, Tensor]:
    """Site → the change of the weight that the engine makes of the files: s·B A, and s as the engine has it."""
    config = json.loads((path / "adapter_config.json").read_text())
    tensors = {k.removeprefix("base_model.model."): t for k, t in load_file(path / "adapter_model.safetensors").items()}

    def of(pattern: str, module: str, otherwise: float) -> float:
        given = config.get(pattern) or {} if engine == "vllm" else {}
        return next((v for k, v in given.items() if re.match(rf"(.*\.)?({k})$", module)), otherwise)

    out = {}
    for key, a in tensors.items():
        if "lora_A" not in key and "lora_embedding_A" not in key:
            continue
        module = re.sub(r"\.lora_(embedding_)?A(\.weight)?$", "", key)
        b = tensors[key.replace("_A", "_B")]
        rank, alpha = of("rank_pattern", module, config["r"]), of("alpha_pattern", module, config["lora_alpha"])
        delta = alpha / (rank**0.5 if engine == "vllm" and config.get("use_rslora") else rank) * (b @ a)
        turned = "embedding" in key or config.get("fan_in_fan_out")
        out[f"{module}.weight"] = delta.T if turned else delta
    return out


def means_the_same(path: Path, engine: str, net: pf.Adapted, adapter: pf.Adapter) -> None:
    got, want = served(path, engine), net.delta(adapter)
    assert not net.bias_deltas(adapter)
    assert got.keys() == want.keys()
    for site, delta in want.items():
        close(got[site], delta)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_each_adapter_is_told_and_cured(name: str, engine: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = tmp_path / ("a.safetensors" if case.options.get("format") == "kohya" else "a")
    net, adapter = saved(path, case)
    found = names(path, engine)
    assert found == getattr(case, engine)
    for _, cure in found:
        CURE[cure](case, net, adapter, engine, tmp_path)
    if not found and not any(e.site.stacked for e in net.plan.values()):
        means_the_same(path, engine, net, adapter)


def accepted(net: pf.Adapted, adapter: pf.Adapter, engine: str, path: Path) -> None:
    pf.save(path, net, adapter, format="peft")
    assert not pf.obstacles(path, engine)
    if not any(e.site.stacked for e in net.plan.values()):
        means_the_same(path, engine, net, adapter)


def by_lora(case: Case, net: pf.Adapted, adapter: pf.Adapter, engine: str, tmp: Path) -> None:
    accepted(*pf.to_lora(net, adapter, rank=4), engine, tmp / "lora")


def by_plain(case: Case, net: pf.Adapted, adapter: pf.Adapter, engine: str, tmp: Path) -> None:
    if engine == "sglang" and not any(o.does == "refuses" for o in pf.obstacles(tmp / "a", engine)):
        with pytest.raises(AssertionError):
            means_the_same(tmp / "a", engine, net, adapter)  # what it would serve, silently
    rank = max(e.method.rank for e in net.plan.values())  # type: ignore[attr-defined]
    plain = pf.adapt(net.model, dict.fromkeys(case.rules, lora(rank)))
    accepted(plain, pf.conform(adapter, net, plain), engine, tmp / "plain")


def by_wider(case: Case, net: pf.Adapted, adapter: pf.Adapter, engine: str, tmp: Path) -> None:
    wider = pf.adapt(net.model, case.wider)
    accepted(wider, pf.conform(adapter, net, wider), engine, tmp / "wider")


def by_rank(case: Case, net: pf.Adapted, adapter: pf.Adapter, engine: str, tmp: Path) -> None:
    assert ("`r`, `rank_pattern`", "rank") not in names(tmp / "a", engine, max_rank=32)
    assert not pf.obstacles(tmp / "a", engine, max_rank=64)


def by_merge(case: Case, net: pf.Adapted, adapter: pf.Adapter, engine: str, tmp: Path) -> None:
    if case.make is conv:  # it has no forward
        assert net.merge(adapter).keys() == {"layers.0.o_proj.weight", "layers.0.o_proj.bias"}
        return
    args, kwargs = ids(2)
    merged = pf.merged_model(net, adapter)
    assert type(merged) is type(net.model)
    close(merged(*args, **kwargs).logits, net.apply(adapter, *args, **kwargs).logits)


def by_peft(case: Case, net: pf.Adapted, adapter: pf.Adapter, engine: str, tmp: Path) -> None:
    accepted(net, adapter, engine, tmp / "peft")


def by_none(case: Case, net: pf.Adapted, adapter: pf.Adapter, engine: str, tmp: Path) -> None:
    try:
        net, adapter = pf.to_lora(net, adapter, rank=4)
    except (ValueError, TypeError):
        return
    pf.save(tmp / "none", net, adapter, format="peft")
    assert pf.obstacles(tmp / "none", engine)


CURE = {
    "lora": by_lora,
    "plain": by_plain,
    "wider": by_wider,
    "rank": by_rank,
    "merge": by_merge,
    "peft": by_peft,
    "none": by_none,
}


@pytest.mark.parametrize("name", sorted(n for n, c in registry.items() if issubclass(c, Weight) and n != "Lily"))
def test_what_is_accepted_of_any_method_means_the_same(name: str, tmp_path: Path) -> None:
    """The law that finds a missing rule: no obstacle, so s·B A as the engine reads it is the method's change."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"o_proj": nn.Linear(24, 24)})])})
    for i, options in enumerate(registry[name].cases):
        net = pf.adapt(model, {r"o_proj\.weight": registry[name](**options)})
        adapter = random(net)
        try:
            pf.save(tmp_path / str(i), net, adapter, format="peft")
        except ValueError:  # PEFT has not this form of it: there is no file to serve
            continue
        for engine in ENGINES:
            if not pf.obstacles(tmp_path / str(i), engine):
                means_the_same(tmp_path / str(i), engine, net, adapter)


PEFTS = {
    "plain": ({}, [], []),
    "regex": ({"target_modules": ".*(q|k|v)_proj"}, [], ["`target_modules`"]),
    "all-linear": ({"target_modules": "all-linear"}, [], []),
    "rank_pattern": ({"rank_pattern": {"q_proj": 4}}, [], ["the tensors"]),
    "lm_head in full": ({"modules_to_save": ["lm_head"]}, ["`modules_to_save`"], ["the tensors"]),
    "tokens": ({"trainable_token_indices": [3]}, ["the tensors"], ["the tensors"]),
    "activated": ({"alora_invocation_tokens": [3]}, *[["`alora_invocation_tokens`"]] * 2),
    "DoRA and rsLoRA": ({"use_dora": True, "use_rslora": True}, ["`use_dora`"], ["`use_rslora`", "`use_dora`"]),
    "biases": ({"bias": "all"}, ["`bias`"], ["the tensors"]),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, at what PEFT asks it
@pytest.mark.parametrize("name", PEFTS)
def test_files_that_peft_wrote(name: str, tmp_path: Path) -> None:
    """PEFT writes every key, with null where nothing is said."""
    options, *wanted = PEFTS[name]
    given: dict[str, Any] = {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    peft.get_peft_model(llama(attention_bias=True), peft.LoraConfig(**given | options)).save_pretrained(tmp_path)
    for engine, want in zip(ENGINES, wanted, strict=True):
        assert [o.at for o in pf.obstacles(tmp_path, engine)] == want


def test_a_regular_expression_is_cured_by_writing_the_file_again(tmp_path: Path) -> None:
    net, _ = saved(tmp_path / "a", CASES["LoRA"])
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": r".*\.(q|k|v)_proj"}))
    assert names(tmp_path / "a", "sglang") == [("`target_modules`", "peft")]
    loaded = pf.load(tmp_path / "a", net.model)
    accepted(loaded.net, loaded.adapter, "sglang", tmp_path / "b")


def test_a_classifier_in_full_is_taken_by_vllm_alone(tmp_path: Path) -> None:
    c = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 2}
    model = tf.LlamaForSequenceClassification(tf.LlamaConfig(**SMALL, **c))
    net = pf.adapt(model, {**PLAIN, "score": pf.Full()})
    pf.save(tmp_path, net, net.init(), format="peft")
    assert not pf.obstacles(tmp_path, "vllm")
    (obstacle,) = pf.obstacles(tmp_path, "sglang")
    assert (obstacle.does, obstacle.found) == ("does not apply", "score.weight")


def test_the_size_of_a_rank(tmp_path: Path) -> None:
    saved(tmp_path / "a", Case({QKV: lora(24)}))
    (obstacle,) = pf.obstacles(tmp_path / "a", "vllm")
    assert str(obstacle).startswith(f"vLLM {ENGINES['vllm'].version} refuses `r`, `rank_pattern`")
    assert "24, and the server takes 16" in str(obstacle) and "--max-lora-rank" in obstacle.cure
    assert [o.at for o in pf.obstacles(tmp_path / "a", "sglang", max_rank=16)] == ["`r`"]
    assert not pf.obstacles(tmp_path / "a", "sglang", max_rank=24)


def test_bad_input_says_so(tmp_path: Path) -> None:
    net, adapter = saved(tmp_path / "a", CASES["LoRA"])
    with pytest.raises(ValueError, match="engine is 'tgi'; there are rules for vllm, sglang"):
        pf.obstacles(tmp_path / "a", "tgi")
    with pytest.raises(ValueError, match=r"max_rank is 24; vLLM starts with 1, 8, 16.* 512"):
        pf.obstacles(tmp_path / "a", "vllm", max_rank=24)
    with pytest.raises(ValueError, match="max_rank is 0"):
        pf.obstacles(tmp_path / "a", "sglang", max_rank=0)
    with pytest.raises(FileNotFoundError):
        pf.obstacles(tmp_path / "b", "vllm")
    pf.save(tmp_path / "two" / "x", net, adapter, format="peft")
    pf.save(tmp_path / "two" / "y", net, adapter, format="peft")
    with pytest.raises(ValueError, match="holds several adapters, x, y: give the folder of one"):
        pf.obstacles(tmp_path / "two", "vllm")
    file = tmp_path / "a" / "adapter_config.json"
    good = json.loads(file.read_text())
    for key, value in {"rank_pattern": [1], "modules_to_save": [1], "r": "8", "target_modules": 3}.items():
        file.write_text(json.dumps(good | {key: value}))
        with pytest.raises(ValueError, match=key):
            pf.obstacles(tmp_path / "a", "vllm")
    file.write_text(json.dumps({k: v for k, v in good.items() if k != "lora_alpha"}))
    assert [(o.at, o.found) for o in pf.obstacles(tmp_path / "a", "sglang")] == [
        ("`r`, `lora_alpha`, `target_modules`", "lora_alpha")
    ]
    file.write_text(json.dumps(good | {"peft_type": "BONE"}))  # what MiSS was called
    (obstacle,) = pf.obstacles(tmp_path / "a", "vllm")
    assert (obstacle.found, obstacle.cure) == ("MISS", CURES["lora"])
    save_file({}, tmp_path / "a" / "adapter_model.safetensors")
    file.write_text(json.dumps(good))
    assert not pf.obstacles(tmp_path / "a", "vllm")


def test_each_rule_is_of_an_engine_and_has_a_cure_and_a_case() -> None:
    """No rule that no adapter above meets, but for those that only other writers' files do."""
    met = {(engine, at) for case in CASES.values() for engine in ENGINES for at, _ in getattr(case, engine)}
    met |= {(e, at) for _, *wanted in PEFTS.values() for e, ats in zip(ENGINES, wanted, strict=True) for at in ats}
    rules = {(engine, r.at) for r in RULES for engine in r.does}
    assert {e for e, _ in rules} == set(ENGINES) == set(NAMED)
    assert rules - met == {*((e, "`r`, `lora_alpha`, `target_modules`") for e in ENGINES), ("sglang", "`r`")}
    assert {r.cure for r in RULES} == set(CURES) == set(CURE)


def test_the_page_has_the_rules() -> None:
    assert table() in (ROOT / "docs" / "serving.md").read_text(), f"put this into docs/serving.md:\n{table()}"
