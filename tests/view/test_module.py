"""as_module: for every method and kind of site it is net.apply, and it does what an nn.Module does."""

import copy
import dataclasses
import gc
import io
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch
from models import CASES, Case, by_name, noise
from support import CHAINS, FIRST, METHODS, random, same_state, state
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import peftfn as pf
from peftfn import IA3, DoRA, Full, LoRA, Method, VBLoRA, VeRA
from peftfn.core.made import RESERVED
from peftfn.model.names import matches
from peftfn.testing import Case as MethodCase
from peftfn.testing import close, leaves, models_for
from peftfn.view.held import Leaf
from peftfn.view.module import parameters_of


def flat(net: pf.Adapted, a: Any, case: Case) -> Tensor:
    args, kwargs = case.inputs(2)
    return case.output(net.apply(a, *args, **kwargs))


def called(m: Any, case: Case) -> Tensor:
    args, kwargs = case.inputs(2)
    return case.output(m(*args, **kwargs))


def weighted(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()


def trained(tree: Any) -> Any:
    """A copy of an adapter whose tensors require gradients."""
    return {k: trained(v) for k, v in tree.items()} if isinstance(tree, dict) else tree.detach().requires_grad_()


def gradients(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: gradients(v) for k, v in tree.items()}
    return torch.zeros_like(tree) if tree.grad is None else tree.grad


def same(a: Any, b: Any) -> None:
    close(a, b, "as_module", 1e-5)


# Laws, for every method and kind of site.


@pytest.mark.parametrize("method", FIRST, ids=str)
def test_the_module_is_apply(method: Method) -> None:
    """The adapter that comes back, what trains, and the base, whose bits and versions stay; the law of routes has the
    outputs and gradients at every kind of site."""
    for name in models_for(method)[:2]:
        case = MethodCase(method, name)
        before, a = state(case.model), case.adapter()
        m = pf.as_module(case.net, a)
        same(m(case.x), case.net.apply(a, case.x))
        b = trained(a)
        weighted(case.net.apply(b, case.x)).backward()
        weighted(m(case.x)).backward()
        same(gradients(parameters_of(m)), gradients(b))
        assert all(p.grad is None for p in m.parameters() if not p.requires_grad)
        assert sum(p.requires_grad for p in m.parameters()) == len(leaves(a))
        assert all(torch.equal(x, y) for x, y in zip(leaves(pf.adapter_of(m)), leaves(a), strict=True))
        with m.use(None):
            same(m(case.x), case.model(case.x))
        assert same_state(before, state(case.model))


@pytest.mark.parametrize("method", FIRST, ids=str)
def test_copies_of_the_module(method: Method) -> None:
    """deepcopy, pickle, torch.save and state_dict give the same module; what is done to a copy stays with it."""
    case = MethodCase(method, models_for(method)[0])
    m = pf.as_module(case.net, case.adapter())
    want = m(case.x)
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(m), pickle.loads(pickle.dumps(m)), torch.load(buffer, weights_only=False)):
        assert type(other) is type(m)
        assert torch.equal(other(case.x), want)
        assert not {p.data_ptr() for p in m.parameters() if p.numel()} & {p.data_ptr() for p in other.parameters()}
        for t in (*other.parameters(), *other.buffers()):
            t.data.zero_()
    assert torch.equal(m(case.x), want)
    fresh = pf.as_module(case.net, case.net.init(5))
    buffer = io.BytesIO()
    torch.save(m.state_dict(), buffer)
    buffer.seek(0)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert torch.equal(fresh(case.x), want)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", [LoRA(2), DoRA(2), IA3(), Full()], ids=lambda m: type(m).__name__)
def test_models(case: Case, method: Method) -> None:
    model = case.build()
    before = state(model)
    rules = {case.linear: method} | ({r"norm|bn|bias": Full()} if isinstance(method, LoRA) else {})
    rules = {k: v for k, v in rules.items() if k == case.linear or any(matches(k, n) for n in pf.sites(model))}
    net = pf.adapt(model, rules)
    a = random(net)
    m = pf.as_module(net, a)
    assert isinstance(m, type(model))
    assert type(m).__name__ == type(model).__name__
    same(called(m, case), flat(net, a, case))
    b = trained(a)
    weighted(flat(net, b, case)).backward()
    weighted(called(m, case)).backward()
    same(gradients(parameters_of(m)), gradients(b))
    assert torch.equal(called(copy.deepcopy(m), case), called(m, case))
    assert same_state(before, state(model))


# What an nn.Module is asked for.


def llama() -> tuple[Case, Any, pf.Adapted]:
    case = by_name["llama"]
    model = case.build()
    return case, model, pf.adapt(model, {case.linear: LoRA(2), "embed_tokens": LoRA(3), "norm": Full()})


def test_ties_hooks_settings_and_buffers_are_its_own_where_the_base_could_be_hurt() -> None:
    case = by_name["tied"]
    model = case.build()
    m = pf.as_module(pf.adapt(model, {"mid": LoRA(2)}), pf.adapt(model, {"mid": LoRA(2)}).init())
    assert m.head.weight is m.embed.weight
    assert m.head.weight is not model.head.weight
    assert m.head.weight.data_ptr() == model.head.weight.data_ptr()
    assert model.head.weight.requires_grad and not m.head.weight.requires_grad
    m.mid.register_forward_hook(lambda *_: None)
    assert not model.mid._forward_hooks
    case, model, net = llama()
    m = pf.as_module(net, net.init())
    m.config.use_cache = False
    assert model.config.use_cache and m.model.config is m.config
    convs = by_name["convs"].build()
    net = pf.adapt(convs, {"one": LoRA(2)})
    before, m = state(convs), pf.as_module(net, net.init()).train()
    m(noise(3, 4, 12))
    assert not torch.equal(m.bn1.running_mean, convs.bn1.running_mean)
    assert same_state(before, state(convs))


def test_a_tied_weight_adapted_under_one_name_is_one_site() -> None:
    """An embedding's adapter leaves the head it is tied to alone; a rule over both adapts both."""
    case = by_name["tied"]
    for rule in ("embed", "embed|head"):
        model = case.build()
        net = pf.adapt(model, {rule: LoRA(2)})
        a = random(net, scale=0.5)
        m = pf.as_module(net, a)
        same(called(m, case), flat(net, a, case))
        assert parametrize.is_parametrized(m.head) == ("head" in rule)
        assert m.embed.parametrizations.weight.original.data_ptr() == model.head.weight.data_ptr()


def test_tied_weights_that_an_adapter_makes_different_do_not_merge_unasked() -> None:
    """Loaded into a model that ties them, the one that is loaded last would overwrite the other, without a word."""
    case = by_name["tied"]
    model = case.build()
    for rule in ("embed", "head", "embed|head"):
        net = pf.adapt(model, {rule: LoRA(2)})
        a = random(net, scale=0.5)
        m = pf.as_module(net, a)
        for merge in (net.merge, lambda a, **k: dict(pf.merged(m, **k))):  # noqa: B023
            with pytest.raises(ValueError, match=r"\.weight: it is tied to \w+\.weight, .*untied=True"):
                merge(a)
            merged = merge(a, untied=True)
            same(
                case.output(torch.func.functional_call(model, merged, *case.inputs(2), tie_weights=False)),
                called(m, case),
            )
        same(net.merge(net.init())["embed.weight"], model.embed.weight)
    net = pf.adapt(model, {"embed|head": pf.TiedTokens((1, 2))})
    a, plain = random(net), case.build()
    for merged in (net.merge(a), dict(pf.merged(pf.as_module(net, a)))):
        plain.load_state_dict(merged, strict=False)
        same(called(plain, case), flat(net, a, case))
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())  # tied no longer
    net = pf.adapt(model, {"embed": LoRA(2)})
    assert not torch.equal(net.merge(random(net))["embed.weight"], model.embed.weight)


def test_transformers_resizes_and_ties_what_is_not_adapted() -> None:
    case, _, net = llama()  # with an adapted embedding
    m = pf.as_module(net, random(net))
    want = called(m, case)
    m.tie_weights()
    assert torch.equal(called(m, case), want)
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: resize_token_embeddings .*on the model first"):
        m.resize_token_embeddings(99)
    net = pf.adapt(net.model, {"q_proj": LoRA(2)})
    m, shape = pf.as_module(net, random(net)), net.model.lm_head.weight.shape
    want = called(m, case)
    m.resize_token_embeddings(shape[0] + 2, mean_resizing=False)
    assert net.model.lm_head.weight.shape == shape
    assert m(**{"input_ids": case.inputs(2)[0][0]}).logits.shape[-1] == shape[0] + 2
    m.resize_token_embeddings(shape[0])
    same(called(m, case), want)


@pytest.mark.parametrize("method", METHODS + CHAINS, ids=str)
def test_a_module_that_starts_on_meta(method: Method) -> None:
    """to_empty, the base's values and reset_ give what a module made of the whole model is."""
    case = MethodCase(method, models_for(method)[0])
    net = pf.adapt(copy.deepcopy(case.model).to("meta"), case.net.plan.rules)
    m = pf.as_module(net, net.init()).to_empty(device="cpu")
    for t in (*m.parameters(), *m.buffers()):
        t.data.fill_(1)
    base = pf.base_of(m)
    pf.copy_(base, {k: t for k, t in case.model.state_dict().items() if k in base})
    assert base.keys() >= {k for k, _ in case.model.named_parameters()}
    pf.reset_(m, 3)
    want, a = case.net.init(3), pf.adapter_of(m)
    assert a.keys() == want.keys() and all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(want), strict=True))
    same(m(case.x), case.net.apply(want, case.x))


def test_dropout_follows_the_module_s_own_mode() -> None:
    model = by_name["mlp"].build()
    net = pf.adapt(model, {"weight": LoRA(2, dropout=0.5)})
    a = random(net)
    m = pf.as_module(net, a)
    assert not m.training
    x = noise(4, 8)
    assert torch.equal(m(x), m(x))
    assert not torch.equal(m.train()(x), m(x))
    assert torch.equal(m.eval()(x), net.apply(a, x))
    model.train()
    assert torch.equal(m(x), m(x))


@pytest.mark.parametrize("method", [VeRA(3), pf.PiSSA(2), pf.FourierFT(8)], ids=lambda m: type(m).__name__)
def test_to_moves_leaves_and_constants(method: Method) -> None:
    model = by_name["mlp"].build()
    net = pf.adapt(model, {"weight": method, "bias": Full()})
    a = random(net)
    m, x = pf.as_module(net, a).to(torch.float64), noise(2, 8).double()
    assert {t.dtype for t in m.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    same(m(x).float(), net.apply(a, x.float()))
    meta = pf.as_module(net, a).to("meta")
    assert {t.device.type for t in meta.state_dict().values()} == {"meta"}
    assert meta(x.float().to("meta")).shape == (2, 4)
    shared = [k for k in m.state_dict() if k.startswith("adapter_")]
    if isinstance(method, VeRA):
        assert shared == ["adapter_A", "adapter_B"], "what the sites share is stored once"


def test_loading_another_base_s_state_leaves_the_base_and_the_net_alone() -> None:
    model, other = by_name["tied"].build(), by_name["tied"].build()
    for p in other.parameters():
        p.data.mul_(2)
    net, theirs = (pf.adapt(m, {"mid|head": VeRA(3)}, seed=s) for s, m in enumerate((model, other)))
    a, b, x = random(net), random(theirs, 1), by_name["tied"].inputs(2)[0][0]
    want, m = net.apply(a, x), pf.as_module(net, a)
    before = [p.detach().clone() for p in model.parameters()]
    m.load_state_dict(pf.as_module(theirs, b).state_dict(), strict=True)
    same(m(x), theirs.apply(b, x))
    assert torch.equal(net.apply(a, x), want)
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert m.embed.weight.data_ptr() == m.head.parametrizations.weight.original.data_ptr()
    with pytest.raises(RuntimeError, match="Missing key"):
        m.load_state_dict({}, strict=True)


def test_a_module_with_a_copied_base_can_be_averaged_into() -> None:
    """What an EMA or a target network does, to all parameters; tied ones stay tied."""
    model = by_name["tied"].build()
    net = pf.adapt(model, {"mid": LoRA(2)})
    a, before, x = random(net), state(model), by_name["tied"].inputs(2)[0][0]
    policy, target = pf.as_module(net, a), pf.as_module(net, random(net, 2), copy_base=True)
    same(target(x), net.apply(random(net, 2), x))
    assert target.embed.weight is target.head.weight
    assert {p.data_ptr() for p in target.parameters()}.isdisjoint(p.data_ptr() for p in policy.parameters())
    with torch.no_grad():
        for t, p in zip(target.parameters(), policy.parameters(), strict=True):
            t.data.mul_(0).add_(p.data, alpha=2)
    assert same_state(before, state(model))
    same(policy(x), net.apply(a, x))
    same(target.embed.weight, 2 * model.embed.weight)
    with pytest.raises(ValueError, match="give an adapter"):
        pf.as_module(net, copy_base=True)


def test_a_base_that_was_resized_is_told_wherever_its_weights_are_read() -> None:
    _, model, net = llama()
    a = net.init()
    model.resize_token_embeddings(model.config.vocab_size + 4, mean_resizing=False)
    for read in (
        net.delta,
        net.bias_deltas,
        net.merge,
        net.prepare,
        lambda a: net.init(),
        lambda a: pf.as_module(net, a),
    ):
        with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: .*Call adapt again"):
            read(a)


class _Wrapped(nn.Module):
    """As a trainer's module has a model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model


@pytest.mark.parametrize("way", ["wrapper", "layer", "adapted layer", "copy", "pickle"])
def test_no_way_of_loading_writes_the_base(way: str) -> None:
    models = [by_name["convs"].build() for _ in range(2)]
    for p in [*models[1].parameters(), *models[1].buffers()]:
        p.data.mul_(2)
    nets = [pf.adapt(model, {"one": LoRA(2), "bn1": Full(), "two": VBLoRA(2, vectors=3, length=2)}) for model in models]
    m, other = (pf.as_module(net, random(net, s)) for s, net in enumerate(nets))
    before, x, layer = [p.detach().clone() for p in models[0].parameters()], noise(3, 4, 12), "two"
    if way in ("copy", "pickle"):
        m = copy.deepcopy(m) if way == "copy" else pickle.loads(pickle.dumps(m))
    if way in ("wrapper", "copy", "pickle"):
        _Wrapped(m).load_state_dict(_Wrapped(other).state_dict())
        same(m.eval()(x), other.eval()(x))
    else:
        layer = "one" if way == "adapted layer" else next(n for n, c in m.named_children() if n not in ("one", "two"))
        m.get_submodule(layer).load_state_dict(other.get_submodule(layer).state_dict())
        for name, t in m.get_submodule(layer).state_dict().items():
            same(t, other.get_submodule(layer).state_dict()[name])
    assert all(torch.equal(p, was) for p, was in zip(models[0].parameters(), before, strict=True))


def test_state_dict_names() -> None:
    model = by_name["mlp"].build()
    net = pf.adapt(model, {"0.weight": LoRA(2), "2.weight": VBLoRA(2, vectors=3, length=2)})
    keys = pf.as_module(net, net.init()).state_dict().keys()
    assert {"0.parametrizations.weight.original", "0.parametrizations.weight.0.default.a", "0.bias"} <= keys
    assert [k for k in keys if k.startswith("adapter_")] == ["adapter_default_VBLoRA_bank"]
    tree = pf.add(pf.scale(net.init(), 2.0), net.init(1))
    m = pf.as_module(net, tree)
    assert torch.equal(m(noise(2, 8)), net.apply(tree, noise(2, 8)))
    assert pf.adapter_of(m).keys() == tree.keys()
    assert "0.parametrizations.weight.0.default.add:0/of/a" in m.state_dict()


@pytest.mark.parametrize("method", [LoRA(2), VBLoRA(2, vectors=3, length=2), VeRA(2)], ids=str)
def test_the_factor_of_a_scaling_is_a_buffer(method: Method) -> None:
    """No optimizer trains it, and no reader of the module loses it: also of the bank that several sites share."""
    net = pf.adapt(by_name["mlp"].build(), {"weight": method})
    a, x = random(net, scale=0.5), noise(2, 8)
    tree = pf.add(pf.scale(a, 0.5), random(net, 1))
    m = pf.as_module(net, tree)
    assert sum(p.requires_grad for p in m.parameters()) == 2 * len(leaves(a))
    weighted(m(x)).backward()
    torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1).step()
    got = pf.adapter_of(m)
    for site in tree:
        assert got[site]["add.0"]["scale"] == 0.5 and got[site].keys() == tree[site].keys()
    for other in (pickle.loads(pickle.dumps(m)), pf.as_module(net, tree)):
        other.load_state_dict(m.state_dict())
        same(other(x), net.apply(got, x))
    pf.trainable_(m, flag=True)
    assert pf.status(m).adapters[0].parameters == sum(t.numel() for t in leaves(a)) * 2
    idle = pf.as_module(net, one=a, two=tree)
    kept = pf.offload_(idle, "two", "meta")
    pf.onload_(idle, "two", kept)
    assert not any(isinstance(b, nn.Parameter) for b in idle.buffers())
    with idle.use("two"):
        same(idle(x), net.apply(tree, x))


def test_a_factor_that_requires_a_gradient_trains() -> None:
    net = pf.adapt(by_name["mlp"].build(), {"0.weight": LoRA(2)})
    a, s, x = random(net), torch.tensor(0.5, requires_grad=True), noise(2, 8)
    m = pf.as_module(net, pf.scale(a, s))
    weighted(m(x)).backward()
    weighted(net.apply(pf.scale(a, s), x)).backward()
    (factor,) = (p for k, p in m.named_parameters() if k.endswith(".scale"))
    same(factor.grad, s.grad)


def test_a_module_for_inference_requires_no_gradient() -> None:
    net = pf.adapt(by_name["mlp"].build(), {"0.weight": LoRA(2), "2.weight": VBLoRA(2, vectors=3, length=2)})
    a, x = random(net), noise(2, 8)
    m = pf.as_module(net, a, trainable=False)
    assert not any(p.requires_grad for p in m.parameters()) and not m(x).requires_grad
    same(m(x), net.apply(a, x))
    pf.trainable_(m)
    assert sum(p.requires_grad for p in m.parameters()) == len(leaves(a))


def test_compiled_hot_swapped_without_compiling_anew_or_new_storage() -> None:
    torch._dynamo.reset()
    case, _, net = llama()
    m = pf.as_module(net, random(net))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(m, fullgraph=True, backend=counter)
    storage = [t.data_ptr() for t in m.state_dict().values()]
    for seed in range(3):
        a = random(net, seed)
        pf.copy_(m if seed else compiled, a)
        b = trained(a)
        weighted(flat(net, b, case)).backward()
        m.zero_grad()
        y = called(compiled, case)
        same(y, flat(net, a, case))
        weighted(y).backward()
        same(gradients(parameters_of(compiled)), gradients(b))
    assert counter.frame_count == 1
    assert [t.data_ptr() for t in m.state_dict().values()] == storage
    assert not {t.data_ptr() for t in leaves(a)} & set(storage)


def test_equal_layers_are_compiled_once() -> None:
    """Compiled layer by layer, as is usual for large models: layers of one class parametrized alike are one class."""
    torch._dynamo.reset()
    _, _, net = llama()
    m = pf.as_module(net, net.init())
    counter = CompileCounterWithBackend("eager")
    mlps = [torch.compile(layer.self_attn.q_proj, fullgraph=True, backend=counter) for layer in m.model.layers]
    [mlp(noise(2, 16)) for mlp in mlps]
    assert len(mlps) == 2 and counter.frame_count == 1


def test_exported() -> None:
    model = by_name["mlp"].build()
    net = pf.adapt(model, {"weight": DoRA(2), "bias": Full()})
    a = random(net)
    m = pf.as_module(net, a)
    program = torch.export.export(m, (noise(3, 8),))
    assert {"0.parametrizations.weight.0.default.a", "0.parametrizations.weight.original"} <= program.state_dict.keys()
    same(program.module()(noise(3, 8, seed=4)), net.apply(a, noise(3, 8, seed=4)))


def test_copy_to_an_adapter_is_all_or_nothing() -> None:
    _, _, net = llama()
    a, b = random(net), random(net, 1)
    dst = {k: {n: t.clone() for n, t in leaf.items()} for k, leaf in a.items()}
    storage = [t.data_ptr() for t in leaves(dst)]
    pf.copy_(dst, b)
    assert all(torch.equal(x, y) for x, y in zip(leaves(dst), leaves(b), strict=True))
    assert storage == [t.data_ptr() for t in leaves(dst)]
    *_, last = a
    for bad, error in [
        ({**a, last: {"b": a[last].get("b")}}, KeyError),
        ({**a, last: {k: t[:1] for k, t in a[last].items()}}, ValueError),
        ({**a, last: {k: t.double() for k, t in a[last].items()}}, ValueError),
        ({**a, last: {k: t.to("meta") for k, t in a[last].items()}}, ValueError),
        ({**a, last: dict.fromkeys(a[last], 1.0)}, TypeError),
    ]:
        for to in (dst, pf.as_module(net, b)):
            with pytest.raises(error, match=last.replace(".", r"\.")):
                pf.copy_(to, bad)
            held = to if isinstance(to, dict) else pf.adapter_of(to)
            assert all(torch.equal(x, y) for x, y in zip(leaves(held), leaves(b), strict=True))


# Several adapters.


def several() -> tuple[Case, Any, pf.Adapted, dict[str, Any], Any]:
    case, model, net = llama()
    other = pf.adapt(model, {"q_proj": IA3(), "lm_head": Full()})
    adapters = {"one": random(net), "two": random(net, 1), "other": random(other, 2)}
    m = pf.as_module(net, one=adapters["one"], two=adapters["two"], other=(other, adapters["other"]))
    want = {k: flat(other if k == "other" else net, a, case) for k, a in adapters.items()}
    return case, model, net, want | {None: called(model, case)}, m


def test_use() -> None:
    case, _, net, want, m = several()
    same(called(m, case), want["one"])
    for name, y in want.items():
        with m.use(name):
            same(called(m, case), y)
            with m.use(None):
                same(called(m, case), want[None])
            same(called(m, case), y)
    with pytest.raises(ZeroDivisionError), m.use("two"):
        raise ZeroDivisionError
    same(called(m, case), want["one"])
    with pytest.raises(KeyError, match="no adapter 'tow'; near: two"), m.use("tow"):
        pass
    again = pickle.loads(pickle.dumps(m))
    with again.use("other"):
        same(called(again, case), want["other"])
    with m.use("two"):
        assert torch.equal(pf.adapter_of(m)["model.norm.weight"]["diff"], random(net, 1)["model.norm.weight"]["diff"])


def test_use_is_local_to_the_thread() -> None:
    case, _, _, want, m = several()
    names, failed, ready = [*want] * 2, [], threading.Barrier(8)

    def run(name: str | None) -> None:
        try:
            with m.use(name):
                ready.wait(60)
                for _ in range(5):
                    same(called(m, case), want[name])
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not failed
    same(called(m, case), want["one"])


def test_a_default_for_all_threads() -> None:
    case, _, _, want, m = several()
    found: dict[str, Tensor] = {}

    def run(key: str) -> None:
        found[key] = called(m, case)

    with m.use("one"):
        m.use_("two")
        run("inside")  # a block says otherwise for its thread
        thread = threading.Thread(target=run, args=("thread",))
        thread.start()
        thread.join()
    run("after")
    same(found["inside"], want["one"])
    same(found["thread"], want["two"])
    same(found["after"], want["two"])
    assert [a.name for a in pf.status(m).adapters if a.active] == ["two"]
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        same(called(copied, case), want["two"])
    m.use_(None)
    same(called(m, case), want[None])
    pf.offload_(m, "one")
    for name, error in [("tow", KeyError), (2, TypeError), ("one", ValueError)]:
        with pytest.raises(error, match="use_"):
            m.use_(name)
    same(called(m, case), want[None])


def test_compiled_use() -> None:
    torch._dynamo.reset()
    net = pf.adapt(by_name["mlp"].build(), {"weight": LoRA(2)})
    a, b, x = random(net), random(net, 1), noise(2, 8)
    m = pf.as_module(net, one=a, two=b)
    want = {"one": net.apply(a, x), "two": net.apply(b, x), None: net.model(x)}
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(m, fullgraph=True, backend=counter)
    for name, y in [*want.items()] * 2:
        with m.use(name):
            same(compiled(x), y)
    assert counter.frame_count == len(want)
    for name, y in [*want.items()] * 2:
        m.use_(name)
        same(compiled(x), y)
    assert counter.frame_count <= 2 * len(want)  # once more for a default


def test_status_trainable_offload_onload() -> None:
    case, _, net, want, m = several()
    pf.trainable_(m, "one", False)
    status = pf.status(m)
    assert [(a.name, a.active, a.trainable, a.offloaded) for a in status.adapters] == [
        ("one", True, False, False),
        ("two", False, True, False),
        ("other", False, True, False),
    ]
    assert status.adapters[0].parameters == sum(t.numel() for t in leaves(net.init()))
    assert status.base == sum(p.numel() for p in net.model.parameters()) and status.base_trainable == 0
    assert "one: frozen, active" in str(status) and "LoRA(rank=2" in str(status)
    with m.use("two"):
        weighted(called(m, case)).backward()
        assert [a.active for a in pf.status(m).adapters] == [False, True, False]
    assert all(p.grad is None for name in ("one", "other") for p in leaves(parameters_of(m, name)))
    parameters = leaves(parameters_of(m, "two"))
    kept = pf.offload_(m, "two", "meta")
    assert {t.device.type for t in leaves(pf.adapter_of(m, "two"))} == {"meta"}
    assert pf.status(m).adapters[1].devices == ("meta",) and pf.status(m).adapters[1].offloaded
    with pytest.raises(ValueError, match=r"'two' is offloaded; bring it back with peftfn.onload_"), m.use("two"):
        pass
    with pytest.raises(ValueError, match="meta"):
        pf.onload_(m, "two")
    for write in (lambda: m.load_state_dict(m.state_dict()), lambda: m.save_pretrained("nowhere")):
        with pytest.raises(ValueError, match=r"'two' is offloaded to meta .* at model\..*peftfn\.onload_"):
            write()
    pf.onload_(m, "two", kept)
    assert all(p is q for p, q in zip(leaves(parameters_of(m, "two")), parameters, strict=True))
    pf.offload_(m, "two", "cpu")
    pf.onload_(m, "two")
    with m.use("two"):
        same(called(m, case), want["two"])
        with pytest.raises(ValueError, match="'two' is active"):
            pf.offload_(m, "two")
    with pytest.raises(ValueError, match="'one' is active"):
        pf.offload_(m, "one")


def test_status_by_site() -> None:
    model = by_name["mlp"].build()
    net = pf.adapt(model, {"0.weight": LoRA(2), "2.weight": VBLoRA(2, vectors=3, length=2)})
    m = pf.as_module(net, one=net.init(), two=net.init(dtype=torch.float64))
    m.use_("two")
    pf.trainable_(m, "two", False)
    m[0].parametrizations.weight[0].two.a.requires_grad_()
    rows = [dataclasses.asdict(row) for row in pf.status(m).by_site]
    assert [(r["adapter"], r["site"]) for r in rows] == [
        (name, at) for name in ("one", "two") for at in ("0.weight", "2.weight", "VBLoRA")
    ]
    assert [(r["active"], r["requires_grad"], r["dtype"], r["device"]) for r in rows] == [
        *[(False, True, "float32", "cpu")] * 3,
        (True, None, "float64", "cpu"),
        *[(True, False, "float64", "cpu")] * 2,
    ]
    assert sum(r["parameters"] for r in rows) == 2 * sum(t.numel() for t in leaves(net.init()))
    assert rows[1]["method"] == rows[2]["method"] == str(VBLoRA(2, vectors=3, length=2))


# Checkpointing.


def steps(m: Any, case: Case) -> list[Tensor | None]:
    m.zero_grad()
    weighted(called(m, case)).backward()
    return [None if p.grad is None else p.grad.clone() for p in m.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", [None, "two"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointing_of_transformers(reentrant: bool, name: str | None) -> None:
    """The gradients are those without it, also where the backward pass runs outside of `use`."""
    case, _, net = llama()
    m = pf.as_module(net, random(net)) if name is None else several()[-1]
    m.train()
    name = name or "default"
    with m.use(name):
        want = steps(m, case)
    m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    m.zero_grad()
    calls = []
    m.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    with m.use(name):
        y = called(m, case)
    weighted(y).backward()
    assert len(calls) == 2, "nothing was recomputed"
    for p, g in zip(m.parameters(), want, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            same(p.grad, g)
    assert any(g is not None for g in want)


class Blocks(nn.Module):
    """A model that checkpoints on its own."""

    on, reentrant = True, False
    context_fn: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            options = {"context_fn": type(self).context_fn} if type(self).context_fn else {}

            def run(x: Tensor, block: nn.Module = block) -> Tensor:
                return torch.tanh(block(x))

            x = checkpoint(run, x, use_reentrant=self.reentrant, **options) if self.on else run(x)
        return x


def plain_gradients(net: pf.Adapted, a: Any, x: Tensor) -> Any:
    """Those without checkpointing."""
    b, net.model.on = trained(a), False
    weighted(net.apply(b, x)).backward()
    net.model.on = True
    return gradients(b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_one_s_own(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Blocks()
    monkeypatch.setattr(Blocks, "reentrant", reentrant)
    net = pf.adapt(model, {"weight": DoRA(2)})
    a = random(net)
    m, x, want = pf.as_module(net, a), noise(2, 8).requires_grad_(), plain_gradients(net, a, noise(2, 8))
    weighted(m(x)).backward()
    same(gradients(parameters_of(m)), want)
    two = pf.as_module(net, one=a, two=random(net, 1))
    with pytest.raises(RuntimeError, match=r"blocks\.2\.weight: recomputed in a backward pass.*checkpoint_context"):
        weighted(two(x)).backward()


def test_checkpoint_context_of_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Blocks()
    net = pf.adapt(model, {"weight": DoRA(2)})
    m, x = pf.as_module(net, one=random(net), two=random(net, 1)), noise(2, 8)
    want = plain_gradients(net, random(net, 1), x)
    monkeypatch.setattr(Blocks, "context_fn", lambda: m.checkpoint_context())
    with m.use("two"):
        y = m(x)
    weighted(y).backward()
    same(gradients(parameters_of(m, "two")), want)


def test_checkpoint_context_of_a_net(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved calls of two adapters, backward in any order; the bare model too; without it, an error."""
    model = Blocks()
    net, x = pf.adapt(model, {"weight": DoRA(2)}), noise(2, 8).requires_grad_()
    a, b = trained(random(net)), trained(random(net, 1))
    want = [plain_gradients(net, random(net, seed), x) for seed in (0, 1)]
    with pytest.raises(RuntimeError, match=r"weight: used after its call was over.*net\.checkpoint_context"):
        weighted(net.apply(a, x)).backward()
    monkeypatch.setattr(Blocks, "context_fn", net.checkpoint_context)
    one, two = net.apply(a, x), net.apply(b, x)
    weighted(one).backward()
    weighted(two).backward()
    same(gradients(a), want[0])
    same(gradients(b), want[1])
    weighted(model(x)).backward()
    assert model.blocks[0].weight.grad.isfinite().all()
    monkeypatch.setattr(Blocks, "reentrant", True)
    monkeypatch.setattr(Blocks, "context_fn", None)
    with pytest.raises(RuntimeError, match=r"passed to a torch\.autograd\.Function|used after its call was over"):
        weighted(net.apply(a, x)).backward()


# Bad input.


def test_errors() -> None:
    model = by_name["mlp"].build()
    net = pf.adapt(model, {"weight": LoRA(2)})
    a = net.init()
    other = pf.adapt(by_name["mlp"].build(), {"weight": LoRA(2)})
    for make, error, match in [
        (lambda: pf.as_module(net), ValueError, "give an adapter"),
        (lambda: pf.as_module(net, a, b=a), ValueError, "give an adapter"),
        (lambda: pf.as_module(net, **{"a.b": a}), ValueError, "cannot be named 'a.b'"),
        (lambda: pf.as_module(net, train=a), ValueError, "cannot be named 'train'"),
        (lambda: pf.as_module(pf.adapt(pf.as_module(net, a), {"0.bias": Full()}), {}), ValueError, "as_module made"),
        (lambda: pf.as_module(net, x=(other, a)), ValueError, "'x' adapts another model"),
        (lambda: pf.as_module(net, {"0.weight": a["0.weight"]}), KeyError, "lacks 1 of the plan's 2 sites"),
        (lambda: pf.adapter_of(model), ValueError, "holds 0 modules that as_module made"),
        (lambda: pf.adapter_of(pf.as_module(net, a), "b"), KeyError, "no adapter 'b'"),
        (lambda: pf.copy_(a, a, "b"), TypeError, "no adapter"),
    ]:
        with pytest.raises(error, match=match):
            make()


def test_a_parametrized_layer_is_refused() -> None:
    model = by_name["mlp"].build()
    net = pf.adapt(model, {"2.weight": LoRA(2)})
    torch.nn.utils.parametrizations.weight_norm(model[2], "bias", dim=0)
    with pytest.raises(ValueError, match=r"2\.weight: its layer is parametrized already \(bias\).*remove_param"):
        pf.as_module(net, net.init())


def test_adapt_refuses_occupied_layers_unless_a_rule_names_the_part() -> None:
    import peft

    model = by_name["mlp"].build()
    torch.nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(ValueError, match=r"2\.parametrizations.*original0: 2 is parametrized.*remove_parametrizations"):
        pf.adapt(model, {"2": LoRA(2)})
    x = noise(2, 8)
    net = pf.adapt(model, {r"2.parametrizations.weight.original1": LoRA(2)})
    a = random(net)
    same(pf.as_module(net, a)(x), net.apply(a, x))
    tuned = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), by_name["mlp"].build())
    with pytest.raises(ValueError, match=r"0\..*: 0 is a Linear that PEFT put there.*merge_and_unload"):
        pf.adapt(tuned, {"0": LoRA(2)})
    net = pf.adapt(tuned, {"0.base_layer": LoRA(2)})
    same(net.apply(net.init(), x), tuned(x))


@pytest.mark.parametrize("layer", ["0", "2"], ids=["of another layer", "of the adapted one"])
def test_a_module_of_an_offloaded_model_is_refused_and_its_net_runs(layer: str) -> None:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = by_name["mlp"].build()
    net = pf.adapt(model, {"2.weight": LoRA(2)})
    a, x, hook = random(net), noise(2, 8), AlignDevicesHook(execution_device="cpu", offload=True)
    want = net.apply(a, x)
    add_hook_to_module(model.get_submodule(layer), hook)
    same(net.apply(a, x), want)
    with pytest.raises(ValueError, match=rf"^{layer}: .*in place for each call.*remove_hook_from_submodules"):
        pf.as_module(net, a)


def test_a_model_that_accelerate_dispatched_over_devices() -> None:
    """accelerate sets functions on the model that hold it: `forward`, and `to` and `cuda`, which warn."""
    from accelerate import dispatch_model

    plain, model, x = by_name["mlp"].build(), by_name["mlp"].build(), noise(3, 8)
    dispatch_model(model, dict.fromkeys([n for n, _ in model.named_children()], "cpu"), "cpu", force_hooks=True)
    assert "to" in vars(model) and "forward" in vars(model)
    net = pf.adapt(model, {"weight": LoRA(2)})
    a = random(net)
    want, m = pf.adapt(plain, {"weight": LoRA(2)}).apply(a, x), pf.as_module(net, a)
    same(net.apply(a, x), want)
    same(m(x), want)
    m.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float32} != {p.dtype for p in m.parameters()}


def test_a_write_to_an_adapted_weight_is_an_error_and_not_lost() -> None:
    net = pf.adapt(by_name["mlp"].build(), {"weight": LoRA(2)})
    m = pf.as_module(net, net.init())
    for write in (torch.nn.init.zeros_, lambda w: w.mul_(2), lambda w: torch.relu_(w)):
        with pytest.raises(RuntimeError, match=r"0\.weight: (\w+_|scaling it in place by 2) would write to the"):
            write(m[0].weight)
    y = noise(6, 8).add_(m[0].weight)
    assert torch.equal(y, noise(6, 8) + net.model[0].weight)


def test_a_module_keeps_no_reference_to_the_base() -> None:
    model = by_name["mlp"].build()
    net = pf.adapt(model, {"weight": LoRA(2)})
    m, alive = pf.as_module(net, net.init()), weakref.ref(model)
    del model, net
    gc.collect()
    assert alive() is None
    assert m(noise(2, 8)).isfinite().all()


def test_a_leaf_takes_no_name_from_the_methods() -> None:
    """A method may give a tensor any name that is not reserved, and a leaf holds it as an attribute of that name."""
    assert {k for k in vars(Leaf) if not k.startswith("_")} <= RESERVED | vars(nn.Module).keys()
