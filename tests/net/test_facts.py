"""What was measured to go wrong, or could: each test is named for what it guards."""

import copy
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from models import by_name, llama, noise, tokens
from support import Net, call, close, random, same_state, state, trees_close
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import peftfn as pf
from peftfn import DoRA, Full, LoRA
from peftfn.testing.purity import held, unchanged

ids = lambda n=3: tokens(n)  # noqa: E731


def mlp() -> nn.Module:
    return by_name["mlp"].build()


def merged_is_applied(model: nn.Module, net: pf.Adapted, x: Tensor, seed: int = 1) -> None:
    a = random(net, seed)
    close(net.apply(a, x), call(model, net.merge(a), (x,), {}))


# Threads, shared and tied slots, names.


def test_eight_threads_on_one_base_with_a_shared_submodule() -> None:
    model = by_name["shared"].build()
    net = pf.adapt(model, {"first": DoRA(2), "norm": Full()})
    x, before = noise(4, 8), state(model)
    many = [random(net, s) for s in range(8)]
    want = [net.apply(a, x) for a in many]
    wrong: list[Any] = []

    def work(i: int) -> None:
        for n in range(40):
            k = (i + n) % 8
            leaf = tree_map(lambda t: t.clone().requires_grad_(), many[k])
            y = net.apply(leaf, x)
            y.sum().backward()
            if not torch.equal(y, want[k]) or leaf["first.weight"]["b"].grad is None:
                wrong.append((i, n))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert not wrong
    assert same_state(before, state(model))


def test_a_shared_submodule_is_one_site_under_either_name() -> None:
    model = by_name["shared"].build()
    first, second = (pf.adapt(model, {name: LoRA(2)}) for name in ("first", "second"))
    assert list(first.plan) == list(second.plan) == ["first.weight"]
    merged = first.merge(random(first))
    assert merged["first.weight"] is merged["second.weight"]
    merged_is_applied(model, first, noise(3, 8))


def test_misspelt_names_are_key_errors_with_near_misses() -> None:
    model = by_name["tied"].build()
    net = pf.adapt(model, {"mid": LoRA(2)})
    a = net.init()
    with pytest.raises(KeyError, match=r"mid\.wieght.*near.*mid\.weight"):
        net.apply({"mid.wieght": a["mid.weight"]}, ids())
    with pytest.raises(KeyError, match=r"heda\.weight.*near.*head\.weight"):
        net.apply(a, ids(), params={"heda.weight": model.embed.weight})
    with pytest.raises(KeyError, match=r"embed\.weight"):
        net.apply(a | {"embed.weight": a["mid.weight"]}, ids())
    with pytest.raises(KeyError, match=r"mid\.weight"):
        net.apply({}, ids())
    close(net.apply(a, ids()), model(ids()))


def test_the_order_of_dicts_does_not_matter() -> None:
    model = by_name["bert"].build()
    net = pf.adapt(model, {r"query|value|LayerNorm": Full()})
    a, b = random(net, 1), random(net, 2)
    turned = {n: dict(reversed(leaf.items())) for n, leaf in reversed(a.items())}
    assert list(turned) != list(a)
    x = ids()
    want = net.apply(a, x).last_hidden_state
    assert torch.equal(net.apply(turned, x).last_hidden_state, want)
    got = vmap(lambda a: net.apply(a, x).last_hidden_state)(pf.stack([turned, b]))
    close(got[0], want)
    got = net.mixed(pf.stack([b, turned]), [1, 1, 0], x).last_hidden_state
    close(got[:2], want[:2])
    loss = lambda a: net.apply(a, x).last_hidden_state.square().sum()  # noqa: E731
    trees_close(grad(loss)(turned), grad(loss)(a))
    assert all(torch.equal(net.merge(turned)[n], t) for n, t in net.merge(a).items())


# What a forward pass writes stays out of the base, and out of the next call.


def test_batchnorm_in_train_mode_leaves_its_statistics_alone() -> None:
    model = by_name["convs"].build().train()
    net = pf.adapt(model, {r"one|two|three": LoRA(2)})
    a, x, before = random(net), noise(3, 4, 12), state(model)
    first = net.apply(a, x)
    assert torch.equal(net.apply(a, x), first)
    net.apply(a, 5 * x)
    assert same_state(before, state(model))
    model.eval()
    close(net.apply(net.init(), x), model(x))


def lazy_cache(m: Any, x: Tensor) -> Tensor:
    if m.cache is None:
        m.cache = x.mean(0)
    return m.f(x) + m.cache


def lazy_buffer(m: Any, x: Tensor) -> Tensor:
    if "late" not in m._buffers:
        m.register_buffer("late", x.mean(0))
    return m.f(x) + m.late


def counter(m: Any, x: Tensor) -> Tensor:
    m.seen.append(1)
    return m.f(x) * len(m.seen)


def number(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    return m.f(x) * m.calls


def tensor_in_place(m: Any, x: Tensor) -> Tensor:
    m.total += x.sum()
    return m.f(x) * m.total


def new_submodule(m: Any, x: Tensor) -> Tensor:
    if not hasattr(m, "late"):
        m.late = nn.Linear(8, 8)
        nn.init.constant_(m.late.weight, float(x.detach().sum()))
    return m.f(x) + m.late(x)


def lazy_hook(m: Any, x: Tensor) -> Tensor:
    if not m.hooked:
        total = float(x.detach().sum())
        m.f.register_forward_hook(lambda m, x, y: y + total)
        m.hooked = True
    return m.f(x)


def another_hook(m: Any, x: Tensor) -> Tensor:
    m.f.register_forward_pre_hook(lambda m, x: (2 * x[0],))
    return m.f(x)


def hook_taken_off(m: Any, x: Tensor) -> Tensor:
    handle = m.f.register_forward_hook(lambda m, x, y: 2 * y)
    y = m.f(x)
    handle.remove()
    return y + m.f(x)


def handle_kept(m: Any, x: Tensor) -> Tensor:
    if m.handle is not None:
        m.handle.remove()
    m.handle = m.f.register_forward_hook(lambda m, x, y: y * len(m._forward_hooks))
    return m.f(x)


def replaced_child(m: Any, x: Tensor) -> Tensor:
    y = m.f(m.g(x))
    m.g = nn.Identity()
    return y


STATEFUL = {
    "hook": (lazy_hook, {"hooked": False}),
    "another hook": (another_hook, {}),
    "hook taken off": (hook_taken_off, {}),
    "hook by its handle": (handle_kept, {"handle": None}),
    "a child replaced": (replaced_child, {}),
    "attribute": (lazy_cache, {"cache": None}),
    "empty buffer": (lazy_cache, {"cache": "buffer"}),
    "new buffer": (lazy_buffer, {}),
    "list": (counter, {"seen": []}),
    "number": (number, {"calls": 0}),
    "plain tensor": (tensor_in_place, {"total": torch.zeros(())}),
    "new submodule": (new_submodule, {}),
}


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_call_does_not_depend_on_the_calls_before(kind: str) -> None:
    body, parts = copy.deepcopy(STATEFUL[kind])
    buffers = [k for k, v in parts.items() if isinstance(v, str)]
    model = Net(body, **{k: v for k, v in parts.items() if k not in buffers})
    [model.register_buffer(k, None) for k in buffers]
    net, other = pf.adapt(model, {"f": LoRA(2)}), pf.adapt(copy.deepcopy(model), {"f": LoRA(2)})
    a, x, before = random(net), noise(3, 8), state(model)
    net.apply(a, 5 * x)
    vmap(net.apply, (0, None), randomness="same")(pf.stack([a, a]), 7 * x)
    torch.manual_seed(1)
    got = net.apply(a, x)
    torch.manual_seed(1)
    assert torch.equal(got, other.apply(a, x)), "not what a net gives whose first call this is"
    assert same_state(before, state(model))


@pytest.mark.parametrize("eager", [True, False], ids=["after the base's own call", "before it"])
def test_hidden_states_and_attentions_are_asked_for_twice_and_the_base_stays_as_it_is(eager: bool) -> None:
    """transformers installs hooks in the first call that asks for them."""
    model = llama().eval()
    ask = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    if eager:
        model(ids(), **ask)
    net = pf.adapt(model, {"q_proj": LoRA(2)})
    a, before = random(net), held(model)
    for _ in range(2):
        got = net.apply(a, ids(), **ask)
        assert (len(got.hidden_states), len(got.attentions)) == (3, 2)
        net.apply(a, ids())
        with pytest.raises(TypeError):
            net.apply(a, ids(), no_such_argument=object(), labels=3, **ask)
        assert len(pf.as_module(net, a)(ids(), **ask).hidden_states) == 3
    unchanged(held(model), before)
    want = model(ids(), **ask)
    assert (len(want.hidden_states), len(want.attentions)) == (3, 2)
    got = net.apply(net.init(), ids(), **ask)
    [close(g, w) for g, w in zip(got.hidden_states + got.attentions, want.hidden_states + want.attentions, strict=True)]


def test_a_hook_that_is_bound_to_a_module_acts_on_the_copy_and_any_other_on_what_its_owner_has() -> None:
    class Counting(nn.Linear):
        calls = 0

        def count(self, *_: Any) -> None:
            self.calls += 1

    model, seen = Net(lambda m, x: m.f(x), f=Counting(8, 8)), []
    model.f.register_forward_hook(model.f.count)
    model.f.register_forward_hook(partial(lambda layer, *_: setattr(layer, "late", 1), model.g))
    model.g.register_load_state_dict_pre_hook(lambda layer, *_: seen.append(layer))
    net = pf.adapt(model, {"f": LoRA(2)})
    a, before = random(net), held(model)
    model.f.register_forward_hook(lambda *_: seen.append(1))
    before |= held(model)
    m = pf.as_module(net, a)
    net.apply(a, noise(3, 8)), m(noise(3, 8))
    assert seen == [1, 1] and m.f.calls == 1
    unchanged(held(model), before)
    m.g.load_state_dict(model.g.state_dict())
    assert seen[2] is m.g


def by_data(m: Any) -> None:
    m.weight.data.clamp_(min=0)


def by_new_data(m: Any) -> None:
    m.weight.data = torch.renorm(m.weight.data, 2, 0, 0.1)


def by_detached(m: Any) -> None:
    m.weight.detach().mul_(0.5)


@torch.no_grad()
def in_place(m: Any) -> None:
    m.weight.clamp_(-0.01, 0.01)


@torch.no_grad()
def a_row(m: Any) -> None:
    m.weight[0].zero_()
    m.weight[1] = 1


@torch.no_grad()
def by_a_function(m: Any) -> None:
    nn.init.zeros_(m.weight)
    torch.add(m.weight, 0.5, out=m.weight)


def hidden(m: Any) -> None:
    getattr(getattr(m, "weight"), "data").clamp_(min=0)  # noqa: B009


WRITES = [by_data, by_new_data, by_detached, in_place, a_row, by_a_function, hidden]


def writing(write: Callable[[Any], None]) -> nn.Module:
    class Writing(nn.Linear):
        keep_in_bounds = write

        def forward(self, x: Tensor) -> Tensor:
            self.keep_in_bounds()
            return super().forward(x)

    return Net(lambda m, x: m.f(m.g(x)), g=Writing(8, 8))


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
def test_what_a_forward_writes_to_its_weights_stays_in_the_call(write: Callable[[Any], None]) -> None:
    """Layers that keep their weights in bounds (max-norm, non-negative), where no rule adapts them."""
    model, x = writing(write), noise(3, 8)
    net = pf.adapt(model, {"f": LoRA(2)})
    a, before = random(net), held(model)
    plain = copy.deepcopy(model)
    plain.load_state_dict(net.merge(a))
    want = plain(x)
    runs = [lambda: net.apply(a, x), lambda: net.mixed(pf.stack([a]), [0] * 3, x)]
    runs += [lambda: vmap(net.apply, (0, None))(pf.stack([a, a]), x)[1]]
    if write is not hidden:  # a view and compiled code go by the look of the forward's code
        runs += [lambda: pf.as_module(net, a)(x)]
    for run in runs:
        close(run(), want)
        unchanged(held(model), before)
    if write in (by_data, in_place, a_row):
        torch._dynamo.reset()
        close(torch.compile(net.apply, fullgraph=True, backend="eager")(a, x), want)
        z = x.clone().requires_grad_()
        close(grad(lambda x: net.apply(a, x).square().sum())(x), torch.autograd.grad(plain(z).square().sum(), z)[0])
    unchanged(held(model), before)


@pytest.mark.parametrize("write", [w for w in WRITES if w is not by_a_function], ids=lambda f: f.__name__)
def test_a_write_to_an_adapted_weight_is_an_error_before_it_is_lost(write: Callable[[Any], None]) -> None:
    model, x = writing(write), noise(3, 8)
    net = pf.adapt(model, {"g": LoRA(2)})
    a, before = random(net), held(model)
    torch._dynamo.reset()
    compiled = torch.compile(net.apply, fullgraph=True, backend="eager")
    for run in (lambda: net.apply(a, x), lambda: pf.as_module(net, a)(x), lambda: compiled(a, x)):
        with pytest.raises(RuntimeError, match=r"g\.weight: .*writ"):
            run()
    unchanged(held(model), before)


def test_a_forward_that_reads_an_adapted_weight_through_data_or_detach_reads_the_adapted_value() -> None:
    model, x = Net(lambda m, x: x @ m.f.weight.data.t() + F.linear(x, m.f.weight.detach().clone().mul_(2))), noise(3, 8)
    net = pf.adapt(model, {"f.weight": LoRA(2)})
    a = random(net)
    close(net.apply(a, x), 3 * F.linear(x, net.merge(a)["f.weight"]))
    with torch.no_grad():
        close(net.apply(a, x).add_(0), 3 * F.linear(x, net.merge(a)["f.weight"]))
    close(pf.as_module(net, a)(x), net.apply(a, x))
    torch._dynamo.reset()
    both = pf.stack([a, net.init()])
    for run in (net.apply, lambda a, x: vmap(net.apply, (0, None))(both, x)[0]):
        close(torch.compile(run, fullgraph=True, backend="eager")(a, x), net.apply(a, x))


class _Bounded(nn.Linear):
    """Writes to its weight if told so; in each of the other lines it looks as if it did."""

    bounded = False

    def forward(self, x: Tensor) -> Tensor:
        if self.bounded:
            self.weight.data.clamp_(min=0)
        scale = self.weight.detach().norm(dim=1).clamp_(min=1e-6)
        with torch.no_grad():
            scale.add_(self.weight.abs().sum(1)).sub_(self.weight.data.abs().sum(1))
        return super().forward(x).div_(scale)


def test_a_forward_that_could_write_to_its_weight_and_does_not_is_no_error() -> None:
    model, x = Net(lambda m, x: m.g(x), g=_Bounded(8, 8)), noise(3, 8)
    net = pf.adapt(model, {"g": LoRA(2)})
    a = random(net)
    want = copy.deepcopy(model)
    want.load_state_dict(net.merge(a))
    torch._dynamo.reset()
    for run in (net.apply, torch.compile(net.apply, fullgraph=True, backend="eager")):
        close(run(a, x), want(x))
    close(pf.as_module(net, a)(x), want(x))


def test_a_view_shares_the_weights_that_a_forward_only_reads() -> None:
    """Experts that add up their outputs in place are the largest weights of a model, and must not be copied."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(noise(2, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            out = torch.zeros_like(x)
            for e in range(2):
                current = self.w[e].t()
                out.index_add_(0, torch.arange(len(x)), x @ current)
            out[0] = out[0] + x[0] @ self.w[0]
            return out.mul_(2)

    model = Net(lambda m, x: m.f(m.experts(x)), experts=Experts())
    m = pf.as_module(net := pf.adapt(model, {"f": LoRA(2)}), net.init())
    assert m.experts.w.data_ptr() == model.experts.w.data_ptr()


def test_a_write_that_cannot_be_foreseen_is_told() -> None:
    def clamped(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            torch.clamp_(m.g.weight, -0.01, 0.01)
        return m.f(x) + m.g(x)

    model = Net(clamped)
    net = pf.adapt(model, {"f": LoRA(2)})
    with pytest.raises(RuntimeError, match=r"g\.weight: the model's own forward writes this parameter"):
        net.apply(net.init(), noise(3, 8))
    before = state(model)
    copies = {"g.weight": model.g.weight.detach().clone()}
    net.apply(net.init(), noise(3, 8), params=copies)  # the cure that the error names
    assert same_state(before, state(model))


class _Tying(nn.Module):
    """Ties by assignment, as some models do to survive a move to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        self.head.weight = self.embed.weight
        out: Tensor = self.head(self.mid(self.embed(ids)))
        return out


@pytest.mark.parametrize("tied", [False, True], ids=["first tied in the call", "tied already"])
@pytest.mark.parametrize("rule", ["mid", "embed", "head", "embed|head"])
def test_a_forward_that_ties_by_assignment_is_right_or_told(rule: str, tied: bool) -> None:
    model, x = _Tying(), ids() % 10
    if tied:
        model(x)
    net = pf.adapt(model, {rule: LoRA(2)})
    a, before = random(net), held(model)
    for run in (lambda: net.apply(a, x), lambda: pf.as_module(net, a)(x)):
        if rule == "mid":
            plain = copy.deepcopy(model)
            plain.load_state_dict(net.merge(a))
            close(run(), plain(x))
        else:
            with pytest.raises((RuntimeError, TypeError), match=r"(embed|head)\.weight.* (forward|when the model)"):
                run()
        unchanged(held(model), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_forward_that_moves_a_layer_to_a_dtype(dtype: torch.dtype) -> None:
    """Routers do: `self.layer = self.layer.to(torch.float32)`."""

    def routed(m: Any, x: Tensor) -> Tensor:
        m.f, m.g = m.f.to(dtype), m.g.to(dtype)
        return m.g(m.f(x.to(dtype)))

    for rules in ({"f": LoRA(2)}, {"f|g": DoRA(2)}):
        model, x = Net(routed), noise(3, 8)
        net = pf.adapt(model, rules)
        a, before = random(net), held(model)
        plain = copy.deepcopy(model)
        plain.load_state_dict(net.merge(a))
        want = plain(x)
        close(net.apply(a, x), want)
        assert net.apply(a, x).dtype == dtype
        close(pf.as_module(net, a)(x), want)
        unchanged(held(model), before)


def test_an_exception_inside_forward_leaves_everything_usable() -> None:
    def picky(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.f(x))
        m.left = y
        if y.shape[0] == 2:
            raise ZeroDivisionError("two rows")
        return y

    model = Net(picky, norm=nn.BatchNorm1d(8)).eval()
    net = pf.adapt(model, {"f": DoRA(2), "norm": Full()})
    a, x = random(net), noise(4, 8)
    want, before = net.apply(a, x), state(model)
    for run in (lambda: net.apply(a, x[:2]), lambda: net.mixed(pf.stack([a, a]), [0, 1], x[:2])):
        with pytest.raises(ZeroDivisionError):
            run()
    with pytest.raises(RuntimeError):
        net.apply(a, x[:, :3])
    assert torch.equal(net.apply(a, x), want)
    assert same_state(before, state(model))


def test_a_forward_that_calls_the_same_net() -> None:
    inner: list[Any] = []

    def nested(m: Any, x: Tensor) -> Tensor:
        y = m.f(x)
        if inner:
            net, a, b = inner
            inner.clear()
            y = y + net.apply(b, y) + net.apply(a, y)
            inner.extend((net, a, b))
        return torch.tanh(m.g(y))

    model = Net(nested)
    net = pf.adapt(model, {"f": LoRA(2), "g": Full()})
    a, b, x = random(net, 1), random(net, 2), noise(3, 8)
    plain = lambda a, x: torch.tanh(F.linear(F.linear(x, wa[a]["f.weight"], wa[a]["f.bias"]), *rest[a]))  # noqa: E731
    wa = [net.merge(a), net.merge(b)]
    rest = [(w["g.weight"], w["g.bias"]) for w in wa]
    y = F.linear(x, wa[0]["f.weight"], wa[0]["f.bias"])
    want = torch.tanh(F.linear(y + plain(1, y) + plain(0, y), *rest[0]))
    inner.extend((net, a, b))
    close(net.apply(a, x), want)


# Gradient checkpointing.


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # and is what most code calls
@pytest.mark.parametrize("when", ["before adapt", "after adapt"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(when: str, reentrant: bool) -> None:
    def gradients(checkpointing: bool) -> Any:
        torch.manual_seed(0)
        model = llama(attention_dropout=0.2).train()
        on = lambda: model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # noqa: E731
        if checkpointing and when == "before adapt":
            on()
        net = pf.adapt(model, {"q_proj": LoRA(2), r"norm|down_proj": Full()})
        many = [tree_map(lambda t: t.requires_grad_(), random(net, s)) for s in (1, 2)]
        net.apply(many[0], ids())
        if checkpointing and when == "after adapt":
            on()
        torch.manual_seed(3)
        losses = [net.apply(a, ids(), use_cache=False).logits.square().mean() for a in many]
        net.apply(random(net, 5), ids(), use_cache=False)
        for loss in losses:  # other calls lie between forward and backward
            loss.backward()
        assert all(p.grad is None for p in model.parameters())
        return [tree_map(lambda t: t.grad, a) for a in many]

    for got, want in zip(gradients(True), gradients(False), strict=True):
        trees_close(got, want, 1e-6)


def blocks(reentrant: bool, again: list[Any], params: bool) -> Callable[[Any, Tensor], Tensor]:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.f(x) if params else checkpoint(m.f, x, use_reentrant=reentrant)
        [run() for run in again]
        return checkpoint(m.g, y, use_reentrant=reentrant).square().sum()

    return forward


def own_checkpoint(case: str, reentrant: bool) -> tuple[list[Tensor], list[Tensor], nn.Module]:
    """Gradients of a model that checkpoints by itself, and the right ones."""
    again: list[Any] = []
    model = Net(blocks(reentrant, again, case == "params"))
    rules: dict[str, Any] = {"f": LoRA(2)} if case == "params" else {r"f|g": LoRA(2)}
    net = pf.adapt(model, rules)
    a = tree_map(lambda t: t.requires_grad_(), random(net, 1))
    other = random(net, 2)
    params = {n: (2 * p.detach()).requires_grad_() for n, p in model.named_parameters()} if case == "params" else None
    x = noise(3, 8).requires_grad_()
    inputs = [x, *(t for leaf in a.values() for t in leaf.values()), *(params or {}).values()]
    weights = net.merge(a) if params is None else None
    plain = lambda w: F.linear(F.linear(x, w["f.weight"], w["f.bias"]), w["g.weight"], w["g.bias"])  # noqa: E731
    if params is not None:
        low = a["f.weight"]["b"] @ a["f.weight"]["a"]
        weights = params | {"f.weight": params["f.weight"] + low}
    assert weights is not None
    want = torch.autograd.grad(plain(weights).square().sum(), inputs)
    loss = net.apply(a, x, params=params)
    if case == "during another call":
        done: list[Any] = []

        def late() -> None:
            if not done:
                done.append(1)
                done.append(torch.autograd.grad(loss, inputs) if not reentrant else loss.backward())

        again.append(late)
        net.apply(other, x)
        again.clear()
    else:
        loss.backward()
    got = done[1] if case == "during another call" and not reentrant else [t.grad for t in inputs]
    return list(got), list(want), model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["plain", "params", "during another call"])
def test_a_models_own_checkpoint_is_an_error_or_right_never_a_wrong_gradient(case: str, reentrant: bool) -> None:
    try:
        got, want, model = own_checkpoint(case, reentrant)
    except (RuntimeError, TypeError) as e:
        message = str(e)
    else:
        for g, w in zip(got, want, strict=True):
            close(g, w)
        assert all(p.grad is None for p in model.parameters())
        return
    assert "checkpoint" in message
    assert "checkpointing_enable" in message


def test_a_checkpointed_block_without_sites_is_an_error_and_leaves_no_gradient_on_the_base() -> None:
    model = Net(lambda m, x: checkpoint(m.g, m.f(x), use_reentrant=True))
    net = pf.adapt(model, {"f": LoRA(2)})
    a = tree_map(lambda t: t.requires_grad_(), random(net))
    with pytest.raises(RuntimeError, match=r"g\.weight: used after its call"):
        net.apply(a, noise(3, 8)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
