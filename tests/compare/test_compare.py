"""`peftfn compare`: records of a small real run, what the page makes of records, and what is refused."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from optree.integrations.torch import tree_ravel
from support import ROOT

import peftfn as pf
from peftfn.__main__ import main
from peftfn.compare import run, tasks
from peftfn.compare.choose import chosen, front, good
from peftfn.compare.curvature import sharpness
from peftfn.compare.methods import METHODS
from peftfn.compare.models import Patches
from peftfn.compare.page import page
from peftfn.compare.peak import peak
from peftfn.compare.peft_results import runs
from peftfn.compare.tasks import TASKS, Own, Ready, cross_entropy

RECORDS = ROOT / "benchmarks" / "comparison"


def small() -> Ready:
    """A task that an adapter can learn: the digits' model, untrained, and whether an image is bright."""
    torch.manual_seed(0)
    x = torch.rand(120, 8, 8) * torch.rand(120, 1, 1)
    label = (x.mean((1, 2)) > 0.25).long()
    parts = torch.arange(120).split([60, 20, 40])
    own = Own("dark or not", "forward", (1 - x[100:],), partial(cross_entropy, label=1 - label[100:]))
    return Ready(
        "small", "bright or not", Patches().requires_grad_(False), r"^layers\.", "forward", (x,), label, *parts, own
    )


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Ready:
    made = small()
    monkeypatch.setitem(TASKS, "small", lambda: made)
    return made


def test_a_run_says_what_a_loop_by_hand_gives(task: Ready, tmp_path: Path) -> None:
    how = run.Settings(rates=(1e-3, 3e-2), seeds=2, steps=30, batch=8)
    said: list[str] = []
    records = run.compare(tmp_path, ["LoRA", "IA3"], ["small"], how, say=said.append)
    assert [r["method"] for r in records] == ["IA3", "LoRA"]
    assert len(said) == 2
    record = records[1]
    assert record["trained"] == 6912
    assert record["bytes"] > 4 * 6912
    assert record["peak_bytes_alone"] > 0 < record["seconds_a_step_alone"]
    assert record["sharpness"] > 0
    lr, trials = run.best(record)  # type: ignore[misc]
    assert lr == 3e-2
    assert all(t["test"] > record["base"] for t in trials)

    net = pf.adapt(task.model, METHODS["LoRA"].rules(task.layers))
    a = net.init(seed=1)
    step = pf.steps.chain(pf.steps.clip(1.0), pf.steps.adamw(3e-2), pf.steps.scheduled(pf.steps.cosine(30, warmup=1)))
    state = step.init(a)
    for i in range(30):
        g = torch.Generator().manual_seed(10_000 + i)
        index = task.train[torch.randint(60, (8,), generator=g)]
        x, y = task.inputs[0][index], task.label[index]
        gradient = torch.func.grad(lambda a, x, y: torch.nn.functional.cross_entropy(net.apply(a, x), y))(a, x, y)
        updates, state = step.update(gradient, state, a)
        a = pf.steps.apply(a, updates)
    got = (net.apply(a, task.inputs[0][task.test]).argmax(-1) == task.label[task.test]).float().mean()
    assert trials[1]["seed"] == 1
    assert abs(trials[1]["test"] - float(got)) <= 1.01 / 40  # rounding may turn one example
    own = task.own.loss(lambda x: net.apply(a, x))
    assert trials[1]["own"] == pytest.approx(float(own), rel=1e-3)
    assert record["own"]["base"] == pytest.approx(float(task.own.loss(task.model)), rel=1e-5)
    assert run.forgotten(record) == pytest.approx(sum(t["own"] for t in trials) / 2 - record["own"]["base"])


def test_it_goes_on_and_refuses_other_settings(task: Ready, tmp_path: Path) -> None:
    how, said = run.Settings(rates=(1e-2,), seeds=1, steps=2), list[str]()
    run.compare(tmp_path, ["LoRA"], ["small"], how, say=said.append)
    before = (tmp_path / "small.LoRA.json").read_text()
    run.compare(tmp_path, ["LoRA", "IA3"], ["small"], how, minutes=0, say=said.append)
    assert (tmp_path / "small.LoRA.json").read_text() == before
    assert said[1:] == ["small, IA3: left out, for lack of time"]
    with pytest.raises(ValueError, match="give another folder"):
        run.compare(tmp_path, ["LoRA"], ["small"], run.Settings(rates=(1e-2,), seeds=2, steps=2))
    old = json.loads(before)
    del old["sharpness"]
    (tmp_path / "small.LoRA.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="an older version made it"):
        run.compare(tmp_path, ["LoRA"], ["small"], how)
    with pytest.raises(ValueError, match="no method 'Lora' to compare; there are LoRA"):
        run.compare(tmp_path, ["Lora"], ["small"])


def test_the_command(task: Ready, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--methods",
        "BitFit,Bottleneck",
        "--tasks",
        "small",
        "--rates",
        "1e-3,1e-2",
        "--seeds",
        "2",
        "--steps",
        "3",
    ]
    stored = tmp_path / "peft"
    assert main(["compare", *given, "--out", str(tmp_path), "--peft-results", str(stored)]) == 0
    assert_peft_reads(stored, tmp_path)
    assert "2 records, comparison.md, comparison.png" in capsys.readouterr().out
    assert (tmp_path / "comparison.png").stat().st_size > 1000
    text = (tmp_path / "comparison.md").read_text()
    assert text == page(run.read(tmp_path))
    assert "| BitFit | " in text
    assert main(["compare", "--methods", "nothing", "--out", str(tmp_path)]) == 2
    with pytest.raises(SystemExit):
        main(["compare", "--rates", "1e-3,x"])


def assert_peft_reads(stored: Path, out: Path) -> None:
    """What PEFT's method_comparison/processing.py takes from each file of results."""
    records, files = run.read(out), sorted(stored.glob("*.json"))
    assert len(files) == 2 * len(records)
    for path in files:
        row = json.loads(path.read_text())
        of, train, metrics = row["run_info"], row["train_info"], row["train_info"]["metrics"][-1]
        (ours,) = (r for r in records if r["method"].lower() == of["experiment_name"].split("/")[0])
        assert path.stem == of["experiment_name"].replace("/", "--")
        assert of["train_config"]["model_id"] == ours["task"] and of["peft_config"]["peft_type"]
        assert train["status"] == "success" and train["file_size"] == ours["bytes"]
        numbers = {k: train[f"accelerator_memory_{k}"] for k in ("reserved_avg", "max", "reserved_99th")}
        numbers |= {k: metrics[k] for k in ("test accuracy", "train loss", "train samples", "train total tokens")}
        assert all(isinstance(v, int | float) for v in [*numbers.values(), of["total_time"], train["train_time"]])
        assert metrics["train total tokens"] == metrics["train samples"] * ours["positions"]
        assert {f"{k}-version" for k in ("peft", "transformers", "datasets", "torch", "bitsandbytes")} <= row[
            "meta_info"
        ]["package_info"].keys()


def test_every_method_has_pefts_configuration_or_our_words() -> None:
    r = record("LoRA", {1e-2: [0.5]})
    r["trials"][0] |= {"step": 5, "seconds": 1.0, "loss": 0.3}
    for name in METHODS:
        (found,) = runs({**r, "method": name, "positions": 8}).values()
        config = found["run_info"]["peft_config"]
        assert (config is None) == (name == "Full")
        json.dumps(config)
    (lora,) = runs({**r, "positions": 8}).values()
    assert lora["run_info"]["peft_config"]["peft_type"] == "LORA" and lora["run_info"]["peft_config"]["r"] == 4


def test_peak_memory_counts_what_is_made() -> None:
    w, x = torch.randn(64, 64), torch.randn(8, 64)
    kib = 2**10
    assert peak(lambda: x @ w.mT) == 2 * kib
    assert peak(lambda: (x + 1, x + 2)) == 4 * kib
    assert peak(lambda: [float((x + i).sum()) for i in range(9)]) < 3 * kib


def record(method: str, tests: dict[float, list[float]], **more: Any) -> Any:
    trials = [
        {"lr": lr, "seed": s, "status": "done", "validation": v, "test": v / 2, "own": 1 + lr}
        for lr, values in tests.items()
        for s, v in enumerate(values)
    ]
    settings = {"rates": list(tests), "seeds": 2, "steps": 5, "batch": 4}
    environment = {"date": "2026-01-02", "peftfn": "1", "torch": "2", "python": "3", "machine": "m"}
    environment |= {"cpu_capability": "c", "threads": 1, "load_average": 0.5}
    return {
        "task": "digits", "title": "digits", "method": method, "settings": settings, "base": 0.25, "trained": 1234,
        "examples": {"train": 1, "validation": 2, "test": 3}, "bytes": 2048, "seconds_a_step_alone": 0.5,
        "peak_bytes_alone": 2**20, "trials": trials, "environment": environment, "sharpness": 0.123,
        "own": {"title": "letters", "base": 0.75},
    } | more  # fmt: skip


def test_the_page_shows_each_method_at_its_own_rate() -> None:
    one = record("One", {1e-3: [0.2, 0.4], 1e-2: [0.8, 1.0], 1e-1: [0.9, 0.86]})
    two = record("Two", {1e-3: [1.0, 0.96], 1e-2: [0.97, 0.97], 1e-1: [0.0, 0.0]})
    for t in two["trials"][4:]:
        t["status"] = "diverged"
    three = record("Three", {1e-3: [0.5, 0.5]})
    for t in three["trials"]:
        t["status"] = "diverged"
    text = page([one, two, three])
    lines = text[text.index("## Digits") :].splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line][1:]
    assert rows == [
        "| none (the base) | 25.0 | 0 | | | | 0 | | | |",
        "| Two | 49.0 ± 1.4 | +0.25 | 0.001↧ | 2 of 3 | 0.12 | 1,234 | 2 | 0.500 | 1.0 |",
        "| One | 45.0 ± 7.1 | +0.26 | 0.01 | 2 of 3 | 0.12 | 1,234 | 2 | 0.500 | 1.0 |",
        "| Three | diverged at every rate |  |  |  | 0.12 | 1,234 | 2 | 0.500 | 1.0 |",
    ]
    assert "The base's own task: letters; its loss is 0.75." in " ".join(lines)
    one["environment"]["load_average"] = 7.5
    assert "| 0.01 | 2 of 3 | 0.12 | 1,234 | 2 | ~0.500 | 1.0 |" in page([one])  # on a busy machine


def test_which_method_for_what_follows_its_rules() -> None:
    records = [
        record("Best", {1e-3: [0.9, 0.92], 1e-2: [0.5, 0.5]}, trained=900, bytes=9 * 1024),
        record("Within", {1e-3: [0.86, 0.90], 1e-2: [0.86, 0.9]}, trained=500, bytes=9 * 1024),
        record("Apart", {1e-3: [0.82, 0.82], 1e-2: [0.5, 0.5]}, trained=600, bytes=1024, peak_bytes_alone=2**19),
        record("Far", {1e-3: [0.5, 0.5], 1e-2: [0.5, 0.5]}, trained=10, bytes=10),
        record("Worse", {1e-3: [0.4, 0.4], 1e-2: [0.4, 0.4]}, trained=20, bytes=10),
    ]
    assert [r["method"] for r in good(records)] == ["Best", "Within", "Apart"]
    assert [r["method"] for r in front(records)] == ["Far", "Within", "Best"]
    table = dict(line[2:-2].split(" | ") for line in chosen(records).splitlines()[4:] if line.startswith("| "))
    assert table["most accurate"] == "Best, Within"
    assert table["fewest trained numbers"] == "Within (500)"
    assert table["smallest file"] == "Apart (1 KiB)"
    assert table["least memory"] == "Apart (0.5 MiB)"
    assert table["most rates good"] == "Within (2 of 2)"
    assert table["none is better in accuracy and trained numbers"] == "Far, Within, Best"
    assert chosen(records[:1]) == ""  # nothing to choose from


def test_the_largest_eigenvalue_is_that_of_the_hessian() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    net = pf.adapt(model, {"weight": pf.LoRA(rank=2)})
    x, y = torch.randn(10, 4).double(), torch.tensor([0, 1] * 5)

    def loss(a: Any) -> torch.Tensor:
        return cross_entropy(net.apply(a, x), y)

    a = net.init(seed=0, dtype=torch.float64)
    flat, tree_of = tree_ravel(a)
    true = torch.linalg.eigvalsh(torch.func.hessian(lambda v: loss(tree_of(v)))(flat))
    assert true[0] < 0 < true[-1]
    assert sharpness(loss, a, products=len(flat)) == pytest.approx(float(true[-1]), rel=1e-6)
    assert float(true[-2]) < sharpness(loss, a) <= float(true[-1]) * (1 + 1e-9)
    assert sharpness(lambda a: sum(t.sum() for t in pf.leaves(a)), a) == 0  # a plane


def test_the_language_models_task_is_made_of_pythons_own_text() -> None:
    ready = tasks.characters(length=16, steps=2)
    assert ready.label.shape == (2400, 16)
    (x,) = ready.inputs
    assert torch.equal(x[:, 1:], ready.label[:, :-1])
    before = ready.model(x[:2])
    x = x[:2].clone()
    x[:, 9:] = 0
    assert torch.allclose(ready.model(x)[:, :9], before[:, :9])  # no position sees a later one
    code = "".join(map(chr, ready.label[ready.test].flatten().tolist()))
    assert "self" in code
    right, own = ready.base()
    assert 0 < right < 1
    assert own > 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_the_digits_model(name: str, task: Ready) -> None:
    net = pf.adapt(task.model, METHODS[name].rules(task.layers))
    x, y = task.inputs[0][:20], task.label[:20]

    def loss(net: pf.Adapted, a: Any, batch: Any) -> torch.Tensor:
        return cross_entropy(net.apply(a, batch[0]), batch[1])

    configs = pf.grid(lr=[1e-4, 1e-2], seed=[0])  # what random constants scale up wants the small one
    done = pf.sweep(configs, net, loss, lambda c, i: (x, y), lambda c: pf.steps.adamw(c["lr"]), steps=5, every=1)
    losses = [[r["loss"] for r in t.history] for t in done.trials]
    assert any(some[-1] < some[0] for some in losses)


def test_the_docs_page_is_made_from_the_records() -> None:
    """After changing peftfn/compare/page.py: python -m benchmarks.comparison"""
    records = run.read(RECORDS)
    assert records
    assert (ROOT / "docs" / "comparison.md").read_text() == page(records)
    for path in RECORDS.glob("*.json"):
        r = json.loads(path.read_text())
        assert path.stem == f"{r['task']}.{r['method']}"
        assert {t["lr"] for t in r["trials"]} == set(r["settings"]["rates"])
        assert r["method"] in METHODS
        assert r["task"] in TASKS
