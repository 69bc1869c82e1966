"""`peftfn inspect --spectrum`: pf.spectrum of files, without a model where they say all."""

import json
from pathlib import Path
from typing import Any

import pytest
from models import by_name
from support import random
from test_cli import base, fails, run

import peftfn as pf

LORA = {r"q_proj": pf.LoRA(rank=4, alpha=6.0), r"v_proj": pf.LoRA(rank=2)}


def made(tmp_path: Path, rules: dict[str, pf.Method], format: str) -> tuple[Path, pf.SpectrumReport]:
    net = pf.adapt(by_name["llama"].build(), rules)
    a = random(net)
    pf.save(tmp_path / "a", net, a, format=format)
    return tmp_path / "a", pf.spectrum(net, a)


def same(found: list[dict[str, Any]], want: pf.SpectrumReport) -> None:
    assert {s["name"] for s in found} == {s.name for s in want} and len(found) == len(want)
    by = {s["name"]: s for s in found}
    for s in want.json():
        name = s.pop("name")
        assert {k: v for k, v in by[name].items() if k != "name"} == pytest.approx(s, rel=1e-4)


@pytest.mark.parametrize("where", [None, "config.json", "."])
def test_of_loras_in_pefts_format(where: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, want = made(tmp_path, LORA, "peft")
    model = () if where is None else ("--model", base(tmp_path / "base", by_name["llama"].build()) / where)
    assert run("inspect", path, "--spectrum", "--json", *model) == 0
    same(json.loads(capsys.readouterr().out)[""]["spectrum"], want)
    assert run("inspect", path, "--spectrum", *model) == 0
    facts, _, text = capsys.readouterr().out.partition("\n\n")
    assert facts.startswith("adapter  ") and text.splitlines()[0].split()[:2] == ["site", "σ₁"]
    assert len(text.splitlines()) == 1 + len(want)
    assert run("inspect", path, "--json") == 0
    assert "spectrum" not in json.loads(capsys.readouterr().out)[""]


def test_of_other_methods_and_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = {"q_proj": pf.LoHa(rank=2), "v_proj": pf.DoRA(rank=2), "norm": pf.Full()}
    path, want = made(tmp_path, rules, "native")
    folder = base(tmp_path / "base", by_name["llama"].build())
    assert run("inspect", path, "--spectrum", "--json", "--model", folder) == 0
    same(json.loads(capsys.readouterr().out)[""]["spectrum"], want)
    assert "give --model" in fails(capsys, "inspect", path, "--spectrum")
    error = fails(capsys, "inspect", path, "--spectrum", "--model", folder / "config.json")
    assert "_proj.weight: the change that" in error and "folder with *.safetensors" in error


def test_norms_beside_loras_need_no_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, want = made(tmp_path, {"q_proj": pf.LoRA(rank=2), "norm": pf.Full()}, "native")
    config = base(tmp_path / "base", by_name["llama"].build()) / "config.json"
    assert run("inspect", path, "--spectrum", "--json", "--model", config) == 0
    same(json.loads(capsys.readouterr().out)[""]["spectrum"], want)


def test_an_adapter_that_does_not_fit_has_no_spectrum(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = made(tmp_path, LORA, "peft")
    assert run("inspect", path, "--spectrum", "--model", base(tmp_path / "b", by_name["bert"].build())) == 1
    out = capsys.readouterr().out
    assert ": no: " in out and "σ₁" not in out


def test_several_adapters_have_one_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = pf.adapt(by_name["llama"].build(), {"q_proj": pf.LoRA(rank=2)})
    want = {}
    for i, name in enumerate(("one", "two")):
        a = random(net, i)
        pf.save(tmp_path / "s", net, a, format="swift", name=name)
        want[name] = pf.spectrum(net, a)
    assert "give --model" in fails(capsys, "inspect", tmp_path / "s", "--spectrum")
    config = base(tmp_path / "base", by_name["llama"].build()) / "config.json"
    assert run("inspect", tmp_path / "s", "--spectrum", "--json", "--model", config) == 0
    for name, facts in json.loads(capsys.readouterr().out).items():
        same(facts["spectrum"], want.pop(name))
    assert not want


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = made(tmp_path, {"q_proj": pf.DoRA(rank=2)}, "peft")
    error = fails(capsys, "inspect", path, "--spectrum")
    assert "q_proj.weight: the change that DoRA" in error and "give a --model folder" in error
    net = pf.adapt(by_name["llama"].build(), {"q_proj": pf.LoRA(rank=2, alpha=2.0)})
    broken = {n: {k: t * float("nan") for k, t in leaf.items()} for n, leaf in net.init().items()}
    pf.save(tmp_path / "nan", net, broken, format="peft")
    assert "q_proj.lora_A.weight contains 32 NaN" in fails(capsys, "inspect", tmp_path / "nan", "--spectrum")
