"""Bad input: each error names site, value, constraint and cure, comes before any work, and leaves everything usable."""

import dataclasses
import math
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Made, by_name, noise, tokens
from peft import LoraConfig
from support import close, everywhere, random, same_state, state
from torch import Tensor, nn

import peftfn as pf
from peftfn import IA3, OFT, DoRA, Full, LoHa, LoRA, VeRA
from peftfn.core.made import RESERVED
from peftfn.core.method import registry
from peftfn.methods.parts.allocation import Allocation
from peftfn.view.held import Leaf


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.o_proj = nn.Linear(6, 6, bias=False), nn.Linear(6, 9)
        self.norm, self.q_proj_norm = nn.LayerNorm(6), nn.LayerNorm(6)
        self.codes = nn.Parameter(torch.ones(4, 6, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj(self.norm(self.q_proj(x)))


RULES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unmatched": ({"q_porj": LoRA(2)}, ValueError, r"'q_porj'.*near.*q_proj"),
    "unmatched part": ({"proj": LoRA(2)}, ValueError, r"'proj'.*near.*_proj"),
    "unmatched regex": ({r"layers\.\d+": LoRA(2)}, ValueError, r"layers.*none"),
    "only taken sites": ({r"_proj\.w": LoRA(2), "o_proj": DoRA(2)}, ValueError, r"'o_proj'.*o_proj\.weight.*first"),
    "a word of targets": ({"all-linear": LoRA(2)}, ValueError, r"targets\(model, method, 'all-linear'\)"),
    "PEFT's": ({"q_proj": LoraConfig()}, TypeError, r"'q_proj' has a LoraConfig, which is PEFT's.*peftfn\.LoRA\(…\)$"),
    "no such kind": ({"norm": LoRA(2)}, ValueError, r"'norm'.*norm\.weight.*LoRA.*linear"),
    "no such kind of bias": ({r"bias$": OFT(2)}, ValueError, r"bias.*OFT"),
    "invalid regex": ({r"q_proj(": LoRA(2)}, ValueError, r"q_proj\(.*regular expression"),
    "no rules": ({}, ValueError, r"rules.*pattern"),
    "no method": ({"q_proj": 8}, TypeError, r"'q_proj'.*8.*LoRA"),
    "a class": ({"q_proj": LoRA}, TypeError, r"'q_proj'.*LoRA"),
    "block of input": ({"o_proj": OFT(4)}, ValueError, r"o_proj\.weight.*\[9, 6\].*4.*6.*choose.*3"),
    "block of output": ({"o_proj": OFT(2, side="output")}, ValueError, r"o_proj\.weight.*2.*9.*choose.*3"),
    "integer weight": ({"codes": LoRA(2)}, ValueError, r"codes.*int8.*floating"),
    "integer weight, full": ({"codes": Full()}, ValueError, r"codes.*int8.*floating"),
}


@pytest.mark.parametrize("name", RULES)
def test_bad_rules(name: str) -> None:
    rules, kind, match = RULES[name]
    model = Small()
    before = state(model)
    with pytest.raises(kind, match=match):
        pf.adapt(model, rules)
    with pytest.raises(kind, match=match):
        pf.adapt(model, {r"norm\.weight": Full(), **rules} if rules else rules)
    assert same_state(before, state(model))


def test_a_bias_on_a_layer_without_one() -> None:
    model, x = Small(), noise(3, 6)
    net = pf.adapt(model, {"q_proj": LoRA(2, lora_bias=True)})
    a = random(net)
    net.apply(a, x)
    with pytest.raises(ValueError, match=r"q_proj\.weight.*bias.*none.*apply"):
        net.merge(a)
    experts = by_name["mixtral"].build()
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj.*bias.*without"):
        pf.adapt(experts, {"experts.gate_up_proj": LoRA(2, lora_bias=True)})


HYPER: list[tuple[Callable[[], Any], str]] = [
    (lambda: LoRA(0), r"LoRA\.rank.*0.*>= 1"),
    (lambda: DoRA(-1), r"DoRA\.rank.*-1"),
    (lambda: VeRA(0), r"VeRA\.rank"),
    (lambda: LoHa(0), r"LoHa\.rank"),
    (lambda: LoRA(2.5), r"LoRA\.rank.*2\.5.*integer"),
    (lambda: LoRA(rank="8"), r"LoRA\.rank.*'8'"),
    (lambda: OFT(0), r"OFT\.block_size"),
    (lambda: OFT(2, terms=1), r"terms.*1.*>= 2"),
    (lambda: OFT(2, side="left"), r"OFT\.side.*'left'.*'input'"),
    (lambda: LoRA(2, dropout=1.0), r"LoRA\.dropout.*1\.0"),
    (lambda: LoRA(2, dropout=float("nan")), r"LoRA\.dropout.*nan"),
    (lambda: LoRA(2, alpha=float("nan")), r"LoRA\.alpha.*nan"),
    (lambda: LoRA(2, init_weights="zero"), r"LoRA\.init_weights.*'zero'.*'gaussian'"),
]


@pytest.mark.parametrize(("make", "match"), HYPER, ids=[m for _, m in HYPER])
def test_bad_hyper_parameters(make: Callable[[], Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        make()


def edit(adapter: Any, /, **leaf: Any) -> Any:
    old = adapter["q_proj.weight"]
    return adapter | {"q_proj.weight": {k: v for k, v in (old | leaf).items() if v is not None}}


LEAVES: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "shape": (lambda a: edit(a, a=torch.ones(3, 6)), ValueError, r"q_proj\.weight: a .*\[3, 6\].*\[2, 6\]"),
    "dims": (lambda a: edit(a, a=torch.ones(())), ValueError, r"q_proj\.weight: a .*\[\].*\[2, 6\]"),
    "a stack": (lambda a: pf.stack([a, a]), ValueError, r"\[2, .*stack.*(vmap|mixed)"),
    "integers": (lambda a: edit(a, a=torch.ones(2, 6).long()), ValueError, r"q_proj\.weight: a .*int64.*float"),
    "complex": (
        lambda a: edit(a, a=torch.ones(2, 6, dtype=torch.cfloat)),
        ValueError,
        r"q_proj\.weight: a .*complex",
    ),
    "a number": (lambda a: edit(a, a=1.0), (ValueError, TypeError), r"q_proj\.weight.*a .*tensor"),
    "an array": (
        lambda a: edit(a, a=torch.ones(2, 6).numpy()),
        (ValueError, TypeError),
        r"q_proj\.weight.*a .*tensor",
    ),
    "a bare tensor": (
        lambda a: a | {"q_proj.weight": torch.ones(2, 6)},
        (TypeError, ValueError),
        r"q_proj\.weight.*dict",
    ),
    "no leaf": (lambda a: a | {"q_proj.weight": None}, (TypeError, ValueError), r"q_proj\.weight.*dict"),
    "a missing tensor": (lambda a: edit(a, a=None), KeyError, r"q_proj\.weight.*\['b'\].*\['a', 'b'\]"),
    "an extra tensor": (lambda a: edit(a, c=torch.ones(2)), KeyError, r"q_proj\.weight.*'c'"),
    "an empty leaf": (lambda a: a | {"q_proj.weight": {}}, KeyError, r"q_proj\.weight"),
    "a missing site": (lambda a: {"norm.bias": a["norm.bias"]}, KeyError, r"q_proj\.weight.*init"),
    "an unknown site": (lambda a: a | {"q_porj.weight": a["q_proj.weight"]}, KeyError, r"q_porj.*near.*q_proj\.weight"),
    "a site of the model": (lambda a: a | {"o_proj.weight": a["q_proj.weight"]}, KeyError, r"o_proj\.weight"),
    "None": (lambda a: None, TypeError, r"adapter.*NoneType"),
    "a list": (lambda a: [a], TypeError, r"adapter.*list"),
}


STARTS: list[dict[str, Any]] = [{"seed": torch.Generator()}, {"seed": "0"}, {"dtype": "half"}, {"dtype": torch.int8}]


@pytest.mark.parametrize("options", STARTS, ids=["generator", "string", "dtype's name", "integers"])
def test_bad_starts(options: dict[str, Any]) -> None:
    """A generator's name is its address, so that a seed made of it would say nothing."""
    net = pf.adapt(Small(), {"q_proj": LoRA(2)})
    with pytest.raises(TypeError, match=rf"{next(iter(options))} is .*; give a"):
        net.init(**options)


@pytest.mark.parametrize("name", LEAVES)
def test_bad_leaves(name: str) -> None:
    spoil, kind, match = LEAVES[name]
    model, x = Small(), noise(3, 6)
    net = pf.adapt(model, {"q_proj": LoRA(2), "norm.bias": Full()})
    a, before = random(net), state(model)
    want, calls = net.apply(a, x), []
    model.register_forward_pre_hook(lambda m, x: calls.append(1))
    bad = spoil(a)
    for use in (lambda: net.apply(bad, x), lambda: net.merge(bad), lambda: net.delta(bad), lambda: net.prepare(bad)):
        with pytest.raises(kind, match=match):
            use()
    assert not calls, "the model ran"
    assert torch.equal(net.apply(a, x), want)
    assert same_state(before, state(model))


def test_a_prepared_leaf_of_the_wrong_shape() -> None:
    net = pf.adapt(Small(), {"o_proj": DoRA(2)})
    ready = net.prepare(random(net))
    ready["o_proj.weight"]["c"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"o_proj\.weight: c .*\[3\].*\[9\]"):
        net.apply(ready, noise(3, 6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_leaf_that_is_not_finite_on_merge(bad: float) -> None:
    net = pf.adapt(Small(), {"q_proj": LoRA(2), "norm": Full()})
    a = random(net)
    a["q_proj.weight"]["b"][0, 0] = bad
    with pytest.raises(ValueError, match=r"q_proj\.weight.*finite"):
        net.merge(a, check_finite=True)
    assert not net.merge(a)["q_proj.weight"].isfinite().all()
    assert all(t.isfinite().all() for n, t in net.merge(random(net), check_finite=True).items() if n != "codes")


def test_a_bias_that_is_not_finite_on_merge() -> None:
    net = pf.adapt(Small(), {"o_proj": IA3()})
    a = random(net)
    a["o_proj.weight"]["l"][0] = float("nan")
    with pytest.raises(ValueError, match=r"o_proj\.(weight|bias).*finite"):
        net.merge(a, check_finite=True)


def test_a_half_precision_overflow_on_merge() -> None:
    net = pf.adapt(Small().half(), {"q_proj": Full()})
    a = random(net)
    a["q_proj.weight"]["diff"][0, 0] = 1e30  # finite in fp32, not in fp16
    with pytest.raises(ValueError, match=r"q_proj\.weight.*finite"):
        net.merge(a, check_finite=True)


INDICES: list[tuple[Any, str]] = [
    ([0, 1, 2], r"row 2.*adapter 2.*2.*base"),
    ([0, -2, 1], r"row 1.*-2"),
    (torch.tensor([0, 1, 5]), r"row 2.*5"),
    ([0.0, 1.0, 0.0], r"index.*float.*integer"),
    (torch.tensor([[0, 1, 1]]), r"index.*\[1, 3\].*rows and tokens"),
    (torch.tensor([True, False, True]), r"index.*bool"),
    (torch.tensor(1), r"index.*\[\].*\[rows\]"),
    ([0, 1], r"index has 2 entries.*\[3, 6\].*row"),
    ([], r"row"),
]


@pytest.mark.parametrize(("index", "match"), INDICES, ids=[str(i) for i, _ in INDICES])
def test_bad_indices(index: Any, match: str) -> None:
    model = Small()
    net = pf.adapt(model, {"q_proj": LoRA(2)})
    many, x, before = pf.stack([random(net, 1), random(net, 2)]), noise(3, 6), state(model)
    with pytest.raises(ValueError, match=match):
        net.mixed(many, index, x)
    net.mixed(many, [0, 1, -1], x)
    assert same_state(before, state(model))


def test_mixed_wants_a_stack() -> None:
    net = pf.adapt(Small(), {"q_proj": LoRA(2)})
    a, b = random(net, 1), random(net, 2)
    with pytest.raises(ValueError, match=r"q_proj\.weight: .*'k'.*looks like one adapter.*peftfn\.stack\("):
        net.mixed(a, [0, 0, 0], noise(3, 6))
    with pytest.raises(TypeError, match=r"not list: give a stack, peftfn\.stack\(adapters\)"):
        net.mixed([a, b], [0, 0, 0], noise(3, 6))
    ragged = edit(pf.stack([a, b]), a=torch.stack([a["q_proj.weight"]["a"]] * 3))
    with pytest.raises(ValueError, match=r"stack.*\[2, 3\]"):
        net.mixed(ragged, [0, 0, 0], noise(3, 6))
    with pytest.raises(ValueError, match=r"q_proj\.weight.*(a|b).*rank"):
        pf.stack([a, pf.adapt(Small(), {"q_proj": LoRA(3)}).init()])
    with pytest.raises(ValueError, match=r"[qo]_proj"):
        pf.stack([a, pf.adapt(Small(), {"o_proj": LoRA(2)}).init()])
    with pytest.raises(ValueError, match="at least one"):
        pf.stack([])


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "convs", "whisper", "tied", "attention"])
def test_on_the_meta_device(name: str) -> None:
    case = by_name[name]
    real = case.build()
    with torch.device("meta"):
        model = case.make().eval()
    for method in (LoRA(2), DoRA(2), IA3(), Full(), VeRA(3), LoHa(2)):
        net, there = (pf.adapt(m, {case.linear: method}) for m in (model, real))
        a, b = net.init(), there.init()
        assert a.keys() == b.keys()
        for n, leaf in a.items():
            assert all(t.is_meta and t.shape == b[n][k].shape and t.dtype == b[n][k].dtype for k, t in leaf.items())
        merged = net.merge(a)
        assert all(merged[n].is_meta and merged[n].shape == p.shape for n, p in model.named_parameters())
        if name in ("convs", "tied", "attention"):  # transformers' masks ask a meta tensor for a value
            x = case.inputs(2)[0][0]
            y = net.apply(a, x.to("meta"))
            assert y.is_meta
            assert y.shape == there.apply(b, x).shape


def test_a_model_that_cannot_be_copied() -> None:
    model = Small()
    model.norm.guard = threading.Lock()
    with pytest.raises(TypeError, match=r"norm\.guard.*copied|copied.*norm\.guard"):
        pf.adapt(model, {"q_proj": LoRA(2)})
    del model.norm.guard
    net = pf.adapt(model, {"q_proj": LoRA(2)})
    a = random(net)
    want = net.apply(a, noise(3, 6))
    model.norm.guard = threading.Lock()
    with pytest.raises(TypeError, match=r"norm\.guard"):
        net.apply(a, noise(3, 6))
    del model.norm.guard
    assert torch.equal(net.apply(a, noise(3, 6)), want)


def test_no_module_and_lazy_modules() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module.*dict"):
        pf.adapt({}, {"q": LoRA()})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight.*(lazy|initiali[sz]ed)"):
        pf.adapt(nn.Sequential(nn.LazyLinear(4)), {"0": LoRA(2)})


def test_unknown_methods_and_params() -> None:
    net = pf.adapt(Small(), {"q_proj": LoRA(2)})
    a, x = random(net), noise(3, 6)
    with pytest.raises(AttributeError, match="genrate"):
        net.apply(a, x, method="genrate")
    with pytest.raises(KeyError, match=r"q_porj.*near.*q_proj"):
        net.apply(a, x, params={"q_porj.weight": noise(6, 6)})
    with pytest.raises(ValueError, match=r"q_proj\.weight.*\[5, 6\].*\[6, 6\]"):
        net.apply(a, x, params={"q_proj.weight": noise(5, 6)})
    close(net.apply(a, x, params={}), net.apply(a, x))


def test_scale_and_add() -> None:
    net = pf.adapt(Small(), {"q_proj": LoRA(2)})
    a = random(net)
    with pytest.raises(ValueError, match=r"scale.*int64"):
        pf.scale(a, torch.tensor(2))
    with pytest.raises(ValueError, match=r"add.*one"):
        pf.add()
    with pytest.raises(ValueError, match=r"q_proj\.weight.*scale"):
        net.apply(pf.scale(a, torch.ones(2)), noise(3, 6))
    with pytest.raises(ValueError, match=r"VeRA.*separate rule"):
        pf.chain(LoRA(2), VeRA(2))


def test_dropout_under_vmap_says_how() -> None:
    model = by_name["bert"].build().train()
    net = pf.adapt(model, {"query": LoRA(2, dropout=0.5)})
    ids, many = tokens(2), pf.stack([random(net, 1), random(net, 2)])
    with pytest.raises(RuntimeError, match=r"randomness"):
        torch.func.vmap(lambda a: net.apply(a, ids).last_hidden_state)(many)
    y = torch.func.vmap(lambda a: net.apply(a, ids).last_hidden_state, randomness="different")(many)
    assert y.isfinite().all()


# What a method's functions return: memory of their own, under names of their own.


@dataclasses.dataclass(frozen=True)
class _Gives(pf.Weight):
    """A method whose tensors are what `made` says: {function: tensors from (w, bias)}."""

    made: Any = dataclasses.field(default=None, compare=False)

    def init(self, rng: Any, w: Tensor) -> Any:
        return self.made.get("init", lambda w, b: {"a": torch.zeros_like(w, dtype=rng.dtype)})(w, rng.bias)

    def frozen(self, rng: Any, w: Tensor) -> Any:
        return self.made.get("frozen", lambda w, b: {})(w, rng.bias)

    def shared(self, rng: Any, weights: Any) -> Any:
        return {n: self.made.get("shared", lambda w, b: {})(w, None) for n, w in weights.items()}

    def bank(self, rng: Any, weights: Any) -> Any:
        return self.made.get("bank", lambda w, b: {})(next(iter(weights.values())), None)

    def delta(self, p: Any, w: Tensor) -> Tensor:
        return torch.zeros_like(w)


def twice(w: Tensor) -> dict[str, Tensor]:
    t = torch.zeros_like(w)
    return {"a": t, "b": t[:1]}


ALIASES: dict[str, tuple[str, Callable[[Tensor, Any], Any], str]] = {
    "w itself": ("init", lambda w, b: {"a": w}, "'a'.*the weight w"),
    "rows of w": ("init", lambda w, b: {"b": w[:2]}, "'b'.*the weight w"),
    "w turned": ("init", lambda w, b: {"a": w.mT}, "'a'.*the weight w"),
    "w in its own dtype": ("init", lambda w, b: {"a": w.float()}, "'a'.*the weight w"),
    "the bias": ("init", lambda w, b: {"a": b}, "'a'.*the layer's bias"),
    "one another": ("init", lambda w, b: twice(w), "'b'.*'a'"),
    "a constant of w": ("frozen", lambda w, b: {"c": w[0]}, "'c'.*the weight w"),
    "a constant of b": ("frozen", lambda w, b: {"c": b[1:]}, "'c'.*the layer's bias"),
    "shared, of w": ("shared", lambda w, b: {"s": w[:1]}, r"o_proj\.weight: s.*the weight o_proj"),
    "a bank of w": ("bank", lambda w, b: {"v": w[:1]}, r"'v'.*o_proj\.weight"),
}


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("place", ["meta", "values"])
def test_a_tensor_that_aliases_the_base(name: str, place: str) -> None:
    """Refused whether the meta device shows it, or only the run on the weight itself; and the base stays as it is."""
    function, make, match = ALIASES[name]

    def hidden(w, b):
        return {k: t.clone() for k, t in make(w, b).items()} if w.is_meta else make(w, b)

    method, model = _Gives({function: make if place == "meta" else hidden}), Small()
    before = state(model)
    with pytest.raises(ValueError, match=rf"_Gives\.{function} .*{match}.*clone"):
        pf.adapt(model, {"o_proj.weight": method}).init()
    assert same_state(before, state(model))


@pytest.mark.parametrize("name", ["of", "scale", "add.0", "two words", "a/b", "_a", "1", "", "training", "forward", 3])
@pytest.mark.parametrize("function", ["init", "frozen", "shared", "bank"])
def test_a_tensors_name(function: str, name: Any) -> None:
    """Names that a tree of the algebra, a file or a module needs for itself are refused when the plan is made."""
    with pytest.raises(
        ValueError, match=rf"o_proj\.weight \[9, 6\]: _Gives\.{function} names a tensor {name!r}.*choose"
    ):
        pf.adapt(Small(), {"o_proj.weight": _Gives({function: lambda w, b: {name: torch.zeros_like(w)}})})


def test_every_attribute_of_the_modules_leaves_is_refused_as_a_name() -> None:
    net = pf.adapt(Small(), {"o_proj": LoRA(2)})
    leaf = next(m for m in pf.as_module(net, net.init()).modules() if isinstance(m, Leaf))
    own = {k for k in [*vars(Leaf), *vars(leaf)] if not k.startswith("_")}
    assert not {k for k in own if k not in RESERVED and not hasattr(nn.Module, k)}


# Every method: settings that cannot be, and weights they do not fit.

OURS = [cls for cls in registry.values() if cls.__module__.startswith("peftfn.methods")]
CLASSES = [cls for cls in OURS if issubclass(cls, pf.Weight)]
CASES = [cls(**case) for cls in CLASSES for case in cls.cases]
BAD_VALUES = [float("nan"), float("inf"), -1, 0, 2.5, "zzz", [1], None, True, 2**40, 10**400]
CURE = re.compile(r"\b(give|choose|keep|use|split|raise|one rule a)\b|[<>]=? ?\w")


def fits_or_says(method: pf.Method, field: str = "", layer: tuple[int, int] = (5, 7)) -> None:
    """The method works on a weight of [layer[1], layer[0]]; or else adapt says why not, before it makes anything."""
    model, (in_, out) = nn.Sequential(nn.Linear(*layer)), layer
    with Made(in_ * out) as made:
        try:
            net = pf.adapt(model, {"weight": method})
        except ValueError as e:
            assert re.match(rf"0\.weight\b.*{type(method).__name__}\.{field}", str(e)), e
            assert re.search(rf"\b({out}|{in_}|{out * in_})\b", str(e)), f"names no size of the weight: {e}"
            assert CURE.search(str(e)), f"names no cure: {e}"
            assert not made.seen, f"{made.seen} before the error: {e}"
            return
    adapter = net.init()
    y = everywhere(net).apply(adapter, noise(2, in_))
    assert y.shape == (2, out)
    assert y.isfinite().all()
    assert all(t.isfinite().all() for leaf in adapter.values() for t in leaf.values())


@pytest.mark.parametrize("method", CASES, ids=str)
def test_a_weight_of_prime_sizes(method: pf.Method) -> None:
    fits_or_says(method)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_bad_values_of_every_field(cls: type[pf.Method]) -> None:
    for field in dataclasses.fields(cls):
        for bad in BAD_VALUES:
            try:
                method = cls(**{**cls.cases[0], field.name: bad})
            except ValueError as e:
                assert re.match(rf"{cls.__name__}\.\w+", str(e)), f"{field.name}={bad!r}: {e}"
                assert field.name in str(e), f"{field.name}={bad!r}: {e}"
                assert CURE.search(str(e)), f"names no cure: {e}"
                continue
            kept = getattr(method, field.name)
            assert kept is None or isinstance(kept, bool | int | tuple) or 0 <= abs(kept) < math.inf, (field.name, kept)
            fits_or_says(method, layer=(8, 6))


# Ranks above the matrix. Where the formula needs no smaller one they are legal, as in PEFT, whose files have them.

TOO_MUCH: dict[str, str] = {
    **dict.fromkeys(
        ("MiCA", "OLoRA", "OffsetLoRA", "PiSSA", "PSOFT", "TLoRA"), r"rank is 20, above in=5: give rank <= 5"
    ),
    "MiSS": r"rank is 20, above in=5: give rank <= 5",
    "MiSSBat": r"rank is 20, which does not divide out=7: choose",
    "OSF": r"rank is 20, which keeps 20 of 5 directions: keep 1 to 4",
    "SHiRA": r"rank is 20, so 240 entries, more than the 35 .*: choose rank <= 2",
}
RANKED = {cls.__name__: cls for cls in CLASSES if "rank" in {f.name for f in dataclasses.fields(cls)}}


def of_rank(cls: type[pf.Method], rank: int) -> pf.Method:
    """The method with settings that let any rank through on a weight [7, 5], but for the rank itself."""
    free: dict[str, dict[str, Any]] = {
        "BDLoRA": {"blocks": 1}, "GraLoRA": {"k": 1}, "QALoRA": {"group": 5}, "VBLoRA": {"length": 1, "topk": 2},
        "Poly": {"splits": 1},
    }  # fmt: skip
    return cls(**{**cls.cases[0], "rank": rank, **free.get(cls.__name__, {})})


@pytest.mark.parametrize("name", RANKED)
def test_ranks_above_the_matrix(name: str) -> None:
    method, model = of_rank(RANKED[name], 20), nn.Sequential(nn.Linear(5, 7)).eval()
    if name in TOO_MUCH:
        with pytest.raises(ValueError, match=rf"0\.weight.*{name}\.{TOO_MUCH[name]}"):
            pf.adapt(model, {"weight": method})
        return
    net, x = everywhere(pf.adapt(model, {"weight": method})), noise(3, 5)
    adapter = random(net)
    y = net.apply(adapter, x)
    assert y.isfinite().all()
    assert not torch.allclose(y, model(x))
    if method.mergeable:
        close(y, torch.func.functional_call(model, net.merge(adapter), (x,)))


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (pf.HRA(6, orthogonal=True), r"HRA\.rank is 6, above in=5: give rank <= 5"),
        (pf.KaSA(5, truncate=True), r"KaSA\.rank is 5.*give rank < 5"),
    ],
    ids=str,
)
def test_an_option_that_bounds_the_rank(method: pf.Method, match: str) -> None:
    with pytest.raises(ValueError, match=rf"0\.weight.*{match}"):
        pf.adapt(nn.Sequential(nn.Linear(5, 7)), {"weight": method})


def test_a_large_rank_of_deft_is_that_of_the_space() -> None:
    """As in PEFT, whose file of such a rank has the smaller tensors."""
    adapter = pf.adapt(nn.Linear(5, 7), {"weight": pf.DEFT(20)}).init()
    assert {k: list(t.shape) for k, t in adapter["weight"].items()} == {"p": [7, 7], "r": [7, 5]}
    assert "a larger rank is out" in (pf.DEFT.__doc__ or "")


def test_adaloras_target_above_its_rank_has_no_schedule() -> None:
    """PEFT's default target makes such files; they load, and only the allocator has no use for them."""
    method = pf.AdaLoRA(4, target_rank=9, total_steps=10)
    net = pf.adapt(nn.Linear(5, 7), {"weight": method})
    with pytest.raises(ValueError, match=r"target_rank=9.*target_rank <= rank"):
        Allocation.start(net, net.init())


class ColumnParallelLinear(nn.Module):
    """As Megatron-LM's: one process's rows of the weight, in a plain tensor."""

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.input_size, self.output_size, self.output_size_per_partition = 6, 8, 8 // parts
        self.weight = nn.Parameter(torch.ones(8 // parts, 6))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight), None


def test_a_part_of_a_weight_is_refused_and_a_whole_one_taken() -> None:
    model = nn.Sequential(ColumnParallelLinear(2))
    with pytest.raises(ValueError, match=r"^0\.weight: a ColumnParallelLinear has 4 of 8.*parallelize_module"):
        pf.adapt(model, {"0": LoRA(2)})
    net = pf.adapt(nn.Sequential(ColumnParallelLinear(1)), {"0": LoRA(2)})
    assert net.apply(net.init(), torch.ones(2, 6))[0].shape == (2, 8)


def test_parameters_that_zero_3_has_split_are_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 8))
    held: Any = model[0].weight
    held.ds_shape, held.data = held.shape, torch.empty(0)
    with pytest.raises(ValueError, match=r"^0\.weight: DeepSpeed's ZeRO-3 has split this parameter \[8, 6\].*FSDP2"):
        pf.adapt(model, {"0": LoRA(2)})
