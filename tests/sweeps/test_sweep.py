"""pf.sweep: each configuration is what it is alone, whatever runs beside it, stops, diverges or is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT
from torch import Tensor, nn
from torch.func import grad
from workers import sweep_worker
from workers.sweep_worker import CONFIGS, EVERY, STEPS, run

import peftfn as pf
from peftfn.sweeps.keys import Keyed, key_of

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = X[:, :1] * X[:, 1:2]


def data(c: Any, step: int) -> tuple[Tensor, Tensor]:
    index = torch.randint(64, (16,), generator=torch.Generator().manual_seed(1000 * c["seed"] + step))
    return X[index], Y[index]


def loss(net: pf.Adapted, a: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (net.apply(a, batch[0]) - batch[1]).square().mean()


def optimizer(c: Any) -> pf.steps.Step:
    return pf.steps.chain(
        pf.steps.clip(1.0), pf.steps.adamw(c["lr"], weight_decay=c.get("decay", 0.0)), pf.steps.scheduled(by(c))
    )


def by(c: Any) -> Any:
    """A schedule whose kind is a string of the configuration, and whose warmup is a number."""
    kind = pf.steps.linear if c.get("schedule") == "linear" else pf.steps.cosine
    return kind(20, warmup=c.get("warmup", 0))


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def made(method: pf.Method | None = None) -> pf.Adapted:
    return pf.adapt(base(), {"weight": method or pf.LoRA(rank=2)})


def sweep(configs: Any, net: Any, **more: Any) -> pf.Swept:
    return pf.sweep(configs, net, loss, data, optimizer, **{"steps": 20, "every": 5, "slots": 3} | more)


def alone(net: pf.Adapted, c: Any, steps: int = 20) -> Any:
    """The configuration in a loop that a user would write."""
    a, step = net.init(seed=c["seed"]), optimizer(c)
    state = step.init(a)
    for i in range(steps):
        updates, state = step.update(grad(partial(loss, net))(a, data(c, i)), state, a)
        a = pf.steps.apply(a, updates)
    return a


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(map(torch.equal, pf.leaves(a), pf.leaves(b)))


def near(a: Any, b: Any) -> None:
    """Equal but for the order in which matrix products add up: of 20 steps of Adam, whose size is the rate's."""
    for g, w in zip(pf.leaves(a), pf.leaves(b), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=2e-5)


def adapters(done: pf.Swept) -> list[Any]:
    return [done.adapter(t) for t in done.trials]


# What a configuration gives.


@pytest.mark.parametrize(
    "method",
    [pf.LoRA(rank=2), pf.DoRA(rank=2), pf.IA3(), pf.OFT(block_size=2), pf.Full(), pf.VeRA(rank=2)],
    ids=lambda m: type(m).__name__,
)
def test_each_configuration_is_the_loop_that_a_user_would_write(method: pf.Method) -> None:
    """To fp32's rounding: a stack's matrix products may add up in another order."""
    net = made(method)
    done = sweep(CONFIGS, net)
    for t in done.trials:
        got, want, start = done.adapter(t), alone(net, t.config), net.init(seed=t.config["seed"])
        assert not equal(got, start)
        near(got, want)


def test_neighbours_slots_and_divergence_change_no_bit() -> None:
    net, mine = made(), {"lr": 1e-2, "seed": 4}
    quiet = sweep([mine, {"lr": 1e-3, "seed": 0}, {"lr": 2e-3, "seed": 1}], net)
    loud = sweep([{"lr": 1e30, "seed": 9}, {"lr": 3e-3, "seed": 2}, *CONFIGS, mine], net)
    assert [t.status for t in loud.trials] == ["diverged", *["done"] * 8]
    assert loud.trials[0].step < 5
    assert "loss of step" in loud.trials[0].reason
    assert equal(quiet.adapter(quiet.trials[0]), loud.adapter(loud.trials[-1]))
    assert quiet.trials[0].history == loud.trials[-1].history
    with pytest.raises(ValueError, match="is diverged: it has no adapter"):
        loud.adapter(loud.trials[0])


def test_decay_schedule_and_warmup_are_of_the_configuration() -> None:
    net = made()
    configs = [
        {"lr": 1e-2, "seed": 0, "decay": 0.3, "warmup": 5, "schedule": "linear"},
        {"lr": 1e-2, "seed": 0, "decay": 0.0, "warmup": 1, "schedule": "linear"},
        {"lr": 1e-2, "seed": 0, "decay": 0.3, "warmup": 5, "schedule": "cosine"},
    ]
    done = sweep(configs, net)
    for t in done.trials:
        near(done.adapter(t), alone(net, t.config))
    assert len({tuple(pf.leaves(a)[0].flatten().tolist()) for a in adapters(done)}) == 3


def test_methods_ranks_and_alphas_share_a_sweep() -> None:
    model, seen = base(), []

    def net(c: Any) -> pf.Adapted:
        seen.append(c)
        return pf.adapt(model, {"weight": pf.IA3() if c["method"] == "IA3" else pf.LoRA(rank=c["rank"])})

    configs = pf.grid(method=["IA3", "LoRA"], rank=[1, 3], lr=[1e-2], seed=[0, 1])
    done = sweep(configs, net)
    assert len(seen) == len(configs)
    assert len({id(done.net(t)) for t in done.trials}) == 3  # IA3 has no rank, so two configurations share a net
    for t in done.trials:
        near(done.adapter(t), alone(done.net(t), t.config))


def test_dropout_is_of_the_configuration() -> None:
    configs = [{"lr": 1e-2, "seed": s} for s in range(7)]
    torch.manual_seed(1)
    one = run(None, configs=configs)
    torch.manual_seed(2)
    two = run(None, configs=configs[::-1])
    assert all(equal(one.adapter(a), two.adapter(b)) for a, b in zip(one.trials, two.trials[::-1], strict=True))
    assert len({float(t.history[0]["loss"]) for t in one.trials}) == 7


def test_a_configuration_with_dropout_alone_in_a_loop() -> None:
    """With the masks that `keys` makes, the loop of a user gives the same."""
    net, c = made(pf.LoRA(rank=2, dropout=0.3)), {"lr": 1e-2, "seed": 3}
    a, step = net.init(seed=3), optimizer(c)
    state = step.init(a)
    for i in range(20):
        with Keyed(key_of(torch.tensor(3), torch.tensor(i))):
            gradient = grad(partial(loss, net))(a, data(c, i))
        updates, state = step.update(gradient, state, a)
        a = pf.steps.apply(a, updates)
    done = sweep([c, {"lr": 1e-3, "seed": 5}], net)
    near(done.adapter(done.trials[0]), a)
    plain = sweep([c], made())
    assert not equal(plain.adapter(plain.trials[0]), a)


def test_masks_drop_their_share_and_differ() -> None:
    masks = []
    for seed, step in ((0, 0), (0, 1), (1, 0)):
        with Keyed(key_of(torch.tensor(seed), torch.tensor(step))):
            masks += [torch.nn.functional.dropout(torch.ones(200, 100), 0.3) for _ in range(2)]
    for m in masks:
        assert set(m.unique().tolist()) == {0.0, float(torch.ones(()) / 0.7)}
        assert abs(float((m == 0).float().mean()) - 0.3) < 0.015  # 4.6 standard deviations
        assert abs(float((m[1:] == m[:-1]).float().mean()) - 0.58) < 0.015
    for i, m in enumerate(masks):
        for n in masks[:i]:
            assert abs(float(((m == 0) & (n == 0)).float().mean()) - 0.09) < 0.01
    with Keyed(key_of(torch.tensor(0), torch.tensor(0))):
        assert torch.equal(torch.nn.functional.dropout(torch.ones(200, 100), 0.3), masks[0])
    with Keyed(None):
        assert torch.equal(torch.dropout(torch.ones(3), 0.5, True), torch.ones(3))


def test_fused_attention_with_dropout_is_refused_and_runs_without_in_evaluation() -> None:
    attention = torch.nn.functional.scaled_dot_product_attention
    q = torch.randn(1, 2, 4, 8)
    with Keyed(None):
        for y in (attention(q, q, q, None, 0.5, True), attention(q, q, q, dropout_p=0.5, is_causal=True)):
            torch.testing.assert_close(y, attention(q, q, q, is_causal=True))
    with Keyed(torch.tensor(0)), pytest.raises(ValueError, match="fused attention draws its dropout itself"):
        attention(q, q, q, None, 0.5)


def test_rematerialised_layers_train_as_others_and_refuse_dropout() -> None:
    configs = [{"lr": 1e-2, "seed": s} for s in range(2)]
    for drop in (0.0, 0.5):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.Dropout(drop), nn.Tanh()), nn.Linear(16, 1))
        net = pf.adapt(model, {"weight": pf.LoRA(rank=2)})
        kept = sweep(configs, net)
        if drop:
            with pytest.raises(ValueError, match="not in rematerialised layers"):
                sweep(configs, net.checkpointed("0"))
            continue
        for a, b in zip(adapters(kept), adapters(sweep(configs, net.checkpointed("0"))), strict=True):
            near(a, b)


def test_other_noise_is_refused() -> None:
    noisy = lambda net, a, b: loss(net, a, (b[0] + torch.randn_like(b[0]), b[1]))  # noqa: E731
    with pytest.raises(ValueError, match="which no configuration would draw alone"):
        pf.sweep(CONFIGS, made(), noisy, data, optimizer, steps=2)


def test_the_base_is_unchanged() -> None:
    net = made()
    before = {n: t.clone() for n, t in net.model.state_dict().items()}
    state = torch.get_rng_state()
    sweep(CONFIGS, net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in net.model.state_dict().items())
    assert not any(p.grad is not None for p in net.model.parameters())


# What happens to it.


def test_a_rule_frees_a_slot_for_the_next() -> None:
    asked: list[tuple[Any, int]] = []

    def seen(c: Any, step: int) -> Any:
        asked.append((c["lr"], step))
        return data(c, step)

    configs = [{"lr": lr, "seed": 0} for lr in (1e-5, 2e-5, 1e-2, 3e-2)]
    stop = lambda t, ts: "too slow" if t.config["lr"] < 1e-3 else ""  # noqa: E731
    done = pf.sweep(configs, made(), loss, seen, optimizer, steps=20, every=5, slots=2, stop=stop)
    assert [(t.status, t.step) for t in done.trials] == [("stopped", 5)] * 2 + [("done", 20)] * 2
    assert done.trials[0].reason == "too slow"
    assert len(asked) == 2 * (5 + 20)
    assert asked.index((1e-2, 0)) == 2 * 5  # right after the two that were stopped


def test_rules() -> None:
    rows = [{"step": i, "loss": v, "acc": -v} for i, v in enumerate((3.0, 2.0, 2.5, 2.0))]
    trial = pf.Trial({"lr": 1}, history=rows)
    assert pf.patience(2)(trial, [])
    assert pf.patience(2, "acc", "max")(trial, [])
    assert not pf.patience(3)(trial, [])
    trials = [pf.Trial({"lr": i}, history=[{"step": 5, "loss": float(i)}]) for i in range(4)]
    assert [bool(pf.behind(5)(t, trials)) for t in trials] == [False, False, True, True]
    assert [bool(pf.behind(5, 0.25, "loss", "max")(t, trials)) for t in trials] == [True, True, True, False]
    assert not any(pf.behind(6)(t, trials) for t in trials)


def test_empty_slots_may_be_left_out() -> None:
    configs = [{"lr": 1e-2, "seed": s} for s in range(4)]
    one, two = sweep(configs, made()), sweep(configs, made(), shrink=True)
    for a, b in zip(adapters(one), adapters(two), strict=True):
        near(a, b)


# A folder.


def test_a_killed_process_loses_the_steps_since_the_last_row(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen([sys.executable, sweep_worker.__file__, str(tmp_path), "0.03"], env=env)
    try:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("[!.]*.safetensors"))) < sweep_worker.SLOTS:
            assert worker.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        time.sleep(0.3)
        worker.send_signal(signal.SIGKILL)
        assert worker.wait() == -signal.SIGKILL
    finally:
        worker.kill()
    kept = len(list(tmp_path.glob("[!.]*.safetensors")))
    begun = run(tmp_path, seconds=0)
    assert sweep_worker.SLOTS <= kept <= len(CONFIGS)
    assert {t.status for t in begun.trials} >= {"running", "waiting"}
    assert all(t.step % EVERY == 0 and t.step == len(t.history) * EVERY for t in begun.trials)
    assert any(0 < t.step < STEPS for t in begun.trials)
    resumed, whole = run(tmp_path), run(None)
    assert [t.status for t in resumed.trials] == ["done"] * 6
    assert [t.history for t in resumed.trials] == [t.history for t in whole.trials]
    assert all(map(equal, adapters(resumed), adapters(whole)))


def test_ctrl_c_too_and_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    calls = []

    def interrupted(c: Any, step: int) -> Any:
        calls.append(step)
        if len(calls) == 3 * 12 + 1:
            raise KeyboardInterrupt
        return data(c, step)

    configs, net = [{"lr": 1e-2, "seed": s} for s in range(3)], made()
    with pytest.raises(KeyboardInterrupt):
        pf.sweep(configs, net, loss, interrupted, optimizer, steps=20, every=5, slots=3, folder=tmp_path)
    assert not list(tmp_path.glob(".*"))  # no file is half there
    del calls[:]
    done = pf.sweep(configs, net, loss, interrupted, optimizer, steps=20, every=5, slots=3, folder=tmp_path)
    assert len(calls) == 3 * 10
    assert all(map(equal, adapters(done), adapters(sweep(configs, net))))
    del calls[:]
    again = pf.sweep(configs, net, loss, interrupted, optimizer, steps=20, every=5, slots=3, folder=tmp_path)
    assert not calls
    assert again.records() == done.records()
    more = pf.sweep(configs, net, loss, interrupted, optimizer, steps=25, every=5, slots=3, folder=tmp_path)
    assert [t.step for t in more.trials] == [25] * 3
    assert calls == [s for s in range(20, 25) for _ in range(3)]


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    configs = [{"lr": 1e-2, "seed": 0}]
    sweep(configs, made(), folder=tmp_path)
    with pytest.raises(ValueError, match="give the sweep another folder"):
        sweep(configs, made(pf.LoRA(rank=3)), folder=tmp_path)
    with pytest.raises(ValueError, match="is only in one of the file and this sweep"):
        pf.sweep(configs, made(), loss, data, lambda c: pf.steps.sgd(c["lr"]), steps=30, folder=tmp_path)


# What it says.


def test_records_table_and_files(tmp_path: Path) -> None:
    configs = [*pf.grid(lr=[1e-3, 3e-2], seed=[0, 1]), {"lr": 1e30, "seed": 0}]
    done = sweep(
        configs, made(), evaluate=lambda n, a: {"error": loss(n, a, (X, Y)), "size": a["0.weight"]["b"].norm()}
    )
    for t in done.trials[:4]:
        want = float(loss(done.net(t), done.adapter(t), (X, Y)))
        assert t.value("error") == pytest.approx(want, rel=1e-5)
        assert [r["step"] for r in t.history] == [5, 10, 15, 20]
    best = done.best("error")
    assert best.value("error") == min(t.value("error") for t in done.trials[:4])  # type: ignore[type-var]
    assert done.best("error", "max").value("error") == max(t.value("error") for t in done.trials[:4])  # type: ignore[type-var]
    lines = done.table().splitlines()
    assert len(lines) == 2 + 5
    assert "| 0.03 | 1 | done | 20 |" in lines[5]
    assert repr(done) == "5 configurations: 4 done, 1 diverged"
    done.save(tmp_path / "a.json")
    read = json.loads((tmp_path / "a.json").read_text())
    assert [t["config"] for t in read] == configs
    done.plot(tmp_path / "a.png", "error")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_bad_input() -> None:
    net = made()
    for configs, error in (
        ([], "at least one configuration"),
        ([{"lr": 1}, {"lr": 1}], "is there twice"),
        ([{"lr": float("nan")}], "is not plain data"),
        ([{"lr": torch.tensor(1.0)}], "is not plain data"),
    ):
        with pytest.raises(ValueError, match=error):
            sweep(configs, net)
    with pytest.raises(ValueError, match="slots is 0"):
        sweep(CONFIGS, net, slots=0)
    with pytest.raises(ValueError, match="different models"):
        sweep(CONFIGS, lambda c: made())
    ragged = lambda c, step: X[: 4 + c["seed"]]  # noqa: E731
    with pytest.raises(ValueError, match=r"must be alike: pad them"):
        pf.sweep(CONFIGS, net, lambda n, a, x: n.apply(a, x).sum(), ragged, optimizer, steps=2)
    with pytest.raises(TypeError, match="data has a int in the batch"):
        pf.sweep(CONFIGS, net, loss, lambda c, s: (X, 3), optimizer, steps=2)
    with pytest.raises(ValueError, match=r"the loss has shape \[16, 1\]: return one number"):
        pf.sweep(CONFIGS, net, lambda n, a, b: n.apply(a, b[0]), data, optimizer, steps=2)
    with pytest.raises(ValueError, match="names other than"):
        sweep(CONFIGS, net, evaluate=lambda n, a: {"loss": X.mean()})
