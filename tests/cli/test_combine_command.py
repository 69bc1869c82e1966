"""`peftfn combine`: on files alone, with a model, and bad input."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from models import by_name, tokens
from support import random
from test_cli import base, fails, run

import peftfn as pf
from peftfn.testing import close

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:peft", "ignore:`is_gradient_checkpointing`")


def written(path: Path, rules: dict[str, Any], seed: int = 0, **extra: Any) -> tuple[pf.Adapted, Any]:
    """A net with a random adapter, saved in PEFT's format."""
    net = pf.adapt(by_name["llama"].build(), rules)
    a = random(net, seed)
    pf.save(path, net, a, format="peft", extra=extra)
    return net, a


def summed(ps: list[Any], w: list[float]) -> Any:
    return {n: sum(x * net.delta(a)[n] for x, (net, a) in zip(w, ps, strict=True)) for n in ps[0][0].plan}


@pytest.mark.parametrize("with_model", [False, True])
def test_files_are_combined(
    with_model: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rules = {"q_proj": pf.LoRA(rank=2, alpha=3), "v_proj": pf.LoRA(rank=3), "embed_tokens": pf.LoRA(rank=1)}
    ps = [written(Path("a"), rules), written(Path("b"), rules, 1)]
    more = ["--model", base(Path("base"), by_name["llama"].build())] if with_model else []
    assert run("combine", "a", "b", "--out", "c", "--weights", 1.5, -0.5, *more) == 0
    assert "linear of 2 adapters" in capsys.readouterr().out
    model = by_name["llama"].build()
    net, a = pf.load("c", model)
    close(net.delta(a), summed(ps, [1.5, -0.5]), "sum", rtol=1e-5)
    x = tokens(2)
    theirs = peft.PeftModel.from_pretrained(by_name["llama"].build(), "c").eval()
    close(theirs(x).logits.detach(), net.apply(a, x).logits, "PEFT's")
    assert run("combine", "a", "b", "--out", "d", "--method", "ties", "--space", "core", "--density", 0.5, *more) == 0
    want = pf.merging.ties([pf.load(n, model) for n in "ab"], density=0.5, space="core")
    got = pf.load("d", model)
    close(got.net.delta(got.adapter), want[0].delta(want[1]), "ties")
    shared = ["--method", "ties", "--space", "shared", "--beta", 0.25, "--rank", 1]
    assert run("combine", "a", "b", "--out", "e", *shared, *more) == 0
    want = pf.merging.ties([pf.load(n, model) for n in "ab"], space="shared", beta=0.25, rank=1)
    got = pf.load("e", model)
    close(got.net.delta(got.adapter), want[0].delta(want[1]), "shared")


def test_layers_are_named_for_models_that_have_more(tmp_path: Path) -> None:
    """Without a model, nothing says which other layers there are: the adapters' own words, or whole names."""
    one = {r"layers\.0\..*q_proj": pf.LoRA(rank=2)}
    for name, seed in (("a", 0), ("b", 1)):
        written(tmp_path / name, one, seed)
    a, b = tmp_path / "a", tmp_path / "b"
    targets = json.loads((a / "adapter_config.json").read_text())["target_modules"]
    assert run("combine", a, b, "--out", tmp_path / "c") == 0
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["target_modules"] == targets
    other = json.loads((b / "adapter_config.json").read_text()) | {"target_modules": r".*layers\.0\..*q_proj"}
    (b / "adapter_config.json").write_text(json.dumps(other))
    assert run("combine", a, b, "--out", tmp_path / "d") == 0
    config = json.loads((tmp_path / "d" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.0.self_attn.q_proj"]
    net, _ = pf.load(tmp_path / "d", by_name["llama"].build())
    assert list(net.plan) == ["model.layers.0.self_attn.q_proj.weight"]


def test_other_methods_need_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = {"q_proj": pf.DoRA(rank=2)}
    ps = [written(tmp_path / n, rules, i) for i, n in enumerate("ab")]
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    folder = base(tmp_path / "base", by_name["llama"].build())
    assert "base's values" in fails(capsys, "combine", a, b, "--out", out, "--rank", 4)
    assert "base's values" in fails(
        capsys, "combine", a, b, "--out", out, "--rank", 4, "--model", folder / "config.json"
    )
    assert "no factors" in fails(capsys, "combine", a, b, "--out", out, "--model", folder)
    assert not out.exists()
    assert run("combine", a, b, "--out", out, "--rank", 16, "--model", folder) == 0
    got = pf.load(out, by_name["llama"].build())
    close(got.net.delta(got.adapter), summed(ps, [1.0, 1.0]), "sum")


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = {"q_proj": pf.LoRA(rank=2)}
    a, b, c, out = (tmp_path / n for n in "abco")
    written(a, rules, base_model_name_or_path="one/base")
    written(b, rules, base_model_name_or_path="another/base")
    written(c, {"q_proj": pf.LoRA(rank=2), "lm_head": pf.Full()}, base_model_name_or_path="one/base")
    net = pf.adapt(by_name["llama"].build(), rules)
    pf.save(tmp_path / "native", net, net.init())
    alora = pf.adapt(by_name["llama"].build(), {"q_proj": pf.ALoRA(rank=2, invocation=(3,))})
    pf.save(tmp_path / "alora", alora, alora.init(), format="peft")
    for given, match in [
        ((a, b), "'another/base' and .*a for 'one/base'.*--model"),
        ((a, c), "modules_to_save.*--model"),
        ((a, tmp_path / "native"), "--model"),
        ((a, tmp_path / "alora"), r"ALoRA\(.*depends on the input"),
        ((a, a, "--keep", 2), "--keep is not an option of --method linear"),
        ((a, a, "--weights", 1), r"weights have shape \[1\]"),
        ((a, a, "--method", "ties"), "full rank"),
        ((a, tmp_path / "nothing"), "nothing"),
    ]:
        assert re.search(match, fails(capsys, "combine", *given, "--out", out)), match
        assert not out.exists()
    out.mkdir()
    (out / "x").write_text("")
    assert "exists" in fails(capsys, "combine", a, a, "--out", out)
    assert torch.get_default_dtype() == torch.float32
