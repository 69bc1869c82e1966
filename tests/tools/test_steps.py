"""pf.steps: torch's and PEFT's optimizers where there are such, and the laws that the papers claim."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from models import by_name, tokens
from peft.optimizers import create_riemannian_optimizer
from support import random, trees_close
from torch import Tensor, nn
from torch.func import grad, vmap

import peftfn as pf
from peftfn.testing import close

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore:`is_gradient_checkpointing`")
S = pf.steps
SITE = "0.weight"
ALL: dict[str, Callable[[Any, Any], Any]] = {
    "sgd": lambda net, lr: S.sgd(lr),
    "adamw": lambda net, lr: S.adamw(lr, weight_decay=0.1),
    "lora_plus": lambda net, lr: S.chain(S.adamw(lr), S.lora_plus(4.0)),
    "lora_fa": lambda net, lr: S.chain(S.lora_fa(net), S.adamw(lr)),
    "riemannian": lambda net, lr: S.chain(S.riemannian(net), S.sgd(lr)),
    "lora_pro": lambda net, lr: S.chain(S.lora_pro(net), S.adamw(lr)),
    "lora_rite": lambda net, lr: S.lora_rite(net, lr, weight_decay=0.1),
    "lora_muon": lambda net, lr: S.lora_muon(net, lr, weight_decay=0.1),
    "loft": lambda net, lr: S.loft(net, lr, weight_decay=0.1),
}


def made(rank: int = 3, out: int = 6, in_: int = 8, **fields: Any) -> tuple[pf.Adapted, Any, Any]:
    """A net in fp64 with a random adapter, and a loss of the weight it makes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(in_, out, bias=False)).double()
    net = pf.adapt(model, {SITE: pf.LoRA(rank=rank, alpha=2.0 * rank, **fields)})
    a = random(net, dtype=torch.float64, scale=0.5)
    x, target = torch.randn(20, in_).double(), torch.randn(20, out).double()
    return net, a, lambda a, params=None: (net.apply(a, x, params=params) - target).square().mean()


def run(step: Any, a: Any, loss: Any, n: int = 4) -> list[Any]:
    """The adapters after each of n steps."""
    state, out = step.init(a), []
    for _ in range(n):
        updates, state = step.update(grad(loss)(a), state, a)
        a = S.apply(a, updates)
        out.append(a)
    return out


def weight(net: pf.Adapted, a: Any) -> Tensor:
    return net.delta(a)[SITE]


def turned(a: Any, t: Tensor) -> Any:
    """Another factoring of the same product."""
    leaf = a[SITE]
    return {SITE: {"a": t @ leaf["a"], "b": leaf["b"] @ torch.linalg.inv(t)}}


# What torch and PEFT do.


def test_adamw_is_torchs() -> None:
    _, a, loss = made()
    leaf = {k: t.clone().requires_grad_() for k, t in a[SITE].items()}
    optimizer = torch.optim.AdamW(leaf.values(), lr=0.03, weight_decay=0.1)
    for after in run(S.adamw(0.03, weight_decay=0.1), a, loss):
        optimizer.zero_grad()
        loss({SITE: leaf}).backward()
        optimizer.step()
        trees_close(after, {SITE: {k: t.detach() for k, t in leaf.items()}}, tol=1e-6)


def test_lora_plus_is_the_groups_of_optim() -> None:
    net = pf.adapt(by_name["llama"].build(), {"q_proj": pf.LoRA(2), "v_proj": pf.DoRA(2), "norm": pf.Full()})
    a, x = random(net), tokens(2)
    tree = {s: {k: t.clone().requires_grad_() for k, t in leaf.items()} for s, leaf in a.items()}
    optimizer = torch.optim.AdamW(pf.optim.lora_plus(tree, 1e-3, 8.0, net=net), weight_decay=0.0)
    net.apply(tree, x, labels=x).loss.backward()
    optimizer.step()
    (got,) = run(S.chain(S.adamw(1e-3), S.lora_plus(8.0)), a, lambda a: net.apply(a, x, labels=x).loss, n=1)
    trees_close(got, {s: {k: t.detach() for k, t in leaf.items()} for s, leaf in tree.items()}, tol=1e-6)


def test_riemannian_is_pefts() -> None:
    net = pf.adapt(by_name["llama"].build(), {"q_proj|v_proj": pf.LoRA(rank=2, alpha=6.0)})
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    theirs, x, a = peft.get_peft_model(by_name["llama"].build(), config), tokens(2), random(net)
    named, key = dict(theirs.named_parameters()), "base_model.model.{}.lora_{}.default.weight"
    with torch.no_grad():
        for site, leaf in a.items():
            for k, t in leaf.items():
                named[key.format(site.removesuffix(".weight"), k.upper())].copy_(t)
    optimizer = create_riemannian_optimizer(theirs, torch.optim.SGD, lr=0.1, reg=1e-2)
    theirs(x, labels=x).loss.backward()
    optimizer.step()
    step = S.chain(S.riemannian(net, damping=1e-2), S.sgd(0.1))
    (got,) = run(step, a, lambda a: net.apply(a, x, labels=x).loss, n=1)
    for site, leaf in got.items():
        for k, t in leaf.items():
            close(t, named[key.format(site.removesuffix(".weight"), k.upper())].detach(), site)


def test_lora_fa_is_the_rule_of_optim() -> None:
    net, a, loss = made()
    g = grad(loss)(a)
    updates, _ = S.lora_fa(net).update(g, {}, a)
    trees_close(updates, pf.optim.lora_fa(net, a, g), tol=1e-12)


# What papers claim.


@pytest.mark.parametrize("name", ["riemannian", "lora_pro", "lora_muon"])
def test_one_step_does_not_see_how_the_product_is_factored(name: str) -> None:
    net, a, loss = made()
    rules = {"riemannian": S.chain(S.riemannian(net, damping=0.0), S.sgd(0.1)), "lora_muon": S.lora_muon(net, 0.1)}
    step = rules.get(name) or S.chain(S.lora_pro(net, damping=0.0), S.sgd(0.1))
    t = torch.randn(3, 3, generator=torch.Generator().manual_seed(5)).double()
    small = torch.eye(3).double() * 1e-3
    near = [weight(net, run(step, turned(a, u), loss, 1)[0]) for u in (torch.eye(3).double(), small.inverse())]
    first = weight(net, a)
    # the product of the two updates is of second order, and depends on the factoring
    linear = []
    for u in (torch.eye(3).double(), small.inverse(), t):
        b = turned(a, u)
        updates, _ = step.update(grad(loss)(b), step.init(b), b)
        s, leaf, d = 2.0, b[SITE], updates[SITE]
        linear.append(s * (leaf["b"] @ d["a"] + d["b"] @ leaf["a"]))
    close(linear[1], linear[0], "scaled", rtol=1e-8)
    close(linear[2], linear[0], "turned", rtol=1e-8)
    assert all((n - first).norm() > 1e-3 for n in near)


@pytest.mark.parametrize("kind", ["scaled", "turned"])
def test_lora_rite_does_not_see_how_the_product_is_factored(kind: str) -> None:
    """Over several steps, its moments too; plain AdamW does."""
    net, a, loss = made()
    t = torch.eye(3).double() * 30
    if kind == "turned":
        t = torch.randn(3, 3, generator=torch.Generator().manual_seed(5)).double()
    for step, same in ((S.lora_rite(net, 1e-4, eps=0.0), True), (S.adamw(1e-4), False)):
        one, two = (run(step, b, loss, 3)[-1] for b in (a, turned(a, t)))
        moved = weight(net, one) - weight(net, a)
        error = (weight(net, two) - weight(net, one)).norm() / moved.norm()
        assert (error < 2e-3) == same, error


def test_lora_pro_changes_the_weight_most_like_full_fine_tuning() -> None:
    """s(B g_A + g_B A) is the projection of G on what the factors reach: G − (I − P_B) G (I − P_A)."""
    net, a, loss = made()
    updates, _ = S.lora_pro(net, damping=0.0).update(g := grad(loss)(a), {}, a)
    x, d = a[SITE], updates[SITE]
    params = {SITE: net.weights[SITE].clone().requires_grad_()}
    (full,) = torch.autograd.grad(loss(a, params), params[SITE])
    b_side = torch.eye(6).double() - x["b"] @ torch.linalg.pinv(x["b"])
    a_side = torch.eye(8).double() - torch.linalg.pinv(x["a"]) @ x["a"]
    close(2.0 * (x["b"] @ d["a"] + d["b"] @ x["a"]), full - b_side @ full @ a_side, "projection", rtol=1e-8)
    # and of all such, they are the closest to g_A and g_B
    close((d["a"] - g[SITE]["a"]) @ x["a"].mT, x["b"].mT @ (d["b"] - g[SITE]["b"]), "nearest", rtol=1e-8)


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e2])
def test_lora_muon_moves_the_weight_by_its_learning_rate(rank: int, size: float) -> None:
    """Whatever the rank, the scale and the sizes of the factors: in the spectral norm."""
    net, a, loss = made(rank)
    a = turned(a, torch.eye(rank).double() * size)
    step = S.lora_muon(net, lr=1e-4)
    moved = torch.linalg.matrix_norm(weight(net, run(step, a, loss, 1)[0]) - weight(net, a), ord=2)
    assert 0.45e-4 < moved < 1.01e-4


def test_lora_muon_at_full_rank_is_muon() -> None:
    net, a, _ = made(rank=6, out=6, in_=6)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(2)).double()

    def other(a: Any) -> Tensor:
        return net.apply(a, x).pow(3).mean()

    params = {SITE: net.weights[SITE].clone().requires_grad_()}
    (g,) = torch.autograd.grad(net.apply(a, x, params=params).pow(3).mean(), params[SITE])
    u, _, vh = torch.linalg.svd(g)
    got = weight(net, run(S.lora_muon(net, lr=1e-6), a, other, 1)[0]) - weight(net, a)
    close(got * 1e6, -u @ vh, "muon", rtol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_loft_at_full_rank_is_adamw_on_the_weight(decay: float) -> None:
    net, a, _ = made(rank=6, out=6, in_=6)
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(2)).double()
    target = torch.randn(20, 6, generator=torch.Generator().manual_seed(3)).double()
    base = net.weights[SITE]
    w = weight(net, a).clone().requires_grad_()
    optimizer = torch.optim.AdamW([w], lr=0.02, weight_decay=decay)
    step = S.loft(net, 0.02, weight_decay=decay, damping=1e-12)
    after = run(step, a, lambda a: (net.apply(a, x) - target).square().mean(), 6)
    for b in after:
        optimizer.zero_grad()
        (x @ (base + w).mT - target).square().mean().backward()
        optimizer.step()
        close(weight(net, b), w.detach(), "AdamW", rtol=1e-5)


def test_loft_does_not_need_alpha_and_starts_from_zero() -> None:
    changes = []
    for alpha in (1.0, 16.0):
        net, _, _ = made()
        net = pf.adapt(net.model, {SITE: pf.LoRA(rank=3, alpha=alpha)})
        a = net.init(dtype=torch.float64)
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(2)).double()

        def f(a: Any, net: Any = net, x: Tensor = x) -> Tensor:
            return (net.apply(a, x) - 1).square().mean()

        after = run(S.loft(net, 0.01), a, f, 5)
        assert f(after[-1]) < f(a)
        changes.append(weight(net, after[0]))
    close(changes[0], changes[1], "alpha", rtol=1e-5)


# All of them.


@pytest.mark.parametrize("name", ALL)
def test_they_train_from_a_fresh_adapter(name: str) -> None:
    """With other methods beside, in fp32, and states that are plain trees."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    net = pf.adapt(model, {"0": pf.LoRA(rank=2, lora_bias=True), "1": pf.Full(), "2.weight": pf.DoRA(rank=2)})
    a, x = net.init(), torch.randn(16, 8, generator=torch.Generator().manual_seed(0))

    def loss(a: Any) -> Tensor:
        return (net.apply(a, x) - 1).square().mean()

    after = run(ALL[name](net, 0.01), a, loss, 12)
    assert loss(after[-1]) < loss(a)
    assert after[-1].keys() == a.keys() and all(
        t.isfinite().all() for leaf in after[-1].values() for t in leaf.values()
    )
    moved = {k for n in ("0.weight", "1.weight") for k in a[n] if not torch.equal(a[n][k], after[-1][n][k])}
    assert moved == {"b", "beta", "diff"} | ({"a"} if name != "lora_fa" else set())


@pytest.mark.parametrize("name", ALL)
def test_they_run_under_vmap_over_adapters_and_learning_rates(name: str) -> None:
    net, _, loss = made()
    many = [random(net, seed, dtype=torch.float64, scale=0.5) for seed in range(3)]
    rates = torch.tensor([1e-3, 1e-2, 3e-2]).double()

    def train(a: Any, lr: Tensor) -> Any:
        return run(ALL[name](net, lr), a, loss, 2)[-1]

    stacked = vmap(train)(pf.stack(many), rates)
    for got, a, lr in zip(pf.unstack(stacked), many, rates, strict=True):
        trees_close(got, train(a, lr), tol=1e-6)


def test_bad_input() -> None:
    net = pf.adapt(nn.Sequential(nn.Linear(8, 6)), {"0": pf.Full()})
    low = pf.adapt(net.model, {"0.weight": pf.LoRA(rank=2)})
    cases: list[tuple[Callable[[], Any], str]] = [
        (lambda: S.chain(), "at least one"),
        (lambda: S.riemannian(net), "riemannian: the net has no LoRA"),
        (lambda: S.lora_pro(low, damping=-1.0), "damping >= 0"),
        (lambda: S.lora_plus(0.0), "ratio is 0.0"),
        (lambda: S.loft(net, 0.1), "loft: the net has no LoRA"),
        (lambda: S.lora_rite(low, 0.1).init(pf.scale(low.init(), 2.0)), r"0\.weight: the leaf has \['of', 'scale'\]"),
    ]
    for call, match in cases:
        with pytest.raises(ValueError, match=match):
            call()
