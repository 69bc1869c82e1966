"""`peftfn verify`: the table, JSON and exit code, and bad input."""

import json
from pathlib import Path

import pytest
from models import by_name, tokens
from safetensors.torch import save_file
from support import random
from test_cli import base, fails, run

import peftfn as pf

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore:`is_gradient_checkpointing`")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    model = by_name["llama"].build()
    net = pf.adapt(model, {"q_proj": pf.LoRA(rank=2), "v_proj": pf.LoRA(rank=2)})
    pf.save(tmp_path / "a", net, random(net), format="peft")
    pf.save(tmp_path / "native", net, random(net))
    return base(tmp_path / "base", model), tmp_path / "a"


def test_a_good_adapter(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, adapter = made
    assert run("verify", adapter, "--model", folder) == 0
    out = capsys.readouterr().out
    assert "model.layers.1.self_attn.v_proj.weight" in out and "PEFT differs" in out and "no problems" in out
    save_file({"input_ids": tokens(3)}, tmp_path / "x.safetensors")
    assert run("verify", adapter, "--model", folder, "--inputs", tmp_path / "x.safetensors", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["differs"].keys() == {"merged", "PEFT"} and len(found["sites"]) == 4
    for way, keys in (("peft", {"PEFT"}), ("merged", {"merged"})):
        assert run("verify", adapter, "--model", folder, "--against", way, "--json", "--no-effects") == 0
        assert json.loads(capsys.readouterr().out)["differs"].keys() == keys
    assert run("verify", tmp_path / "native", "--model", folder) == 0
    assert "PEFT" not in capsys.readouterr().out


def test_an_adapter_that_does_nothing(
    made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, _ = made
    net = pf.adapt(by_name["llama"].build(), {"q_proj": pf.LoRA(rank=2)})
    pf.save(tmp_path / "fresh", net, net.init(), format="peft")
    assert run("verify", tmp_path / "fresh", "--model", folder) == 1
    assert "PROBLEM: the adapter does not change the output" in capsys.readouterr().out


def test_bad_input(made: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder, adapter = made
    vit = base(tmp_path / "vit", by_name["vit"].build())
    net = pf.adapt(by_name["vit"].build(), {"query|q_proj": pf.LoRA(rank=2)})
    pf.save(tmp_path / "v", net, random(net), format="peft")
    assert "no config.json" in fails(capsys, "verify", adapter, "--model", tmp_path)
    assert "--inputs" in fails(capsys, "verify", tmp_path / "v", "--model", vit)
    assert "not in PEFT's format" in fails(
        capsys, "verify", tmp_path / "native", "--model", folder, "--against", "peft"
    )
    assert "does not exist" in fails(capsys, "verify", adapter, "--model", folder, "--inputs", tmp_path / "no")
    assert "no place" in fails(capsys, "verify", tmp_path / "v", "--model", folder)
