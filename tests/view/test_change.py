"""attach_ and detach_: a module with other adapters is the module it was, and the one that was made with them."""

import copy
import pickle
import threading
from typing import Any

import peft
import pytest
import torch
from models import by_name, noise
from support import FIRST, random, randomised
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import peftfn as pf
from peftfn import DoRA, Full, LoRA, Method, VBLoRA, VeRA
from peftfn.testing import Case as MethodCase
from peftfn.testing import close, leaves, models_for
from peftfn.view.module import parameters_of


def same(a: Any, b: Any) -> None:
    close(a, b, "attach_", 1e-5)


def weights(m: nn.Module) -> dict[str, Tensor]:
    return {k: t.clone() for k, t in m.state_dict().items()}


def gradients(y: Tensor, parameters: Any) -> list[Tensor]:
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    made = torch.autograd.grad((y * weight).sum(), parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(made, parameters, strict=True)]


@pytest.mark.parametrize("method", FIRST, ids=str)
def test_an_attached_adapter_is_apply(method: Method) -> None:
    """For every method: given alone or with its net, it is what as_module makes of it, and it leaves no trace."""
    case = MethodCase(method, models_for(method)[0])
    a, b = case.adapter(), random(case.net, 7)
    m = pf.as_module(case.net, one=a)
    before, names = weights(m), list(m.state_dict())
    for given in (b, (case.net, b)):
        pf.attach_(m, "two", given)
        same(m(case.x), case.net.apply(a, case.x))
        want = case.net.apply(b, case.x)
        for held in (m, copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
            with held.use("two"):
                same(held(case.x), want)
        assert sum(p.requires_grad for p in m.parameters()) == len(leaves(a)) + len(leaves(b))
        got = pf.detach_(m, "two")
        assert got.keys() == b.keys() and all(map(torch.equal, leaves(got), leaves(b)))
        assert list(m.state_dict()) == names and all(torch.equal(t, before[k]) for k, t in m.state_dict().items())


@pytest.mark.parametrize("method", FIRST, ids=str)
def test_several_active_adapters_are_their_sum(method: Method) -> None:
    """For every method, with gradients; where it has no sum, an error says so."""
    case = MethodCase(method, models_for(method)[0])
    a, b = case.adapter(), random(case.net, 7)
    m = pf.as_module(case.net, one=a, two=b)
    if not method.combines:
        with pytest.raises(ValueError, match="have no sum"), m.use(["one", "two"]):
            pass
        return
    tree = tree_map(lambda t: t.detach().clone().requires_grad_(), pf.add(a, b))
    want = case.net.apply(tree, case.x)
    with m.use(["one", "two"]):
        y = m(case.x)
        assert [row.active for row in pf.status(m).adapters] == [True, True]
    same(y, want)
    held, added = parameters_of(m, "two"), {site: leaf["add.1"] for site, leaf in tree.items()}
    for g, h in zip(gradients(y, leaves(held)), gradients(want, leaves(added)), strict=True):
        same(g, h)


def two_layers() -> tuple[Any, Any, Any, Any]:
    net = pf.adapt(by_name["mlp"].build(), {"weight": LoRA(2)})
    a = random(net)
    return net, a, pf.as_module(net, one=a), noise(3, 8)


@pytest.mark.parametrize("method", FIRST, ids=str)
def test_active_adapters_have_weights(method: Method) -> None:
    """For every method, with gradients: `scale` of each, in a sum and alone; 0 is the base."""
    case = MethodCase(method, models_for(method)[0])
    a, b = case.adapter(), random(case.net, 7)
    m = pf.as_module(case.net, one=a, two=b)
    if not method.combines:
        with pytest.raises(ValueError, match="cannot be scaled; leave weights out"), m.use("one", 0.5):
            pass
        return
    tree = tree_map(lambda t: t.detach().clone().requires_grad_(), a)
    want = case.net.apply(pf.add(pf.scale(tree, 0.7), pf.scale(b, -0.4)), case.x)
    with m.use(["one", "two"], weights=[0.7, -0.4]):
        y = m(case.x)
    same(y, want)
    held = parameters_of(m, "one")
    for g, h in zip(gradients(y, leaves(held)), gradients(want, leaves(tree)), strict=True):
        same(g, h)
    m.use_("two", 0.3)
    same(m(case.x), case.net.apply(pf.scale(b, 0.3), case.x))
    assert [(row.active, row.weight) for row in pf.status(m).adapters] == [(False, 1.0), (True, 0.3)]
    assert "two: trainable, active × 0.3;" in str(pf.status(m))
    with m.use(["one", "two"], [0, 0]):
        same(m(case.x), case.net.apply(pf.scale(a, 0.0), case.x))
    with m.use(["two", "one"], [1, 1]):
        same(m(case.x), case.net.apply(pf.add(b, a), case.x))
    if case.merges and not any(e.adds_bias for e in case.net.plan.values()):
        merged = dict(pf.merged(m.eval(), untied=True))
        for site, w in case.net.merge(pf.scale(b, 0.3), untied=True).items():
            same(merged[site], w)


def test_optimizers_and_states_of_the_others_stay() -> None:
    net, a, m, x = two_layers()
    parameters = [p for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    alone = pf.as_module(net, one=a)
    other = torch.optim.AdamW([p for p in alone.parameters() if p.requires_grad], lr=0.1)
    state = weights(m)
    for module, steps in ((m, optimizer), (alone, other)):
        for step in range(3):
            if module is m and step == 1:
                pf.attach_(m, "two", random(net, 1), trainable=False)
            module.zero_grad()
            module(x).square().sum().backward()
            steps.step()
    same(pf.adapter_of(m), pf.adapter_of(alone))
    assert all(p is q for p, q in zip(parameters, leaves(parameters_of(m, "one")), strict=True))
    assert not any(p.requires_grad for p in leaves(parameters_of(m, "two")))
    odd = m.load_state_dict(state, strict=False)
    assert not odd.unexpected_keys and all(".0.two." in k for k in odd.missing_keys)
    same(m(x), net.apply(a, x))
    pf.detach_(m, "two")
    m.load_state_dict(state)


def test_a_net_that_changes_the_same_sites_may_come_in() -> None:
    net, a, m, x = two_layers()
    for i, rules in enumerate([{"weight": LoRA(3)}, {"0.weight": DoRA(2)}, {"weight": VeRA(2)}, {"2.weight": Full()}]):
        other = pf.adapt(net.model, rules, seed=4)
        b = random(other, i)
        pf.attach_(m, f"n{i}", (other, b))
        with m.use(f"n{i}"):
            same(m(x), other.apply(b, x))
    same(m(x), net.apply(a, x))
    made = [pf.detach_(m, f"n{i}") for i in range(4)]
    assert not any(k.startswith("adapter_") for k in m.state_dict())
    shared = pf.as_module(net, one=a, two=random(net, 1))
    pf.attach_(shared, "n", (pf.adapt(net.model, {"weight": LoRA(3)}), made[0]))
    with pytest.raises(ValueError, match=r"adapters of several nets; pass 'more' with its own"):
        pf.attach_(shared, "more", a)


def test_a_slot_outlives_the_adapter_that_it_was_made_for() -> None:
    net, a, _, x = two_layers()
    other = pf.adapt(net.model, {"0.bias": Full()})
    b = random(other)
    m = pf.as_module(net, one=a, two=(other, b))
    pf.attach_(m, "again", (other, pf.detach_(m, "two")))
    with m.use("again"):
        same(m(x), other.apply(b, x))


def test_an_adapter_follows_the_module_s_mode_and_devices() -> None:
    net = pf.adapt(by_name["mlp"].build(), {"weight": LoRA(2, dropout=0.9)})
    a, x = random(net), noise(3, 8)
    m = pf.as_module(net, one=a).train()
    pf.attach_(m, "two", a)
    m.use_("two")
    assert not torch.equal(m(x), m(x))
    m.eval()
    same(m(x), net.apply(a, x))
    nowhere = pf.as_module(net, one=a).to("meta")
    pf.attach_(nowhere, "two", a)
    assert all(t.is_meta for t in leaves(pf.adapter_of(nowhere, "two")))


@pytest.mark.parametrize("method", [LoRA(2), VeRA(2), VBLoRA(2, vectors=4, length=2)], ids=str)
def test_attaching_does_not_compile_and_use_compiles_once(method: Method) -> None:
    torch._dynamo.reset()
    net = pf.adapt(by_name["mlp"].build(), {"weight": method})
    adapters, x = [random(net, i) for i in range(3)], noise(3, 8)
    m = pf.as_module(net, one=adapters[0])
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(m, fullgraph=True, backend=counter)
    compiled(x)
    for i, a in enumerate(adapters[1:], 1):
        pf.attach_(compiled, f"n{i}", a)
        same(compiled(x), net.apply(adapters[0], x))
        assert counter.frame_count == i
        with m.use(f"n{i}"):
            same(compiled(x), net.apply(a, x))
        assert counter.frame_count == i + 1
    pf.detach_(compiled, "n1")
    same(compiled(x), net.apply(adapters[0], x))
    assert counter.frame_count == 3


def test_errors_come_before_any_change() -> None:
    net, a, m, x = two_layers()
    pf.attach_(m, "two", random(net, 1))
    before = weights(m)
    convs = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 3)), {"0.weight": LoRA(2)})
    bias = pf.adapt(net.model, {"0.weight": LoRA(2, lora_bias=True)})
    norms = pf.adapt(net.model, {"0.bias": Full()})
    meta = {k: {n: t.to("meta") for n, t in leaf.items()} for k, leaf in a.items()}
    inside = nn.Sequential(m)
    for change, error, match in [
        (lambda: pf.attach_(m, "x.y", a), ValueError, "attach_: an adapter cannot be named 'x.y'"),
        (lambda: pf.attach_(m, 3, a), TypeError, "name is a string, not 3"),  # type: ignore[arg-type]
        (lambda: pf.attach_(m, "two", a), ValueError, "has an adapter 'two'; write its values with copy_"),
        (lambda: pf.attach_(m, "n", {"0.weight": a["0.weight"]}), KeyError, "lacks 1 of the plan's 2 sites"),
        (lambda: pf.attach_(m, "n", (a, net)), TypeError, r"no pair \(net, adapter\)"),  # type: ignore[arg-type]
        (lambda: pf.attach_(m, "n", (convs, convs.init())), ValueError, r"'n' changes 0\.weight, where .* as_module"),
        (lambda: pf.attach_(m, "n", (bias, bias.init())), ValueError, r"'n' changes 0\.bias, where the module has no"),
        (
            lambda: pf.attach_(m, "n", (norms, norms.init())),
            ValueError,
            r"'n' changes 0\.bias, where the module has no",
        ),
        (lambda: pf.attach_(m, "n", meta), ValueError, r"0\.weight: adapter 'n' has no data \(it is on meta\)"),
        (lambda: pf.attach_(inside, "n", a), ValueError, "inside of a Sequential"),
        (lambda: pf.attach_(net.model, "n", a), ValueError, "holds 0 modules that as_module made"),
        (lambda: pf.detach_(m, "tow"), KeyError, "no adapter 'tow'; near: two"),
        (lambda: pf.detach_(m, "one"), ValueError, "'one' is active, or is the default; call m.use_ of another"),
        (lambda: pf.detach_(pf.as_module(net, a), "default"), ValueError, "'default' is the module's only adapter"),
    ]:
        with pytest.raises(error, match=match):
            change()
    assert weights(m).keys() == before.keys() and [r.name for r in pf.status(m).adapters] == ["one", "two"]
    same(m(x), net.apply(a, x))


def test_an_adapter_that_another_thread_uses_stays() -> None:
    net, _, m, _ = two_layers()
    pf.attach_(m, "two", random(net, 1))
    inside, done = threading.Event(), threading.Event()

    def run() -> None:
        with m.use("two"):
            inside.set()
            done.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(60)
    for change in (pf.detach_, pf.offload_):
        with pytest.raises(ValueError, match="'two' is active"):
            change(m, "two")
    done.set()
    thread.join()
    pf.detach_(m, "two")


def test_several_active_adapters_of_other_nets() -> None:
    net, a, m, x = two_layers()
    b = random(net, 1)
    pf.attach_(m, "two", b)
    other = pf.adapt(net.model, {"0.weight": DoRA(3)})
    c = random(other, 2)
    pf.attach_(m, "other", (other, c))
    deltas = [net.delta(a), net.delta(b), other.delta(c)]
    params = {k: p.detach().clone() for k, p in net.model.named_parameters()}
    for delta in deltas:
        for k, d in delta.items():
            params[k] += d
    m.use_(["one", "two", "other"])
    same(m(x), functional_call(net.model, params, (x,)))
    with m.use(["two", "one"]):
        same(m(x), net.apply(pf.add(a, b), x))
        same(dict(pf.merged(m))["2.weight"], net.merge(pf.add(a, b))["2.weight"])
        with pytest.raises(ValueError, match="2 adapters are active; say which"):
            pf.adapter_of(m)
    with m.use([]):
        same(m(x), net.model(x))
    with pytest.raises(ValueError, match="'other' is active, or is the default"):
        pf.detach_(m, "other")
    for names, error, match in [
        (["one", "one"], ValueError, "a name twice"),
        (["one", "tow"], KeyError, "no adapter 'tow'; near: two"),
        (["one", 2], TypeError, "neither a name nor a list of names"),
    ]:
        with pytest.raises(error, match=match), m.use(names):
            pass
    wrong: list[Any] = [[1.0], 1.0, ["1", 2], [1.0, float("nan")], [True, 1.0], [torch.ones(()), 1.0]]
    for weights in wrong:
        with pytest.raises(ValueError, match=r"use: weights (is|has) .*number"), m.use(["one", "two"], weights):
            pass
    with m.use(["one", "two", "other"], [0.5, 2, -1]):  # a site that "other" does not adapt, and two methods at one
        for k, p in net.model.named_parameters():
            params[k] = p.detach() + sum(s * d[k] for s, d in zip((0.5, 2, -1), deltas, strict=True) if k in d)
        same(m(x), functional_call(net.model, params, (x,)))
        with m.use("one", [2.0]):
            same(m(x), net.apply(pf.scale(a, 2.0), x))
        same(m(x), functional_call(net.model, params, (x,)))
    for k, p in net.model.named_parameters():
        params[k] = p.detach() + sum(d[k] for d in deltas if k in d)
    same(m(x), functional_call(net.model, params, (x,)))


def test_several_active_adapters_compile_and_recompute() -> None:
    torch._dynamo.reset()
    net, a, m, x = two_layers()
    b = random(net, 1)
    pf.attach_(m, "two", b)
    counter = CompileCounterWithBackend("eager")
    compiled, want = torch.compile(m, fullgraph=True, backend=counter), net.apply(pf.add(a, b), x)
    for _ in range(2):
        with m.use(["one", "two"]):
            same(compiled(x), want)
    assert counter.frame_count == 1
    tree = tree_map(lambda t: t.detach().clone().requires_grad_(), a)
    weighed = net.apply(pf.add(pf.scale(tree, 0.5), pf.scale(b, 2.0)), x)
    for _ in range(2):
        with m.use(["one", "two"], [0.5, 2.0]):
            same(compiled(x), weighed)
    assert counter.frame_count == 2
    parameters = leaves(parameters_of(m, "one"))
    with m.use(["one", "two"], [0.5, 2.0]):
        y = checkpoint(m, x, use_reentrant=False, context_fn=m.checkpoint_context)
    for g, h in zip(gradients(y, parameters), gradients(weighed, leaves(tree)), strict=True):
        same(g, h)
    with m.use(["one", "two"]):
        direct = gradients(m(x), parameters)
        y = checkpoint(m, x, use_reentrant=False, context_fn=m.checkpoint_context)
    for g, h in zip(gradients(y, parameters), direct, strict=True):
        same(g, h)


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_peft_s_active_adapters_are_ours() -> None:
    """PEFT's set_adapter of a list, with ranks that differ, is `use_` of that list."""
    made = [peft.LoraConfig(r=r, lora_alpha=4, target_modules=["0", "2"]) for r in (2, 3)]
    model = by_name["mlp"].build()
    theirs = peft.LoraModel(copy.deepcopy(model), {"a": made[0]}, "a")
    theirs.peft_config["b"] = made[1]
    theirs.inject_adapter(theirs.model, "b")
    for k, p in theirs.named_parameters():
        p.requires_grad_("lora_" in k)
    randomised(theirs)  # what trains
    x, nets = noise(3, 8), {r: pf.adapt(model, {"weight": LoRA(r, alpha=4)}) for r in (2, 3)}
    adapters = []
    for name, net in zip("ab", nets.values(), strict=True):
        layers = {site: theirs.model.get_submodule(site.rpartition(".")[0]) for site in net.plan}
        adapters.append({s: {"a": q.lora_A[name].weight, "b": q.lora_B[name].weight} for s, q in layers.items()})
    m = pf.as_module(nets[2], a=adapters[0], b=(nets[3], adapters[1]))
    for names in (["a", "b"], ["b"], ["a"]):
        theirs.set_adapter(names)
        m.use_(names)
        same(m(x), theirs(x))
