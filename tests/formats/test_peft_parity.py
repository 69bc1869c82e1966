"""Live parity with the installed PEFT, for every registered method that says how PEFT writes it."""

import dataclasses
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import by_name
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from support import compare, randomised
from torch import Tensor, nn
from torch.func import functional_call

import peftfn as pf
from peftfn.core.method import Method, registry
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_table as table
from peftfn.formats.peft_keys import PeftNames, tensors
from peftfn.model.model import Model
from peftfn.testing import shaken
from peftfn.testing.models import IN, OUT

pytestmark = [
    # PEFT warns where a name holds an embedding, that it saves it whole; about a base without a name; and of its own
    # calls into transformers and torch
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # PEFT looks for a pattern's keys among modules only, and applies them to parameters all the same
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
METHODS = [
    cls(**case)
    for cls in registry.values()
    if cls.__module__.startswith("peftfn.methods") and "peft" in vars(cls) and cls.peft is not None
    if cls.peft.type != "POLY"  # whose layers PEFT calls with the task of each row: test_poly.py
    for case in cls.cases
]


def outputs_differ(method: Method, layer: str) -> str | None:
    """Why PEFT's outputs are not what its method means here, and what we do instead. Its file is loaded, and PEFT's
    outputs are shown to differ: the day it mends them, the line here must go."""
    conv = layer.startswith("conv")
    match method.peft.type:
        case "OFT" if conv:
            return "PEFT's forward differs from its own merge (PEERS.md 2.7, 2); we compute what it merges"
        case "HRA" | "BOFT" if layer == "conv2, uneven":
            return "PEFT takes stride[0] and padding[0] for all sides (PEERS.md 2.7, 3)"
        case "TRAINABLE_TOKENS" if layer == "linear":
            return "PEFT drops a Linear's bias (PEERS.md 2.7, 5); we keep it"
    return None


def dense(method: Method, layer: str) -> bool:
    """Whether PEFT's change is none that the method has, so that it is read as a whole weight: its LoKr with a whole
    second factor at Conv1d pairs other axes than LyCORIS and we do."""
    return method.peft.type == "LOKR" and layer == "conv1" and method.decompose_factor == -1 and not method.tucker


def crashes(method: Method, layer: str) -> bool:
    """Whether PEFT fails in its own forward: its Tucker form in one dimension views what is not contiguous."""
    return method.peft.type == "LOKR" and layer == "conv1" and method.tucker


def gradients_differ(method: Method, layer: str) -> str | None:
    """Why PEFT's gradients are not those of its outputs."""
    written = method.peft.written(method)
    if method.peft.type == "LOHA" and written.get("use_effective_conv2d") and layer.startswith("conv"):
        return "PEFT's backward of the Tucker form is wrong for both w_a (its forward's own gradient differs)"
    if written.get("coft"):
        return "PEFT projects q in place, outside of the gradient; we differentiate the projection"
    if written.get("feedforward_modules") and layer.startswith("conv"):
        return "PEFT's IA3 scales input channels; ours scales every column of the window, so it has more gradients"
    if not method.exact_gradient and method.peft.type != "LORA":
        return "gradients of this method hold something constant"
    return None


def file_differs(method: Method, layer: str) -> str | None:
    """Why PEFT's file is not what its configuration says. Loading it must be an error, never another adapter."""
    written = method.peft.written(method)
    if written.get("use_qalora"):
        return (
            "PEFT pools groups at GPTQ layers only; elsewhere its QA-LoRA is a plain LoRA, under the same configuration"
        )
    if written.get("init_lora_weights") == "olora" and layer == "linear_t":
        return "PEFT factors Conv1D's weight untransposed, and crashes or writes a wrong shape (PEERS.md 2.7, 4)"
    if written.get("config_A_B") == "none" and layer == "linear, no bias":
        return "PEFT switches C, D and E off where there is no bias, so nothing is left"
    return None


class Layers(nn.Module):
    """A layer of each kind, in a row; those a test does not adapt are there to be left alone."""

    def __init__(self, layer: nn.Module, alone: bool, size: int = IN):
        super().__init__()
        self.first, self.weight_default, self.alone = nn.Linear(size, size), layer, alone

    def forward(self, x: Tensor) -> Tensor:
        return self.weight_default(x if self.alone else torch.tanh(self.first(x)))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(IN, OUT), lambda: torch.randn(3, IN)),
    "linear, no bias": (lambda: nn.Linear(IN, OUT, bias=False), lambda: torch.randn(3, 2, IN)),
    "linear_t": (lambda: _conv1d(), lambda: torch.randn(3, 2, IN)),
    "embedding": (lambda: nn.Embedding(IN, OUT), lambda: torch.randint(0, IN, (3, 4))),
    "conv1": (lambda: nn.Conv1d(4, OUT, 2, stride=2, padding=1), lambda: torch.randn(3, 4, 7)),
    "conv2": (lambda: nn.Conv2d(2, OUT, 2, stride=2, padding=1), lambda: torch.randn(3, 2, 5, 5)),
    "conv2, uneven": (lambda: nn.Conv2d(2, OUT, 2, stride=(1, 2), padding=(0, 1)), lambda: torch.randn(3, 2, 5, 5)),
    "linear, odd": (lambda: nn.Linear(15, 7), lambda: torch.randn(3, 15)),
    "linear_t, odd": (lambda: _conv1d(15, 7), lambda: torch.randn(3, 2, 15)),
    "conv3": (lambda: nn.Conv3d(2, OUT, (1, 2, 2), stride=1, padding=(0, 1, 1)), lambda: torch.randn(3, 2, 2, 5, 5)),
}


def _conv1d(in_: int = IN, out: int = OUT) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(out, in_)
    nn.init.normal_(layer.bias)
    return layer


def build(layer: str, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Layers(LAYERS[layer][0](), layer[:4] in ("embe", "conv"), 15 if "odd" in layer else IN).eval()


def rows(method: Method, many: int) -> int:
    """Of a batch: PEFT's Lily averages its router over all of them (PEERS.md 2.7, 13), ours over each row's own
    positions, so one is compared."""
    return 1 if method.peft.type == "LILY" else many


def config(method: Method, target: str, layer: str) -> peft.PeftConfig:
    """PEFT's configuration of a method, made by the method alone. target: names, with "|" between them."""
    written, names = json.loads(json.dumps(method.peft.written(method))), target.split("|")
    if "feedforward_modules" in written:
        written["feedforward_modules"] = names[-1:] if written["feedforward_modules"] else []
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[method.peft.type]
    known = set(cls.__dataclass_fields__)
    assert written.keys() <= known, f"PEFT has no {written.keys() - known}"
    if "fan_in_fan_out" in known and layer == "linear_t":
        written["fan_in_fan_out"] = True
    return cls(target_modules=names, **written)


def round_trip(
    folder: Path,
    method: Method,
    base: Callable[[], nn.Module],
    target: str,
    layer: str,
    call: Callable[[Any], Tensor],
) -> None:
    try:
        theirs = randomised(peft.get_peft_model(base(), config(method, target, layer)))
    except (ValueError, AttributeError, ZeroDivisionError):
        with pytest.raises(ValueError, match=target):  # what PEFT does not take, we do not write
            written(folder, base(), {rf"({target})\.weight": method})
        return
    theirs.save_pretrained(folder / "theirs")
    model = base()
    if file_differs(method, layer):
        with pytest.raises(ValueError, match=r"needs|does not|no place|activated"):
            pf.load(folder / "theirs", model)
        return
    net, adapter = pf.load(folder / "theirs", model)
    plain = layer == "embedding" and isinstance(method.peft.written(method).get("init_lora_weights"), str)
    read_as = pf.Full if dense(method, layer) else pf.LoRA if plain else type(method)
    assert {type(m) for m in net.plan.rules.values()} == {read_as}
    if net.plan.gated:  # by token ids, which these have not: tests/slots/test_acting.py compares what it does
        written_again(folder, net, adapter, theirs, base())
        return
    if crashes(method, layer):
        with pytest.raises(RuntimeError, match="view"):
            call(theirs)
        means(net, adapter, call)
        return
    want = call(theirs)
    if dense(method, layer):
        compare(call(lambda *a, **k: net.apply(adapter, *a, **k)), want)
        with pytest.raises(ValueError, match=rf"{target}.*pairs the wrong axes"):
            written(folder, base(), {rf"({target})\.weight": method})
        return
    if outputs_differ(method, layer):
        does_what_it_means(net, adapter, theirs, call)
        return
    assert (call(model) - want).abs().max() > 1e-3, "the adapter does nothing"
    leaves = {n: {k: t.clone().requires_grad_() for k, t in leaf.items()} for n, leaf in adapter.items()}
    got = call(lambda *a, **k: net.apply(leaves, *a, **k))
    compare(got, want)

    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    trained = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    if not gradients_differ(method, layer):
        same_gradients(net, leaves, trained)

    pf.save(folder / "mine", net, adapter, format="peft")
    again = peft.PeftModel.from_pretrained(base(), folder / "mine").eval()
    compare(call(again), want)
    compare(call(lambda *a, **k: net.apply(adapter, *a, **k)), want)


def written_again(folder: Path, net: pf.Adapted, adapter: Any, theirs: Any, base: nn.Module) -> None:
    """PEFT reads from our file the tensors and the invocation that it wrote."""
    pf.save(folder / "mine", net, adapter, format="peft")
    again = peft.PeftModel.from_pretrained(base, folder / "mine")
    tokens = [m.peft_config["default"].alora_invocation_tokens for m in (again, theirs)]
    assert tokens[0] == tokens[1] and tokens[0]
    got, want = (peft.get_peft_model_state_dict(m) for m in (again, theirs))
    assert got.keys() == want.keys()
    for key in want:
        compare(got[key], want[key])


def means(net: pf.Adapted, adapter: Any, call: Callable[[Any], Tensor]) -> None:
    """apply is the plain model with the weight w + delta."""
    merged = net.merge(adapter)
    compare(
        call(partial(net.apply, adapter)),
        call(lambda *a, **k: functional_call(net.model, merged, a, k, tie_weights=False)),
    )


def does_what_it_means(net: pf.Adapted, adapter: Any, theirs: Any, call: Callable[[Any], Tensor]) -> None:
    """PEFT's outputs really differ, and ours are those of the weight w + delta; of an OFT, what PEFT itself merges."""
    with torch.no_grad():
        got, want = call(partial(net.apply, adapter)), call(theirs)
        same = got.shape == want.shape and (got - want).abs().max() <= 1e-4 * max(1.0, float(want.abs().max()))
        assert not same, "PEFT is right here: say so"
        (kind,) = {type(m) for m in net.plan.rules.values()}
        means(net, adapter, call)
        if kind is pf.OFT:
            compare(got, call(theirs.merge_and_unload()))


def written(folder: Path, model: nn.Module, rules: dict[str, Method]) -> None:
    net = pf.adapt(model, rules)
    pf.save(folder, net, net.init(), format="peft")


def same_gradients(net: pf.Adapted, leaves: Any, trained: dict[str, Tensor]) -> None:
    """Gradients of the leaves, in PEFT's layout, against those of PEFT's parameters."""
    model, seen, alive = PeftNames(Model.of(net.model)), 0, False
    parts = r"\.(default|base_layer|modules_to_save|ln_tuning_layers)(?=\.)"
    copies = {re.sub(parts, "", n).removeprefix("base_model.model."): g for n, g in trained.items()}
    parameters = [n for n, e in net.plan.items() if e.site.stacked]
    for name, entry in net.plan.items():
        if isinstance(entry.method, pf.Full):
            if copies[name] is not None:  # BERT's pooler has no part in what is compared
                compare(entry.site.original(leaves[name]["diff"].grad), copies[name], 1e-4)
                alive |= bool(copies[name].any())
            seen += 1
            continue
        place = model.written(entry.site, parameters)
        grads = {k: t.grad for k, t in ((leaves[entry.bank] if entry.bank else {}) | leaves[name]).items()}
        here = tensors(place, entry.method, {**entry.frozen, **{k: torch.zeros_like(g) for k, g in grads.items()}})
        for key, g in tensors(place, entry.method, {**entry.frozen, **grads}).items():
            g = g - here[key]  # PEFT may train a constant of ours and the leaf as one sum
            head, _, tail = f"base_model.model.{place.path}.{key}".partition(".weight")
            hits = [
                n
                for n in trained
                if n.replace(".default", "") in (head + ".weight" + tail, head + tail, f"{head}{tail}.weight")
            ]
            if place.twice:  # PEFT adds B A twice here, one of them without a gradient
                seen += 1
            elif hits and trained[hits[0]] is not None:
                compare(g.reshape(trained[hits[0]].shape), trained[hits[0]], 1e-4)
                alive |= bool(trained[hits[0]].any())
                seen += 1
    banks = {k: t.grad for b in net.plan.banks for k, t in leaves[b].items()}
    assert seen or banks
    assert alive or any(g.any() for g in banks.values()), "zeros were compared with zeros"


def expressible(method: Method) -> bool:
    """Whether PEFT has these hyper-parameters; test_layer sees that saving is an error otherwise."""
    try:
        method.peft.written(method)
    except ValueError:
        return False
    return True


def supported(method: Method, layer: str) -> bool:
    """Whether PEFT has the method for this layer at all; with which options, the test finds out."""
    return (
        layer.startswith("linear,")
        or layer.partition(",")[0] in f"linear {table.MORE.get(method.peft.type, '')}".split()
    )


def still(method: Method, layer: str) -> bool:
    """Whether the method cannot do anything there: the divisor of 15 that PEFT takes for 2 is 1, and 1 × 1 blocks are
    no rotation."""
    return layer == "linear, odd" and method == pf.OFT(2)


@pytest.mark.parametrize(
    ("method", "layer"), [(m, k) for m in METHODS for k in LAYERS if supported(m, k) and not still(m, k)], ids=str
)
def test_layer(method: Method, layer: str, tmp_path: Path) -> None:
    kind = layer.removesuffix(", odd")
    if not expressible(method):
        net = pf.adapt(build(kind), {"weight_default.weight": method})
        with pytest.raises(ValueError, match=type(method).__name__):
            pf.save(tmp_path, net, net.init(), format="peft")
        return
    with torch.random.fork_rng():
        torch.manual_seed(1)
        x = LAYERS[layer][1]()
    x = x[: rows(method, len(x))]
    round_trip(tmp_path, method, lambda: build(layer), "weight_default", kind, lambda m: m(x))


MODELS = {
    "llama": ("linear, no bias", "q_proj"),
    "gpt2": ("linear_t", "c_attn"),
    "bert": ("linear", "query"),
    "t5": ("linear, no bias", "q"),
    "vit": ("linear", "fc1"),
    "whisper": ("linear", "q_proj"),
    "gemma3": ("linear, no bias", "q_proj"),
}
FIRST = {type(m): m for m in reversed(METHODS) if expressible(m)}.values()


@pytest.mark.parametrize(
    ("method", "name"),
    [(m, n) for m in METHODS for n in ("llama", "gpt2") if supported(m, MODELS[n][0]) and expressible(m)]
    + [(m, n) for m in FIRST for n in ("bert", "t5", "vit", "whisper", "gemma3")],
    ids=str,
)
def test_model(method: Method, name: str, tmp_path: Path) -> None:
    case, (layer, target) = by_name[name], MODELS[name]
    args, kwargs = case.inputs(rows(method, 2))
    round_trip(tmp_path, method, case.build, target, layer, lambda m: case.output(m(*args, **kwargs)))


@pytest.mark.parametrize("method", [m for m in METHODS if expressible(m)], ids=str)
def test_targets_of_several_shapes(method: Method, tmp_path: Path) -> None:
    case, targets = by_name["llama"], "q_proj|v_proj|o_proj|down_proj"
    args, kwargs = case.inputs(1)
    round_trip(tmp_path, method, case.build, targets, "linear, no bias", lambda m: case.output(m(*args, **kwargs)))


def test_clusters_that_rounding_errors_make_are_not_read(tmp_path: Path) -> None:
    """AdaMSS with r >= out: PEFT clusters equally distant rows, and its file has only how many are in each."""
    theirs = peft.get_peft_model(build("linear"), peft.AdamssConfig(target_modules=["weight_default"], r=OUT))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"weight_default.*rounding errors.*space < {OUT}"):
        pf.load(tmp_path, build("linear"))


# What a configuration can say besides its method.


def both_ways(folder: Path, name: str, config: peft.PeftConfig, batch: int = 2) -> Any:
    """PEFT's random adapter, loaded here and written back; (net, adapter) of it."""
    case = by_name[name]
    theirs = randomised(peft.get_peft_model(case.build(), config))
    theirs.save_pretrained(folder / "theirs")
    args, kwargs = case.inputs(batch)
    model = case.build()
    before = {n: p.clone() for n, p in model.named_parameters()}
    net, adapter = pf.load(folder / "theirs", model)
    leaves = {n: {k: t.clone().requires_grad_() for k, t in leaf.items()} for n, leaf in adapter.items()}
    got, want = case.output(net.apply(leaves, *args, **kwargs)), case.output(theirs(*args, **kwargs))
    compare(got, want)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(5))
    (got * weight).sum().backward()
    (want * weight).sum().backward()
    if not any(leaf.keys() & {"0.diff"} for leaf in adapter.values()):
        same_gradients(net, leaves, {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad})
    with torch.no_grad():
        want = want.detach()
        assert (case.output(model(*args, **kwargs)) - want).abs().max() > 1e-3
        pf.save(folder / "mine", net, adapter, format="peft")
        again = peft.PeftModel.from_pretrained(case.build(), folder / "mine").eval()
        compare(case.output(again(*args, **kwargs)), want)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    return net, adapter


LORA = {"r": 2, "lora_alpha": 3}
PROPORTIONAL = {"proportional_parameters": True}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("llama", "LoraConfig", dict(target_modules="all-linear", **LORA)),
        ("llama", "LoraConfig", dict(target_modules=r".*\.1\..*(q|v)_proj", **LORA)),
        ("llama", "LoraConfig", dict(target_modules=["q_proj", "v_proj"], layers_to_transform=[1], **LORA)),
        ("llama", "LoraConfig", dict(target_modules=["q_proj"], modules_to_save=["lm_head", "norm"], **LORA)),
        ("llama", "LoraConfig", dict(target_modules=["q_proj", "embed_tokens"], **LORA)),
        ("llama", "LoraConfig", dict(target_modules=["q_proj"], trainable_token_indices=[3, 7, 20], **LORA)),
        ("llama", "LoraConfig", dict(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5]}, **LORA)),
        ("llama", "LNTuningConfig", {"target_modules": ["norm", "input_layernorm"]}),
        ("llama", "VeraConfig", {"target_modules": ["q_proj", "down_proj"], "r": 3, "save_projection": False}),
        (
            "llama",
            "IA3Config",
            {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
        ),
        ("llama", "HiraConfig", {"target_modules": ["q_proj", "v_proj"], "r": 2, "rank_pattern": {"v_proj": 3}}),
        ("llama", "UniLoraConfig", {"target_modules": ["q_proj"], "r": 2, "theta_d_length": 20}),
        ("llama", "UniLoraConfig", {"target_modules": ["q_proj"], "r": 2, "theta_d_length": 20, "save_indices": True}),
        ("llama", "RandLoraConfig", {"target_modules": ["v_proj", "o_proj"], "r": 2, "save_projection": False}),
        ("llama", "OFTConfig", {"target_modules": ["q_proj"], "oft_block_size": 4, "modules_to_save": ["lm_head"]}),
        ("bert", "LoraConfig", dict(target_modules=["query", "value"], bias="lora_only", **LORA)),
        ("bert", "LoraConfig", dict(target_modules=["query"], bias="all", **LORA)),
        ("mixtral", "LoraConfig", dict(target_modules=[], target_parameters=EXPERTS, **LORA)),
        ("mixtral", "LoraConfig", dict(target_modules=["q_proj"], target_parameters=EXPERTS[:1], **LORA)),
        (
            "gpt_oss",
            "LoraConfig",
            dict(target_modules=[], target_parameters=EXPERTS, alpha_pattern={".*gate_up_proj": 5}, **LORA),
        ),
        ("gemma3", "LoraConfig", dict(target_modules=["embed_tokens"], **LORA)),
        ("t5", "LoraConfig", dict(target_modules=["q", "wo"], **LORA)),
        ("vit", "LoraConfig", dict(target_modules=["projection", "dense"], **LORA)),
        (
            "vit",
            "IA3Config",
            {"target_modules": ["projection", "output.dense"], "feedforward_modules": ["output.dense"]},
        ),
        ("whisper", "LoraConfig", dict(target_modules=["k_proj", "q_proj", "fc1"], **LORA)),
        ("whisper", "LoHaConfig", {"target_modules": ["out_proj", "q_proj"], "r": 2}),
        (
            "gpt2",
            "LoraConfig",
            dict(target_modules=["c_attn", "mlp.c_proj"], fan_in_fan_out=True, use_dora=True, **LORA),
        ),
        ("gpt2", "IA3Config", {"target_modules": ["c_attn"], "feedforward_modules": [], "fan_in_fan_out": True}),
        ("gpt2", "VeraConfig", {"target_modules": ["c_attn"], "r": 3, "fan_in_fan_out": True}),
        ("bert", "LoKrConfig", {"target_modules": ["query", "output.dense"], "r": 2, "decompose_both": True}),
        ("bert", "LNTuningConfig", {"target_modules": ["LayerNorm"]}),
        ("t5", "IA3Config", {"target_modules": ["k", "v", "wo"], "feedforward_modules": ["wo"]}),
        ("t5", "OFTConfig", {"target_modules": ["q", "v"], "oft_block_size": 4}),
        ("gemma3", "LoraConfig", dict(target_modules="all-linear", use_rslora=True, **LORA)),
        (
            "llama",
            "TinyLoraConfig",
            {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 12, "u": 3},
        ),  # 8, 12, 12
        # block sizes that divide one of the two sides, and none: PEFT moves them to a divisor
        ("llama", "OFTConfig", {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 6}),
        ("llama", "OFTConfig", {"target_modules": ["q_proj", "down_proj"], "oft_block_size": 0, "r": 5}),
        ("llama", "OFTConfig", {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}),
        ("mixtral", "LoraConfig", dict(target_modules="all-linear", **LORA)),
        ("attention", "LoraConfig", dict(target_modules=["packed"], **LORA)),
        ("bert", "AdamssConfig", {"target_modules": ["query", "output.dense"], "r": 8, "subspace_rank": 2}),
        (
            "vit",
            "AdamssConfig",
            {"target_modules": ["fc1"], "r": 6, "num_subspaces": 3, "subspace_rank": 3, "use_dynamic_rank": True},
        ),
        ("bert", "FrodConfig", {"target_modules": ["query", "output.dense"], "sparse_rate": 0.05}),
        ("t5", "FrodConfig", {"target_modules": ["q", "wo"], "projection_prng_key": 3}),
        ("llama", "FrodConfig", {"target_modules": ["q_proj", "down_proj"], "save_projection": False}),
        ("llama", "WaveFTConfig", {"target_modules": ["q_proj", "up_proj"], "n_frequency": 30, **PROPORTIONAL}),
    ],
)
def test_options(name: str, config: str, options: dict[str, Any], tmp_path: Path) -> None:
    both_ways(tmp_path, name, getattr(peft, config)(**options))


@pytest.mark.parametrize("only", [False, True], ids=["all", "only"])
@pytest.mark.parametrize("kind", table.BIAS)
def test_biases_beside_every_method_that_can_train_them(kind: str, only: bool, tmp_path: Path) -> None:
    """UniLoRA's tensors are all shared, so that a bias is all that its file has of a layer."""
    first = {"ADALORA": pf.AdaLoRA(3, total_steps=10), "PVERA": pf.PVeRA(3)}
    method = first.get(kind) or next(m for m in FIRST if m.peft.type == kind)
    settings = config(method, "query", "linear")
    settings.bias = table.BIAS[kind] if only else "all"
    net, _ = both_ways(tmp_path, "bert", settings)
    trained = {n for n, e in net.plan.items() if isinstance(e.method, pf.Full) or "Full" in str(e.method)}
    every = {n for n, _ in net.model.named_parameters() if n.endswith("bias")}
    assert trained == ({n for n in every if "query" in n} if only else every)
    written = json.loads((tmp_path / "mine" / "adapter_config.json").read_text())
    assert written["bias"] == settings.bias


def test_the_types_that_can_train_biases_are_pefts() -> None:
    fields = {k: {f.name: f for f in dataclasses.fields(c)} for k, c in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert table.BIAS.keys() == {k for k in table.DEFAULTS if "bias" in fields[k]}
    for kind, only in table.BIAS.items():
        bias = fields[kind]["bias"]
        assert only in f"{bias.type} {bias.metadata.get('help')}"


def test_types_without_biases_say_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"LOHA cannot train biases.*query\.bias"):
        written(tmp_path, by_name["bert"].build(), {r"query\.weight": pf.LoHa(2), r"query\.bias": pf.Full()})


# Lily's layers share by the name in target_modules that finds them, and by shape.


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("targets", "rules"),
    [
        (["q_proj"], 1),
        (["k_proj", "v_proj"], 2),  # of one shape
        (["q_proj", "v_proj"], 2),  # of two
        (["up_proj", "self_attn.o_proj"], 2),
        (r".*\.(q|o|v)_proj", 2),
        ("all-linear", 14),  # PEFT writes every layer's own name, so nothing is shared
    ],
    ids=str,
)
def test_layers_that_share_experts(targets: Any, rules: int, stride: int, tmp_path: Path) -> None:
    options = peft.LilyConfig(target_modules=targets, r=2, num_B=3, stride_A=stride)
    net, adapter = both_ways(tmp_path, "llama", options, batch=1)
    assert len(net.plan.rules) == len(net.plan.banks) == rules
    assert {e.method for e in net.plan.values()} == {pf.Lily(2, 3, stride)}
    _, shapes = pf.load(tmp_path / "theirs", by_name["llama"].build().to("meta"))
    assert {n: {k: t.shape for k, t in leaf.items()} for n, leaf in shapes.items()} == {
        n: {k: t.shape for k, t in leaf.items()} for n, leaf in adapter.items()
    }
    assert {t.device.type for leaf in shapes.values() for t in leaf.values()} == {"meta"}


@pytest.mark.parametrize(("key", "stride"), [("lily_A", 2), ("lily_B", 1)])
def test_copies_of_what_layers_share_are_compared(key: str, stride: int, tmp_path: Path) -> None:
    options = peft.LilyConfig(target_modules=["q_proj", "v_proj"], r=2, stride_A=stride)
    peft.get_peft_model(by_name["llama"].build(), options).save_pretrained(tmp_path)
    name = f"base_model.model.model.layers.1.self_attn.v_proj.{key}.weight"
    retensor(tmp_path, lambda t: t[name].add_(1))
    with pytest.raises(ValueError, match=f"{name} differs from other layers' copies"):
        pf.load(tmp_path, by_name["llama"].build())


@pytest.mark.parametrize(
    ("rules", "targets"),
    [
        ([r"(q|o)_proj"], ".*"),
        ([r"layers\.0\..*q_proj", r"layers\.1\..*q_proj"], ["model.layers.0.self_attn.q_proj"]),
        ([r"q_proj", r"(k|v)_proj"], ".*"),
    ],
    ids=str,
)
def test_rules_that_share_experts_are_written_so_that_they_do(rules: list[str], targets: Any, tmp_path: Path) -> None:
    model = by_name["llama"].build()
    net = pf.adapt(model, {rule: pf.Lily(2, stride=2) for rule in rules})
    adapter = shaken(net.init(), 1)
    pf.save(tmp_path, net, adapter, format="peft")
    written = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    assert isinstance(written, str) if isinstance(targets, str) else set(written) > set(targets)
    again = pf.load(tmp_path, model)
    assert len(again.net.plan.rules) == len(rules)
    args, kwargs = by_name["llama"].inputs(1)
    want = net.apply(adapter, *args, **kwargs).logits
    compare(again.net.apply(again.adapter, *args, **kwargs).logits, want)
    compare(peft.PeftModel.from_pretrained(by_name["llama"].build(), tmp_path).eval()(*args, **kwargs).logits, want)


def test_one_rule_for_each_method_that_patterns_make(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 3, "v_proj": 4}, "alpha_pattern": {"1.*v_proj": 5}}
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True, **LORA, **patterns)
    net, _ = both_ways(tmp_path, "llama", config)
    assert len(net.plan.rules) == 4
    assert sorted((e.method.rank, e.method.alpha) for e in net.plan.values()) == [(2, 3), (3, 3), (4, 3), (4, 5)]


@pytest.mark.parametrize(
    ("key", "name", "hit"),
    [
        ("foo", "foo", True), ("foo", "module.foo", True), ("foo", "module.module.foo", True),
        ("foo", "module.foobar", False), ("foo", "module.module.barfoo", False),
        ("^foo", "foo", True), ("^foo", "module.foo", False), ("^module.foo", "module.foo", True),
        ("^module.foo", "module.module.foo", False), ("module.foo", "module.foo", True),
        ("module.foo", "module.module.foo", True), (r"m\w+\.foo", "module.foo", True), ("foo|bar", "a.bar", True),
    ],
)  # fmt: skip
def test_pattern_truth_table(key: str, name: str, hit: bool) -> None:
    assert configs.matcher(key, Path("x"))(name) == hit


def test_our_defaults_are_pefts() -> None:
    for kind, mine in table.DEFAULTS.items():
        fields = {f.name: f for f in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[kind])}
        for key, value in mine.items():
            f = fields[key]
            assert value == (f.default_factory() if f.default is dataclasses.MISSING else f.default), (kind, key)


# Files that must be refused, each with one line that names file and key.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = peft.get_peft_model(by_name["llama"].build(), peft.LoraConfig(target_modules=["q_proj"], **LORA))
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v != "gone"}))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "num_virtual_tokens is None"),
        ({"peft_type": "NOVEL"}, "no method"),
        ({"peft_type": "gone"}, "peft_type"),
        ({"r": 3}, "lora_A.weight has shape"),
        ({"r": "2"}, "r is '2'"),
        ({"r": 10**12}, "r is 1000000000000"),
        ({"r": -1}, "rank"),
        ({"lora_alpha": float("inf")}, "not finite"),
        ({"kasa_config": 7}, "KaSA|kasa"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"something_new": 5}, "something_new"),
        ({"rank_pattern": {"(a*){999999999}": 3}}, "too long"),
        ({"rank_pattern": {"(?<=a)b": 3}}, "not allowed in files"),
        ({"target_modules": "(a*){999999999}"}, "too long"),
        ({"target_modules": [3]}, "target_modules"),
        ({"rank_pattern": {"(": 3}}, "regular expression"),
        ({"rank_pattern": 3}, "rank_pattern"),
        ({"modules_to_save": [3]}, "modules_to_save"),
        ({"use_dora": True}, "lacks"),
    ],
    ids=str,
)
def test_bad_configurations(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message) as e:
        pf.load(folder, by_name["llama"].build())
    assert "adapter_" in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(A), "lacks"),
        (lambda t: t.update({"base_model.model.nowhere.lora_A.weight": t[A].clone()}), "no place"),
        (lambda t: t.update({A.removeprefix("base_model.model."): t[A].clone()}), "same tensor"),
        (lambda t: t.update({A: t[A].mT.contiguous()}), "has shape"),
        (lambda t: t.update({A: t[A].int()}), "floating"),
        (lambda t: t[A].view(-1)[3:4].fill_(float("nan")), "NaN"),
        (lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.zeros(30, 16)}), "resize_token"),
        (lambda t: t.clear(), "no adapter"),
    ],
)
def test_bad_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    retensor(folder, change)
    with pytest.raises(ValueError, match=message) as e:
        pf.load(folder, by_name["llama"].build())
    assert "adapter_model.safetensors" in str(e.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"peft_type": "LORA", "peft_type": "LORA"}', "[" * 100000, '"x"'])
def test_bad_json(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match="adapter_config"):
        pf.load(folder, by_name["llama"].build())


def test_a_truncated_file(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a valid safetensors"):
        pf.load(folder, by_name["llama"].build())


def test_a_pickle_is_not_opened(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickle"):
        pf.load(folder, by_name["llama"].build())


def test_a_minimal_configuration(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"], "r": 2}))
    net, _ = pf.load(folder, by_name["llama"].build())
    assert {(m.rank, m.alpha) for m in net.plan.rules.values()} == {(2, 8)}  # PEFT's default, not ours


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"q_proj": pf.LoRA(2), "v_proj": pf.IA3()}, "q_proj.*v_proj|one method"),
        ({"q_proj": pf.chain(pf.LoRA(2), pf.IA3())}, "q_proj"),
        ({"q_proj": pf.LoRA(2), "v_proj": pf.LoRA(2, rslora=True)}, "use_rslora.*v_proj"),
        ({"embed_tokens": pf.LoHa(2)}, "embed_tokens.*does not take"),
        ({"0.self_attn.q_proj": pf.FRoD(), "1.self_attn.q_proj": pf.FRoD()}, "1.self_attn.q_proj.*use one rule"),
        ({"q_proj": pf.AdaMSS()}, "space < 16"),
        ({rf"{n}\..*(q|o)_proj": pf.Lily(2) for n in (0, 1)}, r"0.*q\|o.*1.*q\|o.*one rule for each such name"),
    ],
)
def test_what_peft_cannot_say(rules: dict[str, Method], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        written(tmp_path, by_name["llama"].build(), rules)
    assert not list(tmp_path.iterdir())


# Methods whose tensors PEFT makes from the base again when it loads a file.


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize("method", [pf.FRoD(0.05), pf.AdaMSS(space=6, rank=2)], ids=str)
def test_a_fresh_adapter_that_follows_from_the_base(method: Method, tmp_path: Path) -> None:
    case = by_name["bert"]
    net = pf.adapt(case.build(), {r"(query|output\.dense)\.weight": method})
    adapter = shaken(net.init(), 1)
    pf.save(tmp_path, net, adapter, format="peft")
    theirs = peft.PeftModel.from_pretrained(case.build(), tmp_path).eval()
    args, kwargs = case.inputs(2)
    got, base = (case.output(f(*args, **kwargs)) for f in (lambda *a, **k: net.apply(adapter, *a, **k), net.model))
    compare(got, case.output(theirs(*args, **kwargs)))
    assert (got - base).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        (pf.AdaMSS(6, 2), lambda t, at: t.pop(f"{at}adamss_B.1"), "lacks.*adamss_B.1"),
        (pf.AdaMSS(6, 2), lambda t, at: t.pop(f"{at}adamss_newB"), "lacks.*adamss_newB"),
        (pf.AdaMSS(6, 2), lambda t, at: t.update({f"{at}adamss_A.2": torch.ones(1, 6)}), "no place.*adamss_A.2"),
        (
            pf.AdaMSS(6, 2),
            lambda t, at: t.update({f"{at}adamss_B.0": torch.ones(1, 1)}),
            "adamss_B.0 do not fit.*base model",
        ),
        (pf.AdaMSS(6, 2), lambda t, at: t.update({f"{at}adamss_A.0": torch.ones(1, 6).int()}), "must be floating"),
        (
            pf.FRoD(0.05),
            lambda t, at: t.pop("base_model.frod_V.self_attn_q_proj"),
            "lacks 1 tensors: 'base_model.frod_V.self_attn_q_proj'",
        ),
        (pf.FRoD(0.05), lambda t, at: t["base_model.frod_s_indices.self_attn_q_proj"].add_(16), "beyond"),
        (pf.FRoD(0.05), lambda t, at: t.update({f"{at}frod_lambda_l": torch.ones(1)}), "does not fit"),
        (pf.FRoD(0.05), lambda t, at: t.update({f"{at}frod_lambda_s_values": torch.ones(3)}), "needs"),
    ],
)
def test_bad_tensors_that_follow_from_the_base(
    method: Method, change: Callable[[dict[str, Tensor], str], Any], message: str, tmp_path: Path
) -> None:
    written(tmp_path, by_name["llama"].build(), {"q_proj": method})
    retensor(tmp_path, lambda t: change(t, A.removesuffix("lora_A.weight")))
    with pytest.raises(ValueError, match=message) as e:
        pf.load(tmp_path, by_name["llama"].build())
    assert "adapter_model.safetensors" in str(e.value)
