"""What went wrong elsewhere with adapters on disk and by name: one test for each rule (SEMANTICS B3.1 and C6.5).

Rules with a test in the files beside this one have none here: P1, P2, P6, P10 to P12, P15, P19, P21, P23, P25 to P29
and C6.5 101 to 104, 106, 107, 119, 120 (test_formats.py, test_targets.py, test_peft_parity.py, test_compile.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from models import SMALL, by_name, noise, tokens
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from support import compare, randomised
from test_peft_parity import edit
from torch import Tensor, nn

import peftfn as pf
from peftfn.model.choice import matched
from peftfn.model.model import Model
from peftfn.testing import shaken
from peftfn.tools.targets import targets

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
TENSORS = "adapter_model.safetensors"
QV = ["q_proj", "v_proj"]


def llama(**options: Any) -> nn.Module:
    """The usual tiny llama; with options of its configuration, another."""
    if not options:
        return by_name["llama"].build()
    c = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL, **c, **options)).eval()


def classifier(kind: str) -> nn.Module:
    c = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    c |= {"max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(tf, f"{kind}ForSequenceClassification")(getattr(tf, f"{kind}Config")(**SMALL, **c)).eval()


def lora(r: int = 2, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=r, lora_alpha=3, **options)


def saved(folder: Path, base: nn.Module, config: peft.PeftConfig, seed: int = 3, **options: Any) -> nn.Module:
    """PEFT's random adapter, written to the folder."""
    model = randomised(peft.get_peft_model(base, config), seed)
    model.save_pretrained(folder, **options)
    return model


def two(folder: Path, base: nn.Module, first: peft.PeftConfig, second: peft.PeftConfig) -> nn.Module:
    """One PEFT model with two random adapters, A and B, written to the folders of these names."""
    model = randomised(peft.get_peft_model(base, first, adapter_name="A"))
    model.add_adapter("B", second)
    model.set_adapter("B")
    randomised(model, 4).save_pretrained(folder)
    return model


def logits(model: Callable[..., Any]) -> Tensor:
    with torch.no_grad():
        out = model(tokens(2))
    assert out.logits.isfinite().all()
    return out.logits


def same_outputs(loaded: Any, theirs: nn.Module, base: nn.Module) -> None:
    """What was loaded gives PEFT's outputs, and those are not the base's."""
    net, adapter = loaded
    want = logits(theirs)
    compare(logits(lambda x: net.apply(adapter, x)), want)
    assert (logits(base) - want).abs().max() > 1e-3


def modules(net: pf.Adapted, method: type[pf.Method] = pf.Method) -> set[str]:
    return {n.rpartition(".")[0] for n, e in net.plan.items() if isinstance(e.method, method)}


# Names that could find what an adapter put there.


@pytest.mark.parametrize("names", ["all-linear", r".*q_proj.*", ["q_proj"], lambda n: "lora_A" in n])
def test_an_adapters_own_layers_are_never_targeted(names: Any) -> None:
    """P3 to P5: in a model that PEFT has put its layers into, what finds one of them is an error, and not a LoRA of
    lora_A; other layers can be had."""
    model = peft.get_peft_model(llama(), lora(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj.*that PEFT put there.*merge_and_unload"):
        pf.adapt(model, targets(model, pf.LoRA(2), names))
    net = pf.adapt(model, targets(model, pf.LoRA(2), ["v_proj"]))
    assert len(net.plan) == 2
    compare(logits(lambda x: net.apply(net.init(), x)), logits(model.eval()))


@pytest.mark.parametrize("names", ["all-linear", r".*q_proj", ["q_proj"]], ids=str)
def test_a_parametrized_layer_is_not_left_out_in_silence(names: Any) -> None:
    """P5, for a module that holds adapters of ours."""
    net = pf.adapt(llama(), {"q_proj": pf.LoRA(2)})
    held = pf.as_module(net, net.init())
    with pytest.raises(ValueError, match=r"q_proj.*parametrized.*remove_parametrizations"):
        targets(held, pf.LoRA(2), names)


def added(config: peft.PeftConfig) -> nn.Module:
    """A model with adapters as transformers puts them in."""
    model = llama()
    model.add_adapter(config, "theirs")
    return model


def held(rules: dict[str, pf.Method]) -> nn.Module:
    net = pf.adapt(llama(), rules)
    return pf.as_module(net, net.init())


OCCUPIED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "get_peft_model": (
        lambda: peft.get_peft_model(llama(), lora(target_modules=["q_proj"])),
        r"0\.self_attn\.q_proj is",
    ),
    "add_adapter": (lambda: added(lora(target_modules=["q_proj"])), r"0\.self_attn\.q_proj is a Linear"),
    "as_module": (lambda: held({"q_proj": pf.LoRA(2)}), r"0\.self_attn\.q_proj.*as_module"),
    "inside": (
        lambda: nn.ModuleDict({"model": held({"q_proj": pf.LoRA(2)}).model}),
        r"0\.self_attn\.q_proj.*as_module",
    ),
    "a head": (lambda: added(lora(target_modules=["o_proj"], modules_to_save=["lm_head"])), r"o_proj is"),
    "prompts": (lambda: peft.get_peft_model(llama(), PROMPT), r"the model is a PeftModel"),
}
"""A model with adapters at q_proj, or elsewhere, and what the error says of it."""
PROMPT = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)


@pytest.mark.parametrize("how", OCCUPIED)
def test_a_model_that_holds_adapters_is_not_loaded_onto(how: str, tmp_path: Path) -> None:
    """A file is about the model without them: at other layers, too, its outputs would be others."""
    make, named = OCCUPIED[how]
    saved(tmp_path / "peft", llama(), lora(target_modules=["v_proj"]))
    net, adapter = pf.load(tmp_path / "peft", llama())
    pf.save(tmp_path / "native", net, adapter)
    pf.save(tmp_path / "swift", net, adapter, format="swift")
    pf.save(tmp_path / "kohya", net, adapter, format="kohya")
    for format in ("peft", "native", "swift", "kohya"):
        for strict in (True, False):
            with pytest.raises(ValueError, match=rf"load: .*{named}.*(unload|net\.model)"):
                pf.load(tmp_path / format, make(), strict=strict)
    with pytest.raises(ValueError, match="load: "):  # before any work: a file that is not there
        pf.load(tmp_path / "nothing", make())


def test_a_model_that_adapters_were_taken_out_of_is_loaded_onto(tmp_path: Path) -> None:
    theirs = saved(tmp_path, llama(), lora(target_modules=QV))
    want = logits(theirs)
    net, adapter = pf.load(tmp_path, theirs.unload())
    compare(logits(lambda x: net.apply(adapter, x)), want)


def test_a_module_that_peft_trains_whole_is_not_adapted() -> None:
    """Nor its copy: which of the two is active is PEFT's to say."""
    model = peft.get_peft_model(llama(), lora(target_modules=["o_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ValueError, match=r"lm_head is a ModulesToSaveWrapper that PEFT put there.*unload"):
        pf.adapt(model, {"lm_head": pf.LoRA(2)})


def test_modules_to_save_that_are_an_adapters_own_layers(tmp_path: Path) -> None:
    """P3, from a file: PEFT refuses to make it, we to read it."""
    with pytest.raises(TypeError, match="ModuleDict"):
        peft.get_peft_model(llama(), lora(target_modules=QV, modules_to_save=["lora_A"]))
    saved(tmp_path, llama(), lora(target_modules=QV))
    edit(tmp_path, modules_to_save=["lora_A"])
    with pytest.raises(ValueError, match=r"lacks 1 tensors: 'base_model\.model\.lora_A'"):
        pf.load(tmp_path, llama())


@pytest.mark.parametrize(
    "names", ["all-linear", r".*o_proj.*", r".*(q_proj|v_proj)", "model.layers.0.self_attn.q_proj", QV], ids=str
)
def test_a_second_adapter_finds_what_the_first_did(names: str | list[str], tmp_path: Path) -> None:
    """P4, P5, P14, C6.5 101: the base stays the base, however many adapters there are and in whatever form."""
    model = llama()
    theirs = two(tmp_path, llama(), lora(target_modules=names), lora(4, target_modules=names))
    first = set(matched(Model.of(model), names))
    assert first == {n.removeprefix("base_model.model.") for n in theirs.base_model.targeted_module_names}
    A, B = (pf.load(tmp_path / n, model) for n in "AB")
    held = pf.as_module(A.net, A=A.adapter, B=(B.net, B.adapter))
    assert set(matched(Model.of(model), names)) == modules(A.net) == modules(B.net) == first
    for name, loaded in (("A", A), ("B", B)):
        theirs.set_adapter(name)
        same_outputs(loaded, theirs, model)
        with held.use(name):
            compare(logits(held), logits(theirs))
    net = pf.adapt(model, targets(model, pf.LoRA(3), names))
    assert modules(net) == first
    # and a third on top of one: a chain at the very same sites
    chained = pf.adapt(model, targets(model, pf.chain(pf.LoRA(2), pf.LoRA(4)), names))
    assert modules(chained) == first


def test_all_linear_leaves_a_trained_head_alone(tmp_path: Path) -> None:
    """P7: PEFT trains a classifier's head whole, and so do we, with no LoRA in it."""
    theirs = saved(tmp_path, classifier("Bert"), lora(task_type="SEQ_CLS", target_modules="all-linear"))
    net, _ = loaded = pf.load(tmp_path, classifier("Bert"))
    assert modules(net, pf.Full) == {"classifier"} and "classifier" not in modules(net, pf.LoRA)
    assert modules(net) == {*matched(Model.of(net.model), "all-linear")}
    same_outputs(loaded, theirs, net.model)
    rules = {"classifier": pf.Full(), **targets(net.model, pf.LoRA(2), "all-linear", exclude=["classifier"])}
    assert pf.adapt(net.model, rules).plan.keys() == net.plan.keys()


def test_default_targets_leave_trained_modules_alone(tmp_path: Path) -> None:
    """P8: AdaLoRA's own choice, `dense`, is also the name of a layer in RoBERTa's head, which is trained whole."""
    config = peft.AdaLoraConfig(task_type="SEQ_CLS", init_r=3, target_r=2, total_step=10)
    theirs = saved(tmp_path, classifier("Roberta"), config)
    net, _ = loaded = pf.load(tmp_path, classifier("Roberta"))
    assert modules(net, pf.Full) == {"classifier.dense", "classifier.out_proj"}
    assert not any(m.startswith("classifier") for m in modules(net, pf.AdaLoRA))
    same_outputs(loaded, theirs, net.model)
    rules = {"classifier": pf.Full(), **targets(net.model, pf.AdaLoRA(3))}
    assert pf.adapt(net.model, rules).plan.keys() == net.plan.keys()


def test_a_layer_is_adapted_or_trained_whole_not_both(tmp_path: Path) -> None:
    """P9: PEFT cannot say both; neither can a file, and what would need both is not written."""
    with pytest.raises(ValueError, match="No modules were targeted"):
        peft.get_peft_model(llama(), lora(target_modules=["o_proj"], modules_to_save=["o_proj"]))
    saved(tmp_path, llama(), lora(target_modules=["o_proj"]))
    edit(tmp_path, modules_to_save=["o_proj"])
    with pytest.raises(ValueError, match=r"lacks 2 tensors: .*o_proj"):
        pf.load(tmp_path, llama())
    model = llama()
    with pytest.raises(ValueError, match=r"'lm_head' never applies.*lm_head\.weight first"):
        pf.adapt(model, {"q_proj|lm_head": pf.LoRA(2), "lm_head": pf.Full()})
    layers = nn.ModuleDict({n: nn.Linear(3, 3) for n in ("lin", "my_lin")})  # PEFT takes modules to save by their ends
    net = pf.adapt(layers, {r"^lin\.": pf.Full(), r"^my_lin\.weight": pf.LoRA(1)})
    with pytest.raises(ValueError, match="PEFT saves whole modules, and my_lin also have another method"):
        pf.save(tmp_path / "no", net, net.init(), format="peft")
    assert not (tmp_path / "no").exists()


# Embeddings, and what is trained whole.


def resized(model: nn.Module) -> nn.Module:
    """Its embedding trained by other means, as where tokens were added: PEFT then has to save it whole."""
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1 * noise(*model.get_input_embeddings().weight.shape))
    return model


@pytest.mark.parametrize("trained", [False, True], ids=["as the base", "trained"])
def test_embeddings_that_a_regular_expression_targets_are_saved_whole(trained: bool, tmp_path: Path) -> None:
    """P16: whole beside its LoRA. A mere copy of the base's is no adapter; one that differs is."""
    base = resized(llama()) if trained else llama()
    theirs = saved(tmp_path, base, lora(target_modules=r".*embed_tokens"))
    assert any(k.endswith("embed_tokens.base_layer.weight") for k in load_file(tmp_path / TENSORS))
    net, _ = loaded = pf.load(tmp_path, llama())
    want = pf.chain(pf.Full(), pf.LoRA(2, alpha=3)) if trained else pf.LoRA(2, alpha=3)
    (entry,) = net.plan.values()
    assert (entry.site.name, type(entry.method)) == ("model.embed_tokens.weight", type(want))
    same_outputs(loaded, theirs, net.model)


def test_embeddings_that_no_expression_targets_are_not_saved(tmp_path: Path) -> None:
    """P16, the other half."""
    theirs = saved(tmp_path, llama(), lora(target_modules=r".*q_proj"))
    assert not any("embed" in k for k in load_file(tmp_path / TENSORS))
    same_outputs(pf.load(tmp_path, llama()), theirs, llama())


class Table(nn.Module):
    """An embedding under a name of its own, which only get_input_embeddings tells, and a head."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table, self.mid, self.out = nn.Embedding(24, 8), nn.Linear(8, 8), nn.Linear(8, 24)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, ids: Tensor) -> Any:
        return tf.modeling_outputs.CausalLMOutput(logits=self.out(torch.tanh(self.mid(self.table(ids)))))


@pytest.mark.parametrize("trained", [False, True], ids=["as the base", "trained"])
def test_embeddings_under_any_name_that_are_saved_whole(trained: bool, tmp_path: Path) -> None:
    """C6.5 116."""
    base = resized(Table()) if trained else Table()
    theirs = saved(tmp_path, base, lora(target_modules=["mid"]), save_embedding_layers=True)
    assert "base_model.model.table.weight" in load_file(tmp_path / TENSORS)
    net, _ = loaded = pf.load(tmp_path, Table())
    assert modules(net, pf.Full) == ({"table"} if trained else set())
    same_outputs(loaded, theirs, Table())


@pytest.mark.parametrize("tie", [False, True], ids=["head left", "head follows"])
def test_a_tied_embedding_trained_whole(tie: bool, tmp_path: Path) -> None:
    """C6.5 117: whether the head follows its embedding is what PEFT's model does, both in files and in rules."""
    make = lambda: llama(tie_word_embeddings=True)  # noqa: E731
    config = lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=tie)
    theirs = saved(tmp_path, make(), config)
    net, adapter = loaded = pf.load(tmp_path, make())
    same_outputs(loaded, theirs, make())
    embed, head = (net.merge(adapter, untied=True)[n] for n in ("model.embed_tokens.weight", "lm_head.weight"))
    assert torch.equal(embed, head) == tie


@pytest.mark.parametrize("head", [[3], [5], [3, 4]], ids=str)
def test_trained_tokens_of_a_head_and_the_embedding_it_is_tied_to(head: list[int], tmp_path: Path) -> None:
    """PEFT trains the same tokens as one, and writes the embedding's alone; other tokens stay apart."""
    make = lambda: llama(tie_word_embeddings=True)  # noqa: E731
    tokens = {"embed_tokens": [3], "lm_head": head}
    theirs = saved(tmp_path / "theirs", make(), lora(target_modules=["q_proj"], trainable_token_indices=tokens))
    net, adapter = loaded = pf.load(tmp_path / "theirs", make())
    assert modules(net, pf.TiedTokens) == ({"model.embed_tokens", "lm_head"} if head == [3] else set())
    same_outputs(loaded, theirs, make())
    pf.save(tmp_path / "mine", net, adapter, format="peft")
    same_outputs(loaded, peft.PeftModel.from_pretrained(make(), tmp_path / "mine").eval(), make())


@pytest.mark.parametrize("rule", ["embed_tokens", "embed_tokens|lm_head"])
def test_tokens_that_peft_would_tie_are_not_written_apart(rule: str, tmp_path: Path) -> None:
    for rules in ({rule: pf.TrainableTokens((3,))}, {rule: pf.TrainableTokens((3,)), "q_proj": pf.LoRA(2)}):
        net = pf.adapt(llama(tie_word_embeddings=True), rules)
        with pytest.raises(ValueError, match=r"embed_tokens.*lm_head.*TiedTokens"):
            pf.save(tmp_path, net, net.init(), format="peft")
    assert not list(tmp_path.iterdir())


def test_modules_to_save_that_the_model_lacks(tmp_path: Path) -> None:
    """P17: as a rule, as a target, and in a file, which PEFT writes and reads without a word. The names that PEFT adds
    by itself, for a head that the model may not have, are no error."""
    model = llama()
    with pytest.raises(ValueError, match=r"'nope' matches none of the model's"):
        pf.adapt(model, {"q_proj": pf.LoRA(2), "nope": pf.Full()})
    with pytest.raises(ValueError, match=r"'nope', which matches no module"):
        targets(model, pf.LoRA(2), ["nope"])
    theirs = saved(tmp_path, llama(), lora(target_modules=QV, modules_to_save=["nope"]))
    with pytest.raises(ValueError, match=r"lacks 1 tensors: 'base_model\.model\.nope'.*strict=False"):
        pf.load(tmp_path, model)
    loaded = pf.load(tmp_path, model, strict=False)
    assert (loaded.missing, loaded.unexpected) == (("base_model.model.nope",), ())
    same_outputs(loaded, theirs, model)
    edit(tmp_path, modules_to_save=["classifier", "score"], task_type="SEQ_CLS")
    same_outputs(pf.load(tmp_path, model), theirs, model)


@pytest.mark.parametrize(
    ("given", "name"), [({"nope": [1]}, "nope"), ({"embed_tokens": [1]}, "embed_tokens"), ([1], "")]
)
def test_trained_tokens_that_are_not_there(given: Any, name: str, tmp_path: Path) -> None:
    """P17: of a module that the model lacks, and tensors that the file lacks."""
    if name == "nope":
        with pytest.raises(ValueError, match="nope"):
            peft.get_peft_model(llama(), lora(target_modules=QV, trainable_token_indices=given))
    saved(tmp_path, llama(), lora(target_modules=QV))
    edit(tmp_path, trainable_token_indices=given)
    with pytest.raises(ValueError, match=rf"lacks 1 tensors.*{name}.*\.token_adapter\.trainable_tokens_delta"):
        pf.load(tmp_path, llama())


# Starts that change the base weight.


@pytest.mark.parametrize("rslora", [False, True], ids=["", "rslora"])
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_in_the_base_that_was_converted(start: str, rslora: bool, tmp_path: Path) -> None:
    """PEFT writes it as the difference to where it started: a plain LoRA of twice the rank for the base as it was."""
    config = lora(target_modules=QV, init_lora_weights=start, use_rslora=rslora)
    theirs = peft.get_peft_model(llama(), config)
    config.init_lora_weights = True  # as PEFT's documentation says, for the start alone
    theirs.save_pretrained(tmp_path / "start")
    config.init_lora_weights = start
    randomised(theirs)
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    net, adapter = loaded = pf.load(tmp_path / "end", llama())
    assert {(type(e.method), e.method.rank) for e in net.plan.values()} == {(pf.LoRA, 4)}
    same_outputs(loaded, theirs, llama())
    pf.save(tmp_path / "mine", net, adapter, format="peft")
    same_outputs(loaded, peft.PeftModel.from_pretrained(llama(), tmp_path / "mine").eval(), llama())


# Which layers a file's keys mean.


def test_keys_of_parameters_mean_nothing_without_their_names(tmp_path: Path) -> None:
    """P18, C6.5 110: PEFT's keys do not say which parameter of a module they belong to, so its configuration must.
    Ours say."""
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    make = by_name["mixtral"].build
    theirs = saved(tmp_path / "peft", make(), lora(target_modules=[], target_parameters=experts))
    net, adapter = loaded = pf.load(tmp_path / "peft", make())
    same_outputs(loaded, theirs, make())
    pf.save(tmp_path / "native", net, adapter)
    keys = [k for k in load_file(tmp_path / "native" / "adapter.safetensors") if k.startswith("adapter/")]
    assert {k.split("/")[1].rpartition("mlp.")[2] for k in keys} == {*experts}
    edit(tmp_path / "peft", target_parameters=None)
    with pytest.raises(ValueError, match=r"no place in this model.*experts"):
        pf.load(tmp_path / "peft", make())


def test_keys_alone_say_which_layers_are_adapted(tmp_path: Path) -> None:
    """C6.5 109: and their values are loaded with them."""
    theirs = saved(tmp_path, llama(), lora(target_modules=r".*\.1\.(self_attn\.q|mlp\.up)_proj"))
    edit(tmp_path, target_modules=None)
    net, _ = loaded = pf.load(tmp_path, llama())
    assert modules(net) == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    same_outputs(loaded, theirs, llama())


@pytest.mark.parametrize("order", ["AB", "BA"])
def test_a_file_does_not_tell_what_other_adapters_there_were(order: str, tmp_path: Path) -> None:
    """P20, P22, P24, C6.5 118: each of two adapters of one model has its own tensors, and copies of its own modules
    only, counted once; so does the same adapter made alone."""
    configs = {
        "A": lora(target_modules=QV, modules_to_save=["lm_head"]),
        "B": lora(4, target_modules=["v_proj", "embed_tokens"], modules_to_save=["model.norm"], use_dora=True),
    }
    first, second = order
    theirs = peft.get_peft_model(llama(), configs[first], adapter_name=first)
    theirs.add_adapter(second, configs[second])
    for seed, name in enumerate(order):
        theirs.set_adapter(name)
        randomised(theirs, seed)
    theirs.save_pretrained(tmp_path)
    model, own = llama(), {"A": {"lm_head"}, "B": {"model.norm"}}
    for name, config in configs.items():
        alone = peft.get_peft_model(llama(), config)
        alone.save_pretrained(tmp_path / "alone")
        assert load_file(tmp_path / name / TENSORS).keys() == load_file(tmp_path / "alone" / TENSORS).keys()
        net, adapter = loaded = pf.load(tmp_path / name, model)
        assert (loaded.missing, loaded.unexpected) == ((), ())
        assert modules(net, pf.Full) == own[name]
        trained = sum(p.numel() for n, p in alone.named_parameters() if p.requires_grad)
        assert sum(t.numel() for leaf in adapter.values() for t in leaf.values()) == trained
        theirs.set_adapter(name)
        same_outputs(loaded, theirs, model)


def test_nested_wrappers_do_not_depend_on_the_order_of_names(tmp_path: Path) -> None:
    """P20: PEFT nests one wrapper in another for two parameters of a module, in the module's order, not the list's."""
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    make = by_name["mixtral"].build
    for i, names in enumerate((experts, experts[::-1])):
        theirs = saved(tmp_path / f"{i}", make(), lora(target_modules=[], target_parameters=names))
        net, adapter = loaded = pf.load(tmp_path / f"{i}", make())
        same_outputs(loaded, theirs, make())
        pf.save(tmp_path / f"mine {i}", net, adapter, format="peft")
        a, b = (load_file(tmp_path / n / TENSORS) for n in (f"{i}", f"mine {i}"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_many_layers_of_which_some_scale_their_inputs(tmp_path: Path) -> None:
    """P13: PEFT shortens a long list of names, and IA3's feedforward_modules must still be a part of it."""
    make: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
        *(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(12))
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = make().state_dict()
    model, other = make(), make()
    model.load_state_dict(state)
    other.load_state_dict(state)
    net = pf.adapt(model, {r"\d\.0\.weight": pf.IA3(feedforward=True), r"\d\.2\.weight": pf.IA3()})
    adapter, x = shaken(net.init(), 1), noise(3, 4)
    pf.save(tmp_path, net, adapter, format="peft")
    theirs = peft.PeftModel.from_pretrained(other, tmp_path).eval()
    assert len(theirs.base_model.targeted_module_names) == len(net.plan) == 24
    with torch.no_grad():
        compare(net.apply(adapter, x), theirs(x))
        assert (model(x) - theirs(x)).abs().max() > 1e-3
    assert {n: e.method for n, e in pf.load(tmp_path, model).net.plan.items()} == {
        n: e.method for n, e in net.plan.items()
    }


# Into a model that is there already.


def test_nothing_loaded_is_left_without_values(tmp_path: Path) -> None:
    """C6.5 108: also where PEFT makes its layers on the meta device before it loads what we wrote."""
    model = llama()
    net = pf.adapt(model, {"q_proj": pf.DoRA(2), "lm_head": pf.Full(), "embed_tokens": pf.TrainableTokens((3, 7))})
    adapter = shaken(net.init(), 1)
    pf.save(tmp_path, net, adapter, format="peft")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=True).eval()
    assert not any(p.is_meta for p in theirs.parameters())
    other, again = loaded = pf.load(tmp_path, model)
    assert not any(t.is_meta for leaf in again.values() for t in leaf.values())
    assert not any(t.is_meta for e in other.plan.values() for t in e.frozen.values())
    same_outputs(loaded, theirs, model)


def test_hot_swapping_an_adapter_with_fewer_layers_and_ranks(tmp_path: Path) -> None:
    """C6.5 111: as PEFT's hot swap, and as a fresh load: layers that the new one lacks are as in the base."""
    saved(tmp_path / "B", llama(), lora(2, target_modules=["q_proj"]), seed=4)
    theirs = saved(tmp_path / "A", llama(), lora(4, target_modules=QV))
    model = llama()
    A, B = (pf.load(tmp_path / n, model) for n in "AB")
    held = pf.as_module(A.net, A.adapter)
    compare(logits(held), logits(theirs))
    storage = [p.data_ptr() for p in held.parameters()]
    hotswap_adapter(theirs, str(tmp_path / "B"), "default")
    pf.copy_(held, pf.conform(B.adapter, B.net, A.net))
    compare(logits(held), logits(theirs))
    same_outputs(B, held, model)
    assert [p.data_ptr() for p in held.parameters()] == storage  # test_module.py: so nothing is compiled anew


def test_hot_swapping_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    """C6.5 111: new layers, and another method."""
    saved(tmp_path / "A", llama(), lora(target_modules=["q_proj"]))
    saved(tmp_path / "more", llama(), lora(target_modules=QV))
    saved(tmp_path / "loha", llama(), peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    model = llama()
    A = pf.load(tmp_path / "A", model)
    held = pf.as_module(A.net, A.adapter)
    before = logits(held)
    for name, message in (("more", r"v_proj.*does not adapt this site"), ("loha", r"q_proj.*LoHa.*LoRA")):
        other = pf.load(tmp_path / name, model)
        with pytest.raises(ValueError, match=message):
            pf.conform(other.adapter, other.net, A.net)
        with pytest.raises((KeyError, ValueError), match=r"v_proj|has no"):
            pf.copy_(held, other.adapter)
    assert torch.equal(logits(held), before)


def test_two_methods_in_one_model(tmp_path: Path) -> None:
    """C6.5 112, 114: in PEFT's mixed model both must be set, and it cannot be saved; a plan has both active, and is
    saved in one file."""
    configs = {"A": lora(target_modules=QV), "B": peft.LoHaConfig(r=3, alpha=2, target_modules=["q_proj", "up_proj"])}
    for seed, (name, config) in enumerate(configs.items()):
        saved(tmp_path / name, llama(), config, seed)
    theirs = peft.PeftMixedModel.from_pretrained(llama(), str(tmp_path / "A"), adapter_name="A")
    theirs.load_adapter(str(tmp_path / "B"), adapter_name="B")
    theirs.set_adapter(["A", "B"])
    theirs.eval()
    model = llama()
    A, B = (pf.load(tmp_path / n, model) for n in "AB")
    a, b = A.net.plan["model.layers.0.self_attn.q_proj.weight"].method, next(iter(B.net.plan.values())).method
    net = pf.adapt(model, {"q_proj": pf.chain(a, b), "v_proj": a, "up_proj": b})
    adapter = {}
    for name, entry in net.plan.items():
        parts = [part.adapter[name] for part in (A, B) if name in part.adapter]
        chained = {f"{i}.{k}": t for i, leaf in enumerate(parts) for k, t in leaf.items()}
        adapter[name] = chained if len(parts) == 2 else parts[0]
        assert adapter[name].keys() == entry.spec.keys()
    same_outputs((net, adapter), theirs, model)
    with pytest.raises(NotImplementedError):
        theirs.save_pretrained(str(tmp_path / "mixed"))
    pf.save(tmp_path / "mixed", net, adapter)
    same_outputs(pf.load(tmp_path / "mixed", model), theirs, model)
    with pytest.raises(ValueError, match="q_proj"):
        pf.save(tmp_path / "peft", net, adapter, format="peft")


def test_a_prompt_beside_a_lora_is_loaded_too(tmp_path: Path) -> None:
    """C6.5 113: what was loaded before stays as it was."""
    theirs = saved(tmp_path / "A", llama(), lora(target_modules=QV))
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(llama(), prompt).save_pretrained(tmp_path / "prompt")
    model = llama()
    loaded = pf.load(tmp_path / "A", model)
    assert type(pf.load(tmp_path / "prompt", model).net.plan["model"].method) is pf.PromptTuning
    assert pf.load_all(tmp_path, model).keys() == {"A", "prompt"}
    same_outputs(loaded, theirs, model)


def test_status_of_a_partly_frozen_adapter() -> None:
    """C6.5 115: neither trainable nor frozen, as PEFT's "irregular"; the others' states are plain."""
    model = llama()
    net = pf.adapt(model, {"q_proj": pf.LoRA(2)})
    held = pf.as_module(net, A=net.init(0), B=net.init(1))
    one = next(n for n, p in held.named_parameters() if p.requires_grad and ".A." in n)
    held.get_parameter(one).requires_grad_(False)
    assert {a.name: (a.active, a.trainable) for a in pf.status(held).adapters} == {
        "A": (True, None),
        "B": (False, True),
    }
    theirs = peft.get_peft_model(llama(), lora(target_modules=["q_proj"]))
    next(p for p in theirs.parameters() if p.requires_grad).requires_grad_(False)
    assert theirs.get_model_status().requires_grad == {"default": "irregular"}
