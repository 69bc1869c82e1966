"""`peftfn extract`: from two folders to an adapter, shard by shard."""

import copy
from pathlib import Path

import pytest
import torch
from models import by_name, tokens
from test_cli import base, fails, run

import peftfn as pf
from peftfn.testing import close


def test_a_fine_tune_becomes_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = by_name["llama"].build()
    new = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in new.named_parameters():
            if "proj" in n:
                p.add_(0.1 * torch.randn(p.shape, generator=g))
    old, full, out = base(tmp_path / "old", model, shards=3), base(tmp_path / "new", new, shards=2), tmp_path / "out"
    assert run("extract", full, old, out, "--energy", 1.0) == 0
    assert "LoRA at 14 sites" in capsys.readouterr().out
    net, a = pf.load(out, model)
    x = tokens(2)
    close(net.apply(a, x).logits, new(x).logits.detach(), "extracted", rtol=1e-3)
    assert run("extract", full, old, tmp_path / "thin", "--rank", 2, "--pattern", "q_proj", "--to", "native") == 0
    net, a = pf.load(tmp_path / "thin", model)
    assert net.plan["model.layers.0.self_attn.q_proj.weight"].method == pf.LoRA(rank=2)
    assert type(net.plan["model.layers.0.mlp.down_proj.weight"].method) is pf.Full
    assert "exists" in fails(capsys, "extract", full, old, out, "--rank", 2)
    assert "are the same" in fails(capsys, "extract", old, old, tmp_path / "x", "--rank", 2)
    assert "exactly one" in fails(capsys, "extract", full, old, tmp_path / "x")
    assert "holds no *.safetensors" in fails(capsys, "extract", full / "config.json", old, tmp_path / "x", "--rank", 2)
    assert not (tmp_path / "x").exists()
