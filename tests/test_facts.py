"""What was measured to go wrong, or could: each test is named for what it guards."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import by_name, llama, noise, tokens
from test_models import call, close, random, same_state, state, trees_close
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import peftfn as pf
from peftfn import DoRA, Full, LoRA

ids = lambda n=3: tokens(n)  # noqa: E731


def mlp() -> nn.Module:
    return by_name["mlp"].build()


class Net(nn.Module):
    """A linear layer, called `f`, in a forward given as a function of the module and x."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **parts: Any):
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g, self.body = nn.Linear(8, 8), nn.Linear(8, 8), forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


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


STATEFUL = {
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
    net = pf.adapt(model, {"f": LoRA(2)})
    a, x, before = random(net), noise(3, 8), state(model)
    torch.manual_seed(1)
    first = net.apply(a, x)
    vmap(net.apply, (0, None), randomness="different")(pf.stack([a, a]), 7 * x)
    torch.manual_seed(1)
    assert torch.equal(net.apply(a, x), first)
    assert same_state(before, state(model))


def test_a_forward_that_writes_its_own_weight_is_told() -> None:
    def clamped(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            m.g.weight.clamp_(-0.01, 0.01)
        return m.f(x) + m.g(x)

    model = Net(clamped)
    net = pf.adapt(model, {"f": LoRA(2)})
    with pytest.raises(RuntimeError, match=r"g\.weight: the model's own forward writes this parameter"):
        net.apply(net.init(), noise(3, 8))
    before = state(model)
    copies = {"g.weight": model.g.weight.detach().clone()}
    net.apply(net.init(), noise(3, 8), params=copies)  # the cure that the error names
    assert same_state(before, state(model))


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
