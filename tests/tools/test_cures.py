"""What someone types who knows PEFT: each error says what to write here instead, and what it says works."""

import inspect
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any

import optree
import peft
import pytest
import torch
from models import by_name
from torch import nn

import peftfn as pf
from peftfn.net.words import CURES
from peftfn.tools.cures import JAX, OPTAX

Case = tuple[Callable[[Any, Any, Any], Any], type[Exception], str]


COSINE, SGD, ADAMW = pf.steps.cosine(10), pf.steps.sgd(0.1), pf.steps.adamw(0.1)


def made() -> tuple[Any, Any, Any]:
    net = pf.adapt(nn.Sequential(nn.Linear(6, 4)), {"0.weight": pf.LoRA(rank=2)})
    a = net.init()
    return net, a, pf.as_module(net, one=a, two=net.init(seed=1))


CASES: dict[str, Case] = {
    "get_peft_model": (lambda n, a, m: pf.get_peft_model(n.model), AttributeError, r"pf|peftfn\.adapt\(.*init"),
    "PeftModel": (lambda n, a, m: pf.PeftModel, AttributeError, r"peftfn\.adapt.*as_module.*peftfn\.load"),
    "PeftModelForCausalLM": (lambda n, a, m: pf.PeftModelForCausalLM, AttributeError, r"peftfn\.adapt.*as_module"),
    "LoraConfig": (lambda n, a, m: pf.LoraConfig(r=8), AttributeError, r"peftfn\.LoRA\(.*adapt"),
    "IA3Config": (lambda n, a, m: pf.IA3Config(), AttributeError, r"peftfn\.IA3\("),
    "grad": (lambda n, a, m: pf.grad, AttributeError, r"JAX's\. Write torch\.func\.grad"),
    "apply_updates": (lambda n, a, m: pf.apply_updates, AttributeError, r"peftfn\.steps\.apply\("),
    "adam": (lambda n, a, m: pf.steps.adam(1e-3), AttributeError, r"optax's\. Write adamw\(lr, weight_decay=0\.0\)"),
    "adamv": (lambda n, a, m: pf.steps.adamv(1e-3), AttributeError, r"near: adamw"),
    "a rate that is a schedule": (lambda n, a, m: pf.steps.adamw(COSINE), TypeError, r"adamw: lr .*scheduled\(f\)"),
    "a rate that is a string": (lambda n, a, m: pf.steps.sgd("1e-3"), TypeError, r"sgd: lr is '1e-3'; give a number"),
    "a norm that is a string": (lambda n, a, m: pf.steps.clip("1"), TypeError, r"clip: max_norm is '1'; give a number"),
    "a schedule among steps": (lambda n, a, m: pf.steps.chain(COSINE), TypeError, r"scheduled\(f\) is the step"),
    "a list of steps": (lambda n, a, m: pf.steps.chain([SGD]), TypeError, r"a list is not a step: write chain\("),
    "a rate for a schedule": (
        lambda n, a, m: pf.steps.scheduled(0.1),
        TypeError,
        r"0\.1; give a function",
    ),
    "all that update returns": (lambda n, a, m: pf.steps.apply(a, (a, {})), TypeError, r"tuple: .*\(updates, state\)"),
    "the state first": (lambda n, a, m: ADAMW.update(ADAMW.init(a), a, a), KeyError, r"count is missing.*same adapter"),
    "Lora": (lambda n, a, m: pf.Lora(8), AttributeError, r"'LoRA'"),
    "a misspelt name": (lambda n, a, m: pf.as_modul(n, a), AttributeError, r"near.*as_module"),
    "a method for rules": (lambda n, a, m: pf.adapt(n.model, pf.LoRA()), TypeError, r"LoRA.*\{'q_proj'.*targets"),
    "net(x)": (lambda n, a, m: n(torch.ones(1, 6)), TypeError, r"net\.apply\(adapter"),
    "apply(x)": (lambda n, a, m: n.apply(torch.ones(1, 6)), TypeError, r"first argument is the adapter.*Tensor.*init"),
    "apply(adapter_names)": (
        lambda n, a, m: n.apply(a, torch.ones(1, 6), adapter_names=["one"]),
        TypeError,
        r"PEFT's.*net\.mixed\(.*bank",
    ),
    "adapt(name)": (
        lambda n, a, m: pf.adapt("gpt2", {".*": pf.LoRA()}),
        TypeError,
        r"load it.*from_pretrained\('gpt2'\)",
    ),
    "adapt(rules, model)": (lambda n, a, m: pf.adapt({}, n.model), TypeError, r"Module, not dict: give it first"),
    "describe(net)": (lambda n, a, m: pf.describe(n), TypeError, r"not Adapted: give its \.model"),
    "adapt(config)": (lambda n, a, m: pf.adapt(n.model, peft.IA3Config()), ValueError, r"IA3Config.*peftfn\.IA3\(\)"),
    "load(model, path)": (lambda n, a, m: pf.load(n.model, "x"), TypeError, r"\(path, model\).*Sequential.*first"),
    "summary(m)": (lambda n, a, m: pf.summary(m), TypeError, r"peftfn\.status\(m\)"),
    "status(net)": (lambda n, a, m: pf.status(n), TypeError, r"as_module.*Adapted"),
    "as_module(model, a)": (lambda n, a, m: pf.as_module(n.model, a), TypeError, r"\(net, adapter\).*adapt first"),
    "use with weights": (lambda n, a, m: m.use({"one": 0.5}).__enter__(), TypeError, r"use.*weights=\[…\].*net\.mixed"),
    "one adapter to Nets": (lambda n, a, m: pf.Nets([n]).mixed(a, [0], torch.ones(1, 6)), ValueError, r"list"),
}


@pytest.mark.parametrize("name", CASES)
def test_errors_say_what_to_write(name: str) -> None:
    call, kind, match = CASES[name]
    with pytest.raises(kind, match=match):
        call(*made())


PARTS = {"": pf} | {
    f"{part}.": getattr(pf, part) for part in ("merging", "optim", "routing", "starts", "steps", "suggest")
}
PUBLIC = {head + name: getattr(module, name) for head, module in PARTS.items() for name in module.__all__}


def firsts(function: Any) -> Any:
    """The type of a function's first argument."""
    return next((p.annotation for p in inspect.signature(function).parameters.values()), None)


OF_A_NET = {n: f for n, f in PUBLIC.items() if isinstance(f, FunctionType) and firsts(f) is pf.Adapted}


@pytest.mark.parametrize("name", OF_A_NET)
def test_an_adapter_for_a_net_is_refused(name: str) -> None:
    needed = [p for p in inspect.signature(OF_A_NET[name]).parameters.values() if p.default is p.empty]
    given = [made()[1] for p in needed if p.kind <= p.POSITIONAL_OR_KEYWORD]
    with pytest.raises(
        TypeError, match=r"peftfn\.adapt returns, not dict|takes \(net, adapter\), and the first is a dict"
    ):
        OF_A_NET[name](*given, **{p.name: 1 for p in needed if p.kind is p.KEYWORD_ONLY})


def test_functions_of_a_net_are_found() -> None:
    assert {"to_lora", "verify", "starts.eva", "steps.riemannian", "suggest.weight_ranks"} <= OF_A_NET.keys()


WORDS = {
    "set_adapter": r'm\.use_\("x"\) .*`with m\.use\("x"\)',
    "disable_adapter": r"with m\.use\(None\)",
    "add_adapter": r"as_module\(net, x=a, y=b\)",
    "load_adapter": r"peftfn\.load\(path, model\) .*peftfn\.attach_",
    "delete_adapter": r"peftfn\.detach_\(m, ",
    "disable_adapters": r"with m\.use\(None\).*m\.use_\(None\)",
    "enable_adapters": r'm\.use_\("x"\)',
    "active_adapters": r"peftfn\.status\(m\)",
    "get_adapter_state_dict": r"adapter_of\(m\).*peftfn\.state_dict\(net, a\)",
    "merge_and_unload": r"peftfn\.merged_model\(net, peftfn\.adapter_of\(m\)\)",
    "print_trainable_parameters": r"print\(peftfn\.status\(m\)\)",
}


@pytest.mark.parametrize("kind", ["a plain model", "a model of transformers"])
@pytest.mark.parametrize("word", WORDS)
def test_words_of_a_wrapped_model(word: str, kind: str) -> None:
    """transformers' models have some of these methods, which would look for adapters of another kind."""
    if kind == "a plain model":
        m = made()[2]
    else:
        net = pf.adapt(by_name["llama"].build(), {"q_proj": pf.LoRA(rank=2)})
        m = pf.as_module(net, net.init())
    with pytest.raises(AttributeError, match=WORDS[word]):
        getattr(m, word)("x")


@pytest.mark.parametrize("word", CURES)
def test_words_of_a_module_at_a_net(word: str) -> None:
    net = made()[0]
    assert not hasattr(net, word)
    with pytest.raises(AttributeError, match=rf"a net has no {word}: {re.escape(CURES[word])}"):
        getattr(net, word)


def test_words_of_transformers_and_peft_that_a_net_has_in_another_form() -> None:
    words = {"generate", "parameters", "save_pretrained", "merge_and_unload", "to", "train"}
    assert words <= CURES.keys()
    word = "zzz"
    with pytest.raises(AttributeError, match=r"^a net has no zzz$"):
        getattr(made()[0], word)


def test_what_they_say_to_write_exists() -> None:
    for cure in {**JAX, **OPTAX}.values():
        name = cure.split("(")[0].split(",")[0]
        where: Any = {"torch": torch, "peftfn": pf, "optree": optree, "net": made()[0]}
        head, *rest = name.split(".")
        thing = where[head] if head in where else getattr(pf.steps, head)
        for word in rest:
            thing = getattr(thing, word)
        assert callable(thing), name


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    assert not hasattr(pf, "zzz") and not hasattr(pf, "__zzz__")
