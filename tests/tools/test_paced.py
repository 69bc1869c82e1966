"""Steps for stacks: each adapter's norm, rate, schedule, count and state are its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import random
from torch import Tensor, nn
from torch.func import grad, vmap

import peftfn as pf

S = pf.steps
K = 40  # more than a vector register's worth of counts, so that functions of a count take their vectorised way


def made() -> tuple[pf.Adapted, Callable[..., Tensor], list[pf.Adapter], Tensor]:
    torch.manual_seed(0)
    net = pf.adapt(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), {"weight": pf.LoRA(rank=2)})
    xs = torch.randn(K, 5, 8)
    return net, lambda a, x: net.apply(a, x).square().mean() * 30, [random(net, seed=i) for i in range(K)], xs


def alone(step: S.Step, loss: Any, a: Any, x: Tensor, n: int = 4) -> Any:
    state = step.init(a)
    for _ in range(n):
        updates, state = step.update(grad(loss)(a, x), state, a)
        a = S.apply(a, updates)
    return a


def make(lr: Any, decay: Any = 0.0, warmup: Any = 2.0) -> S.Step:
    optimizer = S.adamw(lr, weight_decay=decay)
    return S.chain(S.clip(0.5), optimizer, S.scheduled(S.cosine(6, warmup=warmup)))


def test_a_stack_takes_the_steps_of_each_adapter_alone() -> None:
    """To the bit in what the steps do: they are given the same gradients."""
    net, _, adapters, _ = made()
    values = {"lr": torch.logspace(-4, -1, K), "decay": torch.linspace(0, 0.1, K), "warmup": torch.arange(K) % 4}
    step, many = S.stacked(make, **values), pf.stack(adapters)
    state = step.init(many)
    singles = [make(**{n: float(v[i]) for n, v in values.items()}) for i in range(K)]
    apart, states = list(adapters), [s.init(a) for s, a in zip(singles, adapters, strict=True)]
    for turn in range(4):
        gradients = [random(net, seed=100 * turn + i, scale=1.0) for i in range(K)]
        updates, state = step.update(pf.stack(gradients), state, many)
        many = S.apply(many, updates)
        for i, one in enumerate(singles):
            updates, states[i] = one.update(gradients[i], states[i], apart[i])
            apart[i] = S.apply(apart[i], updates)
    for got, want, start in zip(*map(pf.leaves, (many, pf.stack(apart), pf.stack(adapters))), strict=True):
        assert got.isfinite().all()
        assert (got != start).any(-1).any(-1).all()
        # The one difference: βᵗ and the norm's sum are computed in other orders. Two roundings of fp32.
        assert (got - want).abs().max() <= 2.5e-7 * want.abs().max()


def test_a_nan_in_one_adapter_changes_no_other() -> None:
    _, loss, adapters, xs = made()
    step = S.stacked(make, lr=[1e-2] * K)

    def run(xs: Tensor) -> Any:
        many = pf.stack(adapters)
        state = step.init(many)
        for _ in range(3):
            updates, state = step.update(vmap(grad(loss))(many, xs), state, many)
            many = S.apply(many, updates)
        return many

    bad = xs.clone()
    bad[3] = float("nan")
    others = [i for i in range(K) if i != 3]
    for with_nan, without in zip(pf.leaves(run(bad)), pf.leaves(run(xs)), strict=True):
        assert with_nan[3].isnan().all()
        assert torch.equal(with_nan[others], without[others])


def test_clip_is_torchs_for_each_adapter() -> None:
    _, loss, adapters, xs = made()
    gradients = vmap(grad(loss))(pf.stack(adapters), xs)
    norms = []
    for limit in (0.1, 1e4):
        step = S.stacked(S.clip, max_norm=[limit] * K)
        clipped = pf.unstack(step.update(gradients, step.init(gradients), gradients)[0])
        for g, got in zip(pf.unstack(gradients), clipped, strict=True):
            ps = [nn.Parameter(torch.zeros_like(t)) for t in pf.leaves(g)]
            for p, t in zip(ps, pf.leaves(g), strict=True):
                p.grad = t.clone()
            norms.append(float(nn.utils.clip_grad_norm_(ps, limit)))
            for p, t in zip(ps, pf.leaves(got), strict=True):
                torch.testing.assert_close(t, p.grad, rtol=1e-6, atol=0)
    assert min(norms) > 0.1


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedules_rise_and_fall(name: str) -> None:
    f = getattr(S, name)(20, warmup=5, end=0.1)
    y = f(torch.arange(30.0))
    assert torch.allclose(y[:5], torch.arange(1, 6) / 5)
    assert float(y[5]) == 1.0
    assert (y[5:21].diff() < 0).all()
    assert torch.allclose(y[20:], torch.tensor(0.1))
    assert torch.equal(getattr(S, name)(20)(torch.zeros(())), torch.ones(()))


def test_scheduled_sgd_is_sgd_by_hand() -> None:
    _, loss, adapters, xs = made()
    f = S.linear(4)
    want = adapters[0]
    for i in range(3):
        rate = 0.1 * (1 - i / 4)
        want = S.apply(want, S.sgd(rate).update(grad(loss)(want, xs[0]), {}, want)[0])
    got = alone(S.chain(S.sgd(0.1), S.scheduled(f)), loss, adapters[0], xs[0], 3)
    for g, w in zip(pf.leaves(got), pf.leaves(want), strict=True):
        torch.testing.assert_close(g, w)


def test_bad_input() -> None:
    _, _, adapters, _ = made()
    with pytest.raises(ValueError, match=r"lr has 2 values for 40 adapters"):
        S.stacked(S.sgd, lr=[0.1, 0.2]).init(pf.stack(adapters))
    with pytest.raises(ValueError, match=r"max_norm is 0"):
        S.clip(0)
