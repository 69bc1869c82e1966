"""`peftfn suggest`: what pf.suggest finds, from files; a table, JSON, and bad input."""

import copy
import json
from pathlib import Path

import pytest
import torch
from models import by_name, tokens
from safetensors.torch import save_file
from test_cli import base, fails, run

import peftfn as pf


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return base(tmp_path / "base", by_name["llama"].build(), shards=2)


def printed(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert run("suggest", *args) == 0
    return capsys.readouterr().out.rstrip("\n")


def test_layers_by_condition(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = by_name["llama"].build()
    capsys.readouterr()
    assert printed(capsys, folder) == str(pf.suggest.targets(model, pf.LoRA()))
    read = json.loads(printed(capsys, folder, "--count", 3, "--rank", 2, "--modules", "all-linear", "--json"))
    want = pf.suggest.targets(model, pf.LoRA(rank=2), "all-linear", count=3)
    assert read == json.loads(json.dumps(want.json())) and len(read["peft"]["target_modules"]) == 3
    found = printed(capsys, folder, "--method", "IA3", "--modules", "q_proj,down_proj", "--share", 1)
    assert found == str(pf.suggest.targets(model, pf.IA3(), ["q_proj", "down_proj"], share=1.0))


def test_ranks_by_what_files_hold(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = by_name["llama"].build()
    full = copy.deepcopy(model)
    with torch.no_grad():
        for p in full.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    tuned = base(tmp_path / "full", full, shards=2)
    batches = [{"input_ids": tokens(2, seed=s), "labels": tokens(2, seed=s)} for s in (1, 2)]
    files = [tmp_path / f"{i}.safetensors" for i in range(2)]
    for file, batch in zip(files, batches, strict=True):
        save_file(batch, file)
    net = pf.adapt(model, pf.targets(model, pf.LoRA(rank=2)))
    capsys.readouterr()
    weight = pf.suggest.weight_ranks(net, budget=5, most=3)
    assert printed(capsys, folder, "--by", "weight", "--rank", 2, "--budget", 5, "--most", 3) == str(weight)
    change = pf.suggest.change_ranks(net, full, energy=0.5)
    assert printed(capsys, folder, "--by", "change", "--full", tuned, "--energy", 0.5, "--rank", 2) == str(change)
    gradient = pf.suggest.gradient_ranks(net, batches)
    assert printed(capsys, folder, "--by", "gradient", "--inputs", *files, "--rank", 2) == str(gradient)


def test_bad_input(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ids = tmp_path / "x.safetensors"
    save_file({"input_ids": tokens(2)}, ids)
    assert "does not exist" in fails(capsys, "suggest", tmp_path / "no")
    assert "holds no *.safetensors" in fails(capsys, "suggest", folder / "config.json")
    assert "--budget is not an option of --by condition" in fails(capsys, "suggest", folder, "--budget", 3)
    assert "--at-most is not an option of --by weight" in fails(
        capsys, "suggest", folder, "--by", "weight", "--at-most", 3
    )
    assert "needs --full" in fails(capsys, "suggest", folder, "--by", "change")
    assert "has no --inputs" in fails(capsys, "suggest", folder, "--inputs", ids)
    assert "no method of this name" in fails(capsys, "suggest", folder, "--method", "Lora")
    assert "--method IA3" in fails(capsys, "suggest", folder, "--method", "IA3", "--rank", 2)
    assert "no rank to choose" in fails(capsys, "suggest", folder, "--method", "IA3", "--by", "weight")
    assert "no loss" in fails(capsys, "suggest", folder, "--by", "gradient", "--inputs", ids)
    assert "no.safetensors does not exist" in fails(
        capsys, "suggest", folder, "--by", "gradient", "--inputs", tmp_path / "no.safetensors"
    )
    ids.write_bytes(b"no tensors")
    for command in (("suggest", folder, "--by", "gradient"), ("verify", folder, "--model", folder)):
        assert "not a valid safetensors file" in fails(capsys, *command, "--inputs", ids)
    assert "0 < share <= 1" in fails(capsys, "suggest", folder, "--share", 2)
    assert "components" in fails(capsys, "suggest", folder, "--by", "weight", "--budget", 9999)
