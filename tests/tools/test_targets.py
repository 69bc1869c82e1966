"""Targeting as PEFT users write it, against what the installed PEFT adapts."""

import re
import time
from typing import Any

import peft
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from models import by_name
from peft.utils import constants
from torch import nn
from transformers import BertConfig

import peftfn as pf
from peftfn.core.method import registry
from peftfn.formats.regex import Pattern
from peftfn.model.choice import matched
from peftfn.model.model import Model
from peftfn.tools.targets import defaults, targets

EXCLUDED = ["mlp.c_proj", "output.dense", "SelfAttention.q", "1.self_attn.k_proj", "attention.k_proj"]
LISTS = ["layers", "h", "layer", "block"]
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of PEFT's own calls into transformers
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "ALL-linear"},
        {"target_modules": r".*(q_proj|c_attn|query|q|dense)"},
        {"target_modules": ["q_proj", "c_attn", "query", "q", "o_proj", "dense"]},
        {"target_modules": ["q_proj", "c_proj", "dense", "wi"], "exclude_modules": r".*(attn|attention|SelfA).*"},
        {"target_modules": ["k_proj", "c_proj", "dense", "q"], "exclude_modules": EXCLUDED},
        {"target_modules": ["q_proj", "c_fc", "query", "wi"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "c_fc", "query", "wi"], "layers_to_transform": 0, "layers_pattern": LISTS},
    ],
    ids=str,
)  # fmt: skip
def test_the_modules_peft_adapts(name: str, options: dict[str, Any]) -> None:
    case = by_name[name]
    known = Model.of(case.build())
    mine = matched(known, *options.values()) if "layers_to_transform" not in options else matched(
        known, options["target_modules"], None, options["layers_to_transform"], options.get("layers_pattern")
    )  # fmt: skip
    try:
        model = peft.get_peft_model(case.build(), peft.LoraConfig(r=1, fan_in_fan_out=name == "gpt2", **options))
    except ValueError:
        assert not mine
        return
    assert sorted(mine) == sorted(model.base_model.targeted_module_names)


def test_rules_of_patterns_and_parameters() -> None:
    model = by_name["mixtral"].build()
    rules = targets(
        model,
        pf.LoRA(2),
        ["q_proj", "k_proj"],
        parameters=["experts.gate_up_proj"],
        rank_pattern={"gate_up_proj": 3, r"^model\.layers\.0\.self_attn\.q_proj": 4},
        alpha_pattern={"k_proj": 7},
    )
    net = pf.adapt(model, rules)
    assert {n.split(".", 3)[3]: (e.method.rank, e.method.alpha) for n, e in net.plan.items()} == {
        "self_attn.q_proj.weight": (4, None),
        "self_attn.k_proj.weight": (2, 7),
        "mlp.experts.gate_up_proj": (3, None),
    }


def test_names_never_leak_into_longer_ones() -> None:
    model = nn.ModuleDict({n: nn.Linear(2, 2) for n in ("foo", "foobar", "barfoo", "foo_bar")})
    assert matched(Model.of(model), ["foo"]) == ["foo"]
    assert list(pf.adapt(model, targets(model, pf.LoRA(1), ["foo"])).plan) == ["foo.weight"]


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a name": ({"modules": "q_proj"}, ValueError, r"'q_proj'.*one regular expression.*give \['q_proj'\]$"),
    "a name to leave out": (
        {"modules": "all-linear", "exclude": "o_proj"},
        ValueError,
        r"exclude has 'o_proj'.*one regular expression.*give \['o_proj'\]$",
    ),
    "no such layer": (
        {"modules": ["q_proj"], "layers": [9]},
        ValueError,
        r"layers is \[9\], and \['q_proj'\] .*such a layer",
    ),
    "no method": ({"method": ["q_proj"]}, TypeError, r"\(model, method, modules\).*second argument is a list: write"),
}


@pytest.mark.parametrize("name", WRONG)
def test_errors_say_what_to_write(name: str) -> None:
    options, kind, match = WRONG[name]
    with pytest.raises(kind, match=match):
        targets(by_name["llama"].build(), **({"method": pf.LoRA(4)} | options))


def test_one_parameter_is_a_list_of_one() -> None:
    model = by_name["mixtral"].build()
    one = targets(model, pf.LoRA(4), parameters="experts.gate_up_proj")
    assert one == targets(model, pf.LoRA(4), parameters=["experts.gate_up_proj"])


def test_all_linear_takes_modules_not_names() -> None:
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"baz": nn.Linear(2, 2)}), "conv": nn.ModuleDict({"baz": nn.Conv2d(2, 2, 1)})}
    )
    assert matched(Model.of(model), "all-linear") == ["a.baz"]


def test_what_is_refused() -> None:
    model = by_name["llama"].build()
    with pytest.raises(ValueError, match=r"near: .*q_proj"):
        targets(model, pf.LoRA(1), ["q_prok"])
    with pytest.raises(ValueError, match="IA3 has no rank"):
        targets(model, pf.IA3(), ["q_proj"], rank_pattern={"q_proj": 3})
    with pytest.raises(ValueError, match="says the layers itself"):
        matched(Model.of(model), ".*q_proj", layers=[1])


# What PEFT adapts if one names nothing.

OURS = {  # PEFT's name in its tables → ours
    "LORA": "LoRA", "ADALORA": "AdaLoRA", "ADAMSS": "AdaMSS", "BEFT": "BEFT", "BOFT": "BOFT", "C3A": "C3A",
    "DELORA": "DeLoRA", "FOURIERFT": "FourierFT", "FROD": "FRoD", "GLORA": "GLoRA", "GRALORA": "GraLoRA", "HRA": "HRA",
    "IA3": "IA3", "LOHA": "LoHa", "LOKR": "LoKr", "MISS": "MiSS", "OFT": "OFT", "OSF": "OSF", "PVERA": "PVeRA",
    "RANDLORA": "RandLoRA", "ROAD": "RoAd", "SHIRA": "SHiRA", "TINYLORA": "TinyLoRA", "UNILORA": "UniLoRA",
    "VBLORA": "VBLoRA", "VERA": "VeRA", "WAVEFT": "WaveFT",
}  # fmt: skip


class Typed(nn.Module):
    """A model that says of what type it is, and no more."""

    def __init__(self, kind: str | None):
        super().__init__()
        self.config = type("Config", (), {"model_type": kind})


@pytest.mark.parametrize("table", OURS)
def test_the_tables_are_pefts(table: str) -> None:
    method = registry[OURS[table]]()
    theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{table}_TARGET_MODULES_MAPPING")
    assert len(theirs) > 15
    for kind, names in theirs.items():
        mine, inputs = defaults(Model.of(Typed(kind)), method)
        assert (mine if isinstance(mine, str) else set(mine)) == (names if isinstance(names, str) else set(names)), kind
        if table == "IA3":
            assert set(inputs) == set(constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[kind])


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_defaults_adapt_what_peft_adapts(name: str) -> None:
    configs = {
        pf.LoRA(2): peft.LoraConfig(r=2), pf.IA3(): peft.IA3Config(), pf.OFT(4): peft.OFTConfig(r=0, oft_block_size=4)
    }  # fmt: skip
    for method, config in configs.items():
        if name == "gpt2" and isinstance(method, pf.OFT):
            continue  # PEFT's OFT takes no Conv1D
        if name == "gpt2":
            config.fan_in_fan_out = True
        theirs = peft.get_peft_model(by_name[name].build(), config)
        model = by_name[name].build()
        net = pf.adapt(model, targets(model, method))
        assert sorted(s.rpartition(".")[0] for s in net.plan) == sorted(theirs.base_model.targeted_module_names)
        if isinstance(method, pf.IA3):
            ahead = [s.rpartition(".")[0] for s, e in net.plan.items() if e.method.feedforward]
            assert sorted(ahead) == sorted(
                n for n, m in theirs.base_model.model.named_modules() if getattr(m, "is_feedforward", 0)
            )


def test_no_defaults_for_what_is_not_known() -> None:
    for kind in ("something", None):
        with pytest.raises(ValueError, match=r"no default modules.*all-linear"):
            targets(Typed(kind), pf.LoRA(2))


# Patterns.


def nested() -> nn.Module:
    """foo, module.foo, module.foobar, module.module.foo, module.module.barfoo."""
    inner = nn.ModuleDict({"foo": nn.Linear(8, 8), "barfoo": nn.Linear(8, 8)})
    outer = nn.ModuleDict({"foo": nn.Linear(8, 8), "foobar": nn.Linear(8, 8), "module": inner})
    return nn.ModuleDict({"foo": nn.Linear(8, 8), "module": outer})


@pytest.mark.parametrize(
    ("pattern", "hits"),
    [
        ({"foo": 5}, {"foo": 5, "module.foo": 5, "module.module.foo": 5}),
        ({"^foo": 5}, {"foo": 5}),
        ({"^module.foo": 5}, {"module.foo": 5}),
        ({"module.foo": 5}, {"module.foo": 5, "module.module.foo": 5}),
        ({"^foo": 5, "^module.module.foo": 6}, {"foo": 5, "module.module.foo": 6}),
        ({"foo": 5, "^foo": 6}, {"foo": 5, "module.foo": 5, "module.module.foo": 5}),
        ({"module.foo$": 5}, {"module.foo": 5, "module.module.foo": 5}),
        ({r"(bar)?foo": 5}, {"foo": 5, "module.foo": 5, "module.module.foo": 5, "module.module.barfoo": 5}),
        ({"foo": 7}, {"foo": 7, "module.foo": 7, "module.module.foo": 7}),
    ],
    ids=str,
)
def test_the_truth_table_of_patterns(pattern: dict[str, int], hits: dict[str, int]) -> None:
    """SEMANTICS C5.2, C6.1 7 to 11, P15: and the scale is that of the module's own rank."""
    model, names = nested(), ["foo", "foobar", "barfoo"]
    every = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    net = pf.adapt(model, targets(model, pf.LoRA(2, alpha=4), names, rank_pattern=pattern))
    assert {n: net.plan[f"{n}.weight"].method.rank for n in every} == {n: hits.get(n, 2) for n in every}
    assert all(e.method.scale == 4 / e.method.rank for e in net.plan.values())
    net = pf.adapt(model, targets(model, pf.LoRA(2, alpha=4), names, alpha_pattern=pattern))
    assert {n: net.plan[f"{n}.weight"].method.scale for n in every} == {n: hits.get(n, 4) / 2 for n in every}
    theirs = peft.get_peft_model(
        nested(), peft.LoraConfig(target_modules=names, r=2, lora_alpha=4, rank_pattern=pattern)
    )
    assert {n: theirs.get_submodule(f"base_model.model.{n}").r["default"] for n in every} == {
        n: hits.get(n, 2) for n in every
    }


@pytest.mark.parametrize("key", ["fo", "oo", "^module", "foo2"])
def test_a_key_of_a_pattern_that_finds_nothing_is_an_error(key: str) -> None:
    """Also one that finds part of a name, or a module that is not chosen."""
    for pattern in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=rf"{pattern} has '{re.escape(key)}'.*near"):
            targets(nested(), pf.LoRA(2), ["foo"], **{pattern: {"foo": 3, key: 5}})
    with pytest.raises(ValueError, match="rank_pattern has 'barfoo'"):
        targets(nested(), pf.LoRA(2), ["foo"], rank_pattern={"barfoo": 5})


@pytest.mark.parametrize("exclude", [["barfo"], ["foo", "fo"], "foo2", "module"[:3]])
def test_a_name_to_exclude_that_finds_nothing_is_an_error(exclude: Any) -> None:
    with pytest.raises(ValueError, match=r"exclude has .*near"):
        targets(nested(), pf.LoRA(2), ["foo", "barfoo"], exclude=exclude)
    assert len(pf.adapt(nested(), targets(nested(), pf.LoRA(2), ["foo"], exclude=["barfoo", "module.foo"])).plan) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_default_targets_of_types_with_rules_of_their_own(name: str) -> None:
    """OSF takes all linear layers where its table lacks the model, TrainableTokens the input embedding."""
    tokens = peft.TrainableTokensConfig(token_indices=[1, 3])
    for method, config in ((pf.OSF(), peft.OSFConfig()), (pf.TrainableTokens((1, 3)), tokens)):
        if name == "gpt2" and isinstance(method, pf.OSF):
            continue  # PEFT's OSF takes no Conv1D
        model = by_name[name].build()
        theirs = peft.get_peft_model(by_name[name].build(), config).base_model.targeted_module_names
        sites = pf.adapt(model, targets(model, method)).plan
        assert sorted(s.rpartition(".")[0] for s in sites) == sorted(theirs)


def test_layers_that_no_pattern_finds_are_an_error() -> None:
    """SEMANTICS C6.1 28."""
    model = by_name["llama"].build()
    assert len(pf.adapt(model, targets(model, pf.LoRA(2), ["q_proj"], layers=[0])).plan) == 1
    for options in ({"layers": [0], "layers_pattern": "blocks"}, {"layers": [7]}):
        with pytest.raises(ValueError, match="matches no module"):
            targets(model, pf.LoRA(2), ["q_proj"], **options)


def test_parameters_that_are_no_matrix_are_an_error() -> None:
    """SEMANTICS C6.1 12."""
    model = by_name["llama"].build()
    with pytest.raises(ValueError, match="does not support their kinds"):
        pf.adapt(model, targets(model, pf.LoRA(2), parameters=["norm.weight"]))


def test_a_function_of_the_name() -> None:
    model = by_name["llama"].build()
    rules = targets(model, pf.LoRA(2), lambda n: n.endswith("1.self_attn.q_proj"))
    assert list(pf.adapt(model, rules).plan) == ["model.layers.1.self_attn.q_proj.weight"]


# Regular expressions from files.

ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\w", r"\d", "(a|b)", "(ab)?", "(?:a*)", "^", "$", r"\b", "(?=a)",
    "(?!b)", "a{2}", "b{1,3}", "(a+)*", "1", "|"]  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(
    st.lists(st.tuples(st.sampled_from(ATOMS), st.sampled_from(["", "*", "+", "?", "*?", "{0,2}"])), max_size=6),
    st.text("ab.1", max_size=7),
)
def test_bounded_patterns_match_what_re_matches(parts: list[tuple[str, str]], text: str) -> None:
    source = "".join(atom + times for atom, times in parts)
    try:
        pattern, want = Pattern(source), re.fullmatch(source, text) is not None
        got = pattern.matches(text)
    except (re.error, ValueError):
        return  # what is no pattern, or not read from files: the next test sees that these are few
    assert got == want, source


def test_patterns_that_are_in_use_are_read() -> None:
    names = ["model.layers.10.mlp.v_proj", "a.language_model.layers.3.self_attn.k_proj", "visual.q_proj", "a.q_proj"]
    unsloth = (
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:k_proj|v_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
    )
    for source in (
        unsloth,
        r"^(a(?=\.).*\.(k_proj|q_proj))$",
        r"^(?!.*visual).*(q_proj|v_proj)$",
        r".*\.\d+\..*[kv]_proj",
    ):
        assert [Pattern(source).matches(n) for n in names] == [re.fullmatch(source, n) is not None for n in names]


@pytest.mark.parametrize(
    "source", ["(a+)+b", "(a*)*(a*)*(a*)*b", "(a|aa)+b", "(.*)*" * 20 + "x", "(a?){60}a{60}", r"(\w+\.?)+$x"]
)
def test_patterns_that_make_re_backtrack_for_hours_end_at_once(source: str) -> None:
    start = time.perf_counter()
    assert Pattern(source).matches("a" * 59) is False
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(
    "source", ["(a*){999999999}", "(){999999999}", "(" * 3000 + ")" * 3000, "(?<=a)b", r"(a)\1", "(?i)a", "("]
)
def test_patterns_that_are_refused(source: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"too long|nested|not allowed|flags|not a regular"):
        Pattern(source).matches("a" * 59)
    assert time.perf_counter() - start < 1


# Tasks, norms, and values by name.


def tiny(cls: str) -> nn.Module:
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3
    )
    return getattr(transformers, cls)(config)


TASKS = {
    "SEQ_CLS": "BertForSequenceClassification",
    "TOKEN_CLS": "RobertaForTokenClassification",
    "QUESTION_ANS": "BertForQuestionAnswering",
    "FEATURE_EXTRACTION": "BertModel",
}


@pytest.mark.parametrize("modules", ["all-linear", ["query", "dense"], None], ids=str)
@pytest.mark.parametrize(("task", "cls"), [*TASKS.items(), ("SEQ_CLS", "RobertaForSequenceClassification")])
def test_a_task_trains_what_peft_trains(task: str, cls: str, modules: Any) -> None:
    """PEFT's all-linear leaves out the head of SEQ_CLS alone, and then fails at those of other tasks."""
    model = tiny(cls)
    net = pf.adapt(model, targets(model, pf.LoRA(2), modules, task=task))
    out = ["classifier", "qa_outputs"] if modules == "all-linear" and task in ("TOKEN_CLS", "QUESTION_ANS") else None
    config = peft.LoraConfig(r=2, target_modules=modules, task_type=task, exclude_modules=out)
    theirs = peft.get_peft_model(tiny(cls), config)
    lora = {n.split(".lora_")[0] for n, p in theirs.named_parameters() if p.requires_grad and ".lora_" in n}
    whole = {n for n, p in theirs.named_parameters() if p.requires_grad and ".lora_" not in n}
    mine = {kind: {n for n, e in net.plan.items() if type(e.method) is kind} for kind in (pf.LoRA, pf.Full)}
    prefix = "base_model.model."
    assert {f"{prefix}{n}".removesuffix(".weight") for n in mine[pf.LoRA]} == lora
    assert {f"{prefix}{n}" for n in mine[pf.Full]} == {n.replace(".modules_to_save.default", "") for n in whole}
    assert bool(mine[pf.Full]) == (task != "FEATURE_EXTRACTION")


def test_what_a_task_refuses() -> None:
    model = by_name["llama"].build()
    assert targets(model, pf.LoRA(2), task=peft.TaskType.CAUSAL_LM) == targets(model, pf.LoRA(2))
    with pytest.raises(ValueError, match=r"classifier or score.*rule of its own"):
        targets(model, pf.LoRA(2), task="SEQ_CLS")
    with pytest.raises(ValueError, match="task is 'SEQCLS'; it must be one of SEQ_CLS"):
        targets(model, pf.LoRA(2), task="SEQCLS")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_norms_by_name(name: str) -> None:
    model = by_name[name].build()
    net = pf.adapt(model, targets(model, pf.Full(), "norms"))
    want = {
        f"{n}.{k}"
        for n, m in model.named_modules()
        if type(m).__name__ in ("LlamaRMSNorm", "LayerNorm", "T5LayerNorm")
        for k, _ in m.named_parameters()
    }
    assert set(net.plan) == want and len(want) > 4
    theirs = constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING.get(name, [])
    assert {n for n in want if any(f".{t}." in f".{n}" for t in theirs)} == (want if theirs else set())
    kept = pf.adapt(model, targets(model, pf.Full(), "norms", layers=[1])).plan if name == "llama" else {}
    assert all(".1." in n for n in kept)


def test_every_field_has_patterns() -> None:
    model, names = nested(), ["foo", "barfoo"]
    options = {"block_size": {"^foo": 4}, "eps": {"barfoo": 0.5, "foo": 0.1}}
    plan = pf.adapt(model, targets(model, pf.OFT(block_size=2), names, patterns=options)).plan
    assert {n.removesuffix(".weight"): (e.method.block_size, e.method.eps) for n, e in plan.items()} == {
        "foo": (4, 0.1), "module.foo": (2, 0.1), "module.module.foo": (2, 0.1), "module.module.barfoo": (2, 0.5)
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"patterns\['eps'\] has 'fo', which matches none"):
        targets(model, pf.OFT(block_size=2), names, patterns={"eps": {"fo": 1.0}})
    with pytest.raises(ValueError, match=r"OFT has no sizes.*it has .*block_size"):
        targets(model, pf.OFT(block_size=2), names, patterns={"sizes": {"foo": 1.0}})
    with pytest.raises(ValueError, match="so has rank_pattern"):
        targets(model, pf.LoRA(2), names, rank_pattern={"foo": 1}, patterns={"rank": {"foo": 1}})


def test_a_name_among_others_that_finds_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"modules has 'q_prok', which matches no module.*q_proj"):
        targets(by_name["llama"].build(), pf.LoRA(1), ["v_proj", "q_prok"])


def test_a_configuration_may_be_a_dict() -> None:
    model = by_name["llama"].build()
    want = targets(model, pf.LoRA(2))
    model.config = model.config.to_dict()
    assert targets(model, pf.LoRA(2)) == want
