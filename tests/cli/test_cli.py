"""`peftfn inspect`, `convert` and `merge`, called in-process; one run as a program."""

import functools
import io
import json
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers as tf
from models import SMALL, bert, gpt2, llama, mixtral, tokens
from mutations import MODEL, good_files, mutated
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import ROOT
from torch import Tensor, nn

import peftfn as pf
from peftfn.__main__ import main
from peftfn.cli.base import load_base
from peftfn.cli.merge import _Merge
from peftfn.cli.progress import progress
from peftfn.core.method import registry
from peftfn.formats.kohya import FILE

KV = r"(k|v)_proj\.weight"


def run(*args: object) -> int:
    return main([str(a) for a in args])


def fails(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one line on stderr of a command that ends with 2."""
    capsys.readouterr()
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"peftfn {args[0]}: "), (out, err)
    return err


def base(path: Path, model: nn.Module, shards: int = 1, dtype: torch.dtype = torch.float32) -> Path:
    """A model's folder as transformers saves it, in several files, with a tokenizer beside."""
    size = sum(p.numel() * p.element_size() for p in model.to(dtype).parameters())
    model.save_pretrained(path, max_shard_size=-(-size // shards) if shards > 1 else "5GB")
    (path / "tokenizer.json").write_text('{"a": 1}')
    (path / "pytorch_model.bin").write_bytes(b"stale")
    return path


def adapter(path: Path, model: nn.Module, rules: dict[str, pf.Method], **options: Any) -> tuple[pf.Adapted, Any]:
    """A net with a random adapter, saved."""
    net = pf.adapt(model, rules)
    g = torch.Generator().manual_seed(1)
    values = {n: {k: t + torch.randn(t.shape, generator=g) * 0.2 for k, t in p.items()} for n, p in net.init(1).items()}
    pf.save(path, net, values, **options)
    return net, values


def tensors(folder: Path) -> dict[str, Tensor]:
    return {k: t for p in sorted(folder.glob("*.safetensors")) for k, t in load_file(p).items()}


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "llama": (llama, KV),
    "gpt2": (gpt2, r"c_(attn|proj|fc)\.weight"),
    "bert": (bert, r"(query|dense)\.weight"),
    "mixtral": (mixtral, KV),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_merge_is_net_merge_in_files(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    make, rule = MODELS[name]
    model = make().eval()
    folder = base(tmp_path / "base", model, shards=3, dtype=dtype)
    net, values = adapter(tmp_path / "adapter", model, {rule: pf.DoRA(rank=2), r"(?i)norm|ln_": pf.Full()})
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert run("merge", folder, tmp_path / "adapter", tmp_path / "out") == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert len([n for n in before if n.endswith(".safetensors")]) >= 3
    again = type(model).from_pretrained(tmp_path / "out", dtype=dtype).eval()
    merged = net.merge(values)
    for key, p in again.named_parameters():
        assert p.dtype == dtype
        assert torch.equal(p, merged[key]), key
    assert {p.name for p in (tmp_path / "out").iterdir()} == before.keys() - {"pytorch_model.bin"}
    for path in (tmp_path / "out").iterdir():
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as new, safe_open(folder / path.name, "pt") as old:
                assert list(new.keys()) == list(old.keys())
                assert new.metadata() == old.metadata()
        else:
            assert path.read_bytes() == before[path.name]


OURS = [c for c in registry.values() if c.__module__.startswith("peftfn.methods") and issubclass(c, pf.Weight)]


@pytest.mark.parametrize("method", OURS)
def test_every_method_merges_as_in_memory_or_says_why_not(method: type[pf.Weight], tmp_path: Path, capsys: Any) -> None:
    """Without a configuration: the base is known by tensor names and shapes alone."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleDict({"one": nn.Linear(8, 6), "two": nn.Linear(8, 6)})
    if method is pf.TiedTokens:
        model.two.weight.data.copy_(model.one.weight)
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors", {"format": "pt"})
    rule = r"bias$" if "linear" not in method.kinds else r"weight$"
    try:
        net, values = adapter(tmp_path / "adapter", model, {rule: method(**(method.cases[0] if method.cases else {}))})
    except ValueError as e:
        pytest.fail(f"{method.__name__} has no first case for [6, 8]: {e}")
    if not method.mergeable:
        line = fails(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
        assert "depends on the input" in line
        assert not (tmp_path / "out").exists()
        return
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    merged, found = net.merge(values), tensors(tmp_path / "out")
    assert found.keys() == merged.keys()
    for key, t in found.items():
        torch.testing.assert_close(t, merged[key].detach(), rtol=1e-6, atol=1e-6)


def test_merge_unties_what_the_adapter_makes_different(tmp_path: Path, capsys: Any) -> None:
    model = llama(tie_word_embeddings=True).eval()
    folder = base(tmp_path / "base", model, shards=2)
    assert "lm_head.weight" not in tensors(folder)
    net, values = adapter(tmp_path / "adapter", model, {r"lm_head|v_proj": pf.LoRA(rank=2)})
    assert run("merge", folder, tmp_path / "adapter", tmp_path / "out") == 0
    assert "no longer tied: lm_head.weight" in capsys.readouterr().out
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    merged = net.merge(values, untied=True)
    for key in ("lm_head.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"):
        assert torch.equal(again.get_parameter(key), merged[key])
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    ids = tokens(2)
    torch.testing.assert_close(again(ids).logits, net.apply(values, ids).logits, rtol=1e-4, atol=1e-5)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors(tmp_path / "out").keys()


@pytest.mark.parametrize("alike", [False, True], ids=["not adapted", "adapted alike"])
def test_merge_keeps_ties_that_the_adapter_leaves(alike: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True).eval()
    folder = base(tmp_path / "base", model)
    net = pf.adapt(
        model, {"v_proj": pf.LoRA(rank=2), **({"embed_tokens": pf.Full(), "lm_head": pf.Full()} if alike else {})}
    )
    values = net.init(1)
    if alike:
        values["lm_head.weight"]["diff"] = torch.randn_like(model.lm_head.weight)
        values["model.embed_tokens.weight"]["diff"] = values["lm_head.weight"]["diff"].T.contiguous()
    pf.save(tmp_path / "adapter", net, values)
    assert run("merge", folder, tmp_path / "adapter", tmp_path / "out") == 0
    found = tensors(tmp_path / "out")
    assert found.keys() == tensors(folder).keys()
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert torch.equal(found["model.embed_tokens.weight"], net.merge(values)["lm_head.weight"])


def test_merge_finds_tensors_without_the_models_prefix(tmp_path: Path) -> None:
    """A file that was saved from the bare model, as GPT-2's own: `h.0…` for `transformer.h.0…`."""
    model = gpt2().eval()
    folder = base(tmp_path / "base", model)
    bare = {k.removeprefix("transformer."): t for k, t in tensors(folder).items()}
    save_file(bare, folder / "model.safetensors", {"format": "pt"})
    net, values = adapter(tmp_path / "adapter", model, {r"c_attn\.weight|lm_head": pf.LoRA(rank=2)})
    assert run("merge", folder, tmp_path / "adapter", tmp_path / "out") == 0
    merged, found = net.merge(values, untied=True), tensors(tmp_path / "out")
    assert found.keys() == bare.keys() | {"lm_head.weight"}
    for key, t in found.items():
        assert torch.equal(t, merged[key if key == "lm_head.weight" else f"transformer.{key}"]), key


def test_merge_refuses_a_tie_that_the_model_always_has(tmp_path: Path, capsys: Any) -> None:
    c = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = tf.T5ForConditionalGeneration(tf.T5Config(**SMALL, **c))
    folder = base(tmp_path / "base", model)
    adapter(tmp_path / "adapter", model, {r"encoder\.embed_tokens": pf.Full()})
    assert "always ties it" in fails(capsys, "merge", folder, tmp_path / "adapter", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []


def test_merge_holds_one_tensor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than a few tensors' memory, of a base of forty, all adapted."""
    big = {f"layers.{i}.weight": torch.randn(256, 512) for i in range(40)}
    (tmp_path / "base").mkdir()
    save_file(big, tmp_path / "base" / "model.safetensors")
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(512, 256, bias=False) for _ in range(40))})
    model.load_state_dict(big)
    adapter(tmp_path / "adapter", model, {"layers": pf.LoRA(rank=1)})
    del model, big
    seen: list[int] = []
    value = _Merge.value

    def watched(self: _Merge, slot: str) -> Tensor:
        new = value(self, slot)
        seen.append(own_memory())
        return new

    monkeypatch.setattr(_Merge, "value", watched)
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out") == 0
    assert len(seen) == 40
    assert max(seen) - seen[0] < 8 * 256 * 512 * 4


def own_memory() -> int:
    """Bytes of this process that no file stands behind."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


BAD_MERGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no base": (lambda p: (p / "base").rename(p / "gone"), "base is not a folder"),
    "no adapter": (lambda p: (p / "adapter").rename(p / "gone"), "adapter does not exist"),
    "out is there": (lambda p: (p / "out" / "x").mkdir(parents=True), "out exists; name a new folder"),
    "no weights": (lambda p: [f.unlink() for f in (p / "base").glob("*.safetensors*")], "no \\*.safetensors to merge"),
    "truncated": (
        lambda p: [f.write_bytes(f.read_bytes()[:900]) for f in (p / "base").glob("*.safetensors")],
        "model.*safetensors: not a valid safetensors file",
    ),
    "index outside": (lambda p: edit(p, "../x.safetensors"), "is not a file in this folder"),
    "index of nothing": (lambda p: edit(p, None), "weight_map is"),
    "config of another size": (lambda p: config(p, hidden_size=32), "config.json says"),
    "unknown model": (lambda p: config(p, model_type="nope"), "transformers .* does not support it"),
    "unknown class": (lambda p: config(p, architectures=["Nope"]), "has no Nope"),
    "adapter of another model": (lambda p: config(p, num_hidden_layers=1), "layers.1"),
}


def edit(path: Path, name: str | None) -> None:
    file = path / "base" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = [] if name is None else dict.fromkeys(index["weight_map"], name)
    file.write_text(json.dumps(index))


def config(path: Path, **changes: Any) -> None:
    file = path / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("what", BAD_MERGES)
def test_merge_of_bad_input_says_so_in_one_line(what: str, tmp_path: Path, capsys: Any) -> None:
    model = llama()
    base(tmp_path / "base", model, shards=2)
    adapter(tmp_path / "adapter", model, {KV: pf.LoRA(rank=2)})
    damage, message = BAD_MERGES[what]
    damage(tmp_path)
    line = fails(capsys, "merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert re.search(message, line), line
    assert {p.name for p in tmp_path.iterdir()} <= {"base", "adapter", "gone", "out"}
    assert what == "out is there" or not (tmp_path / "out").exists()


def test_merge_refuses_what_the_files_have_in_another_form(tmp_path: Path, capsys: Any) -> None:
    """transformers stacks the experts of a checkpoint; there is no one tensor of them to merge into."""
    model = mixtral()
    folder = base(tmp_path / "base", model)
    adapter(tmp_path / "adapter", model, {r"experts\.down_proj": pf.LoRA(rank=2)})
    assert "no file of the base has it" in fails(capsys, "merge", folder, tmp_path / "adapter", tmp_path / "out")


def test_progress_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.console

    shown, real = {}, rich.console.Console
    for terminal in (True, False):
        shown[terminal] = text = io.StringIO()
        made = functools.partial(real, file=text, force_terminal=terminal, width=80)
        monkeypatch.setattr(rich.console, "Console", lambda made=made, **_: made())
        with progress("merging", 1000) as done:
            done(400)
            done(600)
    assert "merging" in shown[True].getvalue() and "1.0/1.0 kB" in shown[True].getvalue()
    assert shown[False].getvalue() == ""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with progress("merging", 1000) as done:
        done(1000)


def test_merge_refuses_what_is_not_finite(tmp_path: Path, capsys: Any) -> None:
    model = llama()
    folder = base(tmp_path / "base", model)
    net = pf.adapt(model, {KV: pf.LoRA(rank=2)})
    huge = {n: {k: torch.full_like(t, 1e30) for k, t in p.items()} for n, p in net.init().items()}
    pf.save(tmp_path / "adapter", net, huge)
    line = fails(capsys, "merge", folder, tmp_path / "adapter", tmp_path / "out")
    assert "k_proj.weight: the merged tensor has" in line and "not finite" in line
    assert {p.name for p in tmp_path.iterdir()} == {"base", "adapter"}


def test_a_base_is_known_by_names_alone_only_where_that_is_certain(tmp_path: Path, capsys: Any) -> None:
    model = gpt2()
    folder = base(tmp_path / "base", model)
    adapter(tmp_path / "adapter", model, {r"attn\.c_proj\.weight": pf.LoRA(rank=2)})
    (folder / "config.json").unlink()
    line = fails(capsys, "merge", folder, tmp_path / "adapter", tmp_path / "out")
    assert "may be stored transposed" in line and "config.json" in line


def test_guessed_kinds_are_those_of_the_model(tmp_path: Path) -> None:
    layers = {"embed_tokens": nn.Embedding(5, 4), "proj": nn.Linear(4, 4), "conv1": nn.Conv1d(2, 3, 2)}
    layers |= {"conv2": nn.Conv2d(2, 3, 2), "conv3": nn.Conv3d(2, 3, 2), "norm": nn.LayerNorm(4)}
    model = nn.ModuleDict({"block": nn.ModuleDict({**layers, "bn": nn.BatchNorm1d(3)})})
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    guessed = load_base(tmp_path)
    assert guessed.guessed and not guessed.hollow
    found, real = ({s.name: (s.kind, s.shape, s.bias) for s in pf.sites(m).values()} for m in (guessed.model, model))
    assert found == real
    for n, p in guessed.model.named_parameters():
        assert torch.equal(p, model.get_parameter(n))


LORA = {KV: pf.LoRA(rank=2, alpha=3), r"layers\.0\..*q_proj": pf.LoRA(rank=3, alpha=3)}


@pytest.mark.parametrize("to", ["native", "peft", "kohya", "swift"])
@pytest.mark.parametrize("source", ["native", "peft", "kohya", "swift"])
def test_convert_from_each_format_to_each(source: str, to: str, tmp_path: Path, capsys: Any) -> None:
    model = llama().eval()
    folder = base(tmp_path / "base", model)
    rules: dict[str, pf.Method] = {KV: pf.LoRA(rank=2, alpha=3)}
    net, values = adapter(tmp_path / "a", model, rules, format=source)
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", to, "--model", folder) == 0
    assert "LoRA at 4 sites" in capsys.readouterr().out
    again = pf.load(tmp_path / "b", model, format=to)
    ids = tokens(2)
    torch.testing.assert_close(again.net.apply(again.adapter, ids).logits, net.apply(values, ids).logits)
    assert run("convert", tmp_path / "a", tmp_path / "c", "--to", to, "--model", folder / "config.json") == 0
    for one, two in zip(sorted((tmp_path / "b").rglob("*")), sorted((tmp_path / "c").rglob("*")), strict=True):
        if one.suffix == ".safetensors":
            torch.testing.assert_close(load_file(one), load_file(two), rtol=0, atol=0)


@pytest.mark.parametrize("to", ["native", "peft"])
def test_convert_names_the_base_and_not_its_configuration(to: str, tmp_path: Path) -> None:
    model = llama()
    folder = base(tmp_path / "base", model)
    adapter(tmp_path / "a", model, {KV: pf.LoRA(rank=2)})
    for out, given in (("b", folder), ("c", folder / "config.json")):
        assert run("convert", tmp_path / "a", tmp_path / out, "--to", to, "--model", given) == 0
        assert pf.inspect(tmp_path / out)[""]["base_model"] == str(folder)
    assert type(pf.load_model(tmp_path / "b").net.model) is type(model)
    pf.save(tmp_path / "d", *pf.load(tmp_path / "a", model), format="peft", extra={"base_model_name_or_path": "own/er"})
    assert run("convert", tmp_path / "d", tmp_path / "e", "--to", to, "--model", folder) == 0
    assert pf.inspect(tmp_path / "e")[""]["base_model"] == "own/er"


def test_a_shadow_needs_a_model_that_was_loaded(tmp_path: Path, capsys: Any) -> None:
    model = llama()
    folder = base(tmp_path / "base", model)
    adapter(tmp_path / "a", model, {"model": pf.Shadow(rank=2)}, format="peft")
    line = fails(capsys, "convert", tmp_path / "a", tmp_path / "b", "--to", "native", "--model", folder)
    assert "without values here: load its weights" in line


def test_convert_options_reach_the_format(tmp_path: Path, capsys: Any) -> None:
    model = llama()
    folder = base(tmp_path / "base", model)
    adapter(tmp_path / "a", model, LORA)
    to = ["--model", folder, "--to"]
    assert run("convert", tmp_path / "a", tmp_path / "k.safetensors", *to, "kohya", "--prefix", "lora_te") == 0
    assert all(k.startswith("lora_te_model_layers_") for k in load_file(tmp_path / "k.safetensors"))
    assert run("convert", tmp_path / "a", tmp_path / "d", *to, "kohya", "--layout", "diffusers") == 0
    assert all(k.startswith("unet.model.layers.") for k in load_file(tmp_path / "d" / FILE))
    adapter(tmp_path / "b", model, {KV: pf.LoRA(rank=2)})
    assert run("convert", tmp_path / "b", tmp_path / "s", *to, "swift", "--name", "mine") == 0
    assert (tmp_path / "s" / "mine" / "adapter_config.json").is_file()
    assert "--name is not an option of peft" in fails(
        capsys, "convert", tmp_path / "b", tmp_path / "p", *to, "peft", "--name", "x"
    )


def test_convert_gives_the_best_lora_of_what_a_format_lacks(tmp_path: Path, capsys: Any) -> None:
    model = llama()
    folder = base(tmp_path / "base", model)
    net, values = adapter(tmp_path / "a", model, {"k_proj": pf.OFT(block_size=4)})
    args = "convert", tmp_path / "a", tmp_path / "b", "--to", "kohya", "--model"
    assert "kohya's files have no OFT; peftfn.to_lora" in fails(capsys, *args, folder)
    assert "relative to the base's values" in fails(capsys, *args, folder / "config.json", "--rank", "8")
    assert run(*args, folder, "--rank", "8") == 0
    again = pf.load(tmp_path / "b", model)
    merged = again.net.merge(again.adapter)
    for name in net.plan:
        torch.testing.assert_close(merged[name], net.merge(values)[name], rtol=1e-4, atol=1e-5)


def test_convert_needs_values_where_the_adapter_is_relative_to_them(tmp_path: Path, capsys: Any) -> None:
    model = llama()
    folder = base(tmp_path / "base", model)
    adapter(tmp_path / "a", model, {KV: pf.LoRA(rank=2), r"lm_head": pf.Full()}, format="peft")
    args = "convert", tmp_path / "a", tmp_path / "b", "--to", "native", "--model"
    assert "lm_head.weight: Full" in fails(capsys, *args, folder / "config.json")
    assert not (tmp_path / "b").exists()
    assert run(*args, folder) == 0


def test_convert_finds_the_model_that_the_adapter_names(tmp_path: Path, capsys: Any) -> None:
    model = llama()
    base(tmp_path / "base", model)
    adapter(tmp_path / "a", model, {KV: pf.LoRA(rank=2)}, format="peft")
    assert "give --model" in fails(capsys, "convert", tmp_path / "a", tmp_path / "b", "--to", "native")
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "native") == 0
    pf.save(tmp_path / "s", *pf.load(tmp_path / "b", model), format="swift")
    assert run("convert", tmp_path / "s", tmp_path / "p", "--to", "peft") == 0
    assert list(pf.load(tmp_path / "p", model).net.plan) == list(pf.load(tmp_path / "b", model).net.plan)
    assert "exists; name a new" in fails(capsys, "convert", tmp_path / "s", tmp_path / "p", "--to", "peft")


FACTS = {
    "native": ({"LoRA": 5}, {"2": 4, "3": 1}),
    "peft": ({"LORA": 5}, {"2": 4, "3": 1}),
    "kohya": ({"LoRA": 5}, {"2": 4, "3": 1}),
}


@pytest.mark.parametrize("format", FACTS)
def test_inspect_tells_what_is_there(format: str, tmp_path: Path, capsys: Any) -> None:
    model = llama()
    folder = base(tmp_path / "base", model)
    adapter(tmp_path / "a", model, LORA, format=format)
    assert run("inspect", tmp_path / "a", "--json") == 0
    (facts,) = json.loads(capsys.readouterr().out).values()
    numbers = sum(t.numel() for t in tensors(tmp_path / "a").values())
    assert (facts["format"], facts["methods"], facts["ranks"]) == (format, *FACTS[format])
    assert (len(facts["layers"]), facts["parameters"], facts["bytes"]) == (5, numbers, 4 * numbers)
    assert facts["whole"] == []
    for where in (folder, folder / "config.json"):
        assert run("inspect", tmp_path / "a", "--model", where) == 0
        assert f"fits     {where}: yes" in capsys.readouterr().out
    base(tmp_path / "other", bert())
    assert run("inspect", tmp_path / "a", "--model", tmp_path / "other") == 1
    assert f"fits     {tmp_path / 'other'}: no: " in capsys.readouterr().out
    assert run("inspect", tmp_path / "a", "--layers") == 0
    out = capsys.readouterr().out
    assert "rank     2 at 4, 3 at 1" in out
    assert out.count("\nlayer ") == 5


def test_inspect_lists_several_adapters(tmp_path: Path, capsys: Any) -> None:
    model = llama()
    net, values = adapter(tmp_path / "x", model, {KV: pf.LoRA(rank=2)})
    for name in ("one", "two"):
        pf.save(tmp_path / "s", net, values, format="swift", name=name)
    assert run("inspect", tmp_path / "s", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert {n: (f["format"], f["ranks"]) for n, f in found.items()} == dict.fromkeys(
        ("one", "two"), ("swift", {"2": 4})
    )
    assert run("inspect", tmp_path / "s") == 0
    assert f"{tmp_path / 's'}, two" in capsys.readouterr().out
    adapter(tmp_path / "p", model, {KV: pf.LoRA(rank=2), "lm_head": pf.Full()}, format="peft")
    assert run("inspect", tmp_path / "p") == 0
    assert "others   1 tensors, lm_head.weight first" in capsys.readouterr().out


def test_inspect_says_what_a_server_does_not_take(tmp_path: Path, capsys: Any) -> None:
    model = llama()
    adapter(tmp_path / "a", model, {KV: pf.LoRA(rank=24)}, format="peft")
    adapter(tmp_path / "b", model, {r"(q|k|v)_proj\.weight": pf.LoRA(rank=2)}, format="peft")
    assert run("inspect", tmp_path / "a", "--for", "vllm") == 1
    (line,) = [w for w in capsys.readouterr().out.splitlines() if w.startswith("obstacle ")]
    assert "a rank above `--max-lora-rank`" in line and ": 24, and the server takes 16. Cure: " in line
    assert run("inspect", tmp_path / "a", "--for", "vllm", "--max-lora-rank", 32) == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "a", "--for", "sglang", "--json") == 1
    (facts,) = json.loads(capsys.readouterr().out).values()
    assert len(facts["obstacles"]) == 2 and all("without `q_proj`" in line for line in facts["obstacles"])
    for engine in ("vllm", "sglang"):
        assert run("inspect", tmp_path / "b", "--for", engine) == 0
        assert "obstacle none" in capsys.readouterr().out
    folder = base(tmp_path / "base", model)
    for rules, options in [({KV: pf.DoRA(rank=2)}, {}), ({"q_proj|v_proj": pf.OFT(block_size=2)}, {"format": "peft"})]:
        where = tmp_path / str(len(options))
        adapter(where, model, rules, **options)
        assert run("inspect", where, "--for", "vllm") == 1  # the native format; then what its cure writes
        assert run("convert", where, f"{where}-lora", "--to", "peft", "--rank", 4, "--model", folder) == 0
        assert run("inspect", f"{where}-lora", "--for", "vllm") == 0
    assert "vLLM starts with 1, 8" in fails(capsys, "inspect", tmp_path / "a", "--for", "vllm", "--max-lora-rank", 24)
    assert "give --for" in fails(capsys, "inspect", tmp_path / "a", "--max-lora-rank", 32)


def test_inspect_of_bad_input_says_so_in_one_line(tmp_path: Path, capsys: Any) -> None:
    assert "nothing does not exist" in fails(capsys, "inspect", tmp_path / "nothing")
    assert "no adapter of a known format" in fails(capsys, "inspect", tmp_path)
    for files, message in [
        ({"peftfn.json": "{}", "adapter.safetensors": ""}, "not a valid safetensors"),
        ({"adapter_config.json": "[]"}, "not a PEFT configuration"),
        ({"adapter_config.json": "{", "adapter_model.safetensors": "x"}, "not valid JSON"),
        ({"adapter_config.json": '{"peft_type": "LORA"}'}, "adapter_model.safetensors is missing"),
        ({FILE: "no"}, "not a valid safetensors file"),
    ]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        assert message in fails(capsys, "inspect", folder)


def test_mutated_files_never_end_in_a_traceback(tmp_path: Path, capsys: Any) -> None:
    """Files broken at random, of every format: each command ends with 0, 1 or 2, and says why in one line."""
    MODEL.save_pretrained(tmp_path / "base")
    capsys.readouterr()
    codes: dict[int, int] = {}
    for seed in range(25):
        rng, root = random.Random(seed), tmp_path / str(seed)
        name = rng.choice(sorted(good_files()))
        victim = rng.choice(sorted(good_files()[name]))
        for file, content in good_files()[name].items():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(mutated(file, content, rng) if file == victim else content)
        for args in (
            ["inspect", root / name, "--model", tmp_path / "base" / "config.json"],
            ["inspect", root / name, "--spectrum"],
            ["inspect", root / name, "--spectrum", "--model", tmp_path / "base"],
            ["convert", root / name, root / "out", "--to", "native", "--model", tmp_path / "base"],
            ["merge", tmp_path / "base", root / name, root / "merged"],
        ):
            code = run(*args)
            codes[code] = codes.get(code, 0) + 1
            out, err = capsys.readouterr()
            if code == 2:
                named = str(root) in err or re.search(r"\bmodel[.:]", err)  # the file, or the site
                assert out == "" and err.count("\n") == 1 and named, (seed, err)
            else:
                assert out != "" and err == "", (seed, err)
    assert codes[0] > 3 and codes[2] > 20, codes


COMMANDS = ("demo", "inspect", "convert", "merge", "combine", "extract", "suggest", "verify", "serve")


def test_every_command_has_help_and_a_version(capsys: Any) -> None:
    for command in ((), *((c,) for c in COMMANDS)):
        for option, text in (("--help", "usage: peftfn"), ("--version", f"peftfn {pf.__version__}\n")):
            with pytest.raises(SystemExit) as end:
                main([*command, option])
            assert end.value.code == 0 and capsys.readouterr().out.startswith(text)


def test_help_needs_no_torch() -> None:
    """It starts in a twentieth of a second, for torch is imported where a command needs it. So is all of peftfn."""
    said = "import sys, peftfn.__main__ as m, peftfn; print(*m.main.__module__.split(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    assert done.stdout == "peftfn.__main__ False\n"


def test_the_registry_is_whole_whatever_is_imported_first() -> None:
    for first in ("from peftfn.method import registry", "from peftfn.formats.native_config import registry"):
        done = subprocess.run([sys.executable, "-c", f"{first}; print(*registry)"], capture_output=True, text=True)
        assert {n for n, c in registry.items() if c.__module__.startswith("peftfn.")} <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("inspect /no/such", '/no/such does not exist and is not a Hub repository ("owner/name")'),
        ("inspect", "the following arguments are required: PATH"),
        ("convert a b --to nope", "argument --to: invalid choice: 'nope'"),
        ("convert a b --to peft --rank none", "argument --rank: 'none' is not a positive integer"),
        ("demo --steps 0", "argument --steps: '0' is not a positive integer"),
        ("demo --out {file}", "{file}/adapters: Not a directory"),
        ("demo --out {long}", "{long}/adapters: File name too long"),
        ("merge {file} b c", "{file} is not a folder"),
        ("nope", "argument command: invalid choice: 'nope'"),
        ("", "the following arguments are required: command"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(given: str, said: str, tmp_path: Path, capsys: Any) -> None:
    """Also of the demo, before it trains; and for a wrong option as for a wrong file."""
    file = tmp_path / "file"
    file.touch()
    names = {"file": file, "long": tmp_path / ("x" * 300)}
    words = given.format(**names).split()
    try:
        code: Any = main(words)
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    who = f"peftfn {words[0]}" if words and words[0] in COMMANDS else "peftfn"
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"{who}: {said.format(**names)}"), err


def test_as_a_program_the_exit_codes_are_the_process_s() -> None:
    done = subprocess.run([sys.executable, "-m", "peftfn", "inspect", "/no/such"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == 'peftfn inspect: /no/such does not exist and is not a Hub repository ("owner/name")\n'


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # PEFT asks for it
def test_the_pages_commands_print_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "command_line.md").read_text()
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, flags=re.S | re.M)
    assert sum(language == "sh" for language, _ in blocks) >= 4
    printed, names = "", {}
    for language, text in blocks:
        if language == "python":
            exec(text, names)
        elif language == "sh":
            capsys.readouterr()
            for line in text.splitlines():
                assert run(*shlex.split(line.removeprefix("peftfn "))) == 0, capsys.readouterr().err
            printed = capsys.readouterr().out
        else:
            assert printed == text
    assert tensors(tmp_path / "merged").keys() == tensors(tmp_path / "base").keys()


def test_what_a_configuration_says_beside_the_method_stays(tmp_path: Path, capsys: Any) -> None:
    """Activated and for repeated layers: inspected, converted to PEFT's own format, and nothing else is made of it."""
    folder = base(tmp_path / "base", llama())
    adapter(tmp_path / "a", llama(), {"q_proj": pf.LoRA(rank=2)}, format="peft")
    file = tmp_path / "a" / "adapter_config.json"
    extra = {"alora_invocation_tokens": [5], "layer_replication": [[1, 2], [0, 1]], "task_type": "CAUSAL_LM"}
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    assert run("inspect", tmp_path / "a", "--model", folder) == 0
    out = capsys.readouterr().out
    assert "extra    alora_invocation_tokens [5]\nextra    layer_replication [[1, 2], [0, 1]]\nfits" in out
    args = "convert", tmp_path / "a", tmp_path / "b", "--model", folder, "--to"
    for to in ("swift", "kohya"):
        assert "repeated layers" in fails(capsys, *args, to), to
    assert run(*args, "peft") == 0
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text()).items() >= extra.items()
    del extra["alora_invocation_tokens"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"alora_invocation_tokens": None}))
    assert "a model with repeated layers" in fails(capsys, "merge", folder, tmp_path / "a", tmp_path / "m")


def test_an_adapter_of_the_hub(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command takes owner/name where that is no path; anything else that is no path never reaches the hub."""
    folder = base(tmp_path / "base", llama())
    adapter(tmp_path / "a", llama(), {"q_proj": pf.LoRA(rank=2)}, format="peft")
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or tmp_path / "a")
    assert run("inspect", "owner/name", "--model", folder) == 0
    assert "adapter  owner/name\nformat   peft" in capsys.readouterr().out
    assert run("convert", "owner/name", tmp_path / "b", "--to", "native", "--model", folder) == 0
    assert run("merge", folder, "owner/name", tmp_path / "m") == 0
    assert asked == ["owner/name"] * 3
    for command in (
        ("inspect", "a/b/c"),
        ("convert", "../a", tmp_path / "c", "--to", "peft"),
        ("merge", folder, "x", tmp_path / "c"),
    ):
        assert "does not exist" in fails(capsys, *command)
    assert len(asked) == 3


def test_another_base_is_refused_unless_it_is_meant(tmp_path: Path, capsys: Any) -> None:
    model = llama()
    adapter(tmp_path / "a", model, {KV: pf.LoRA(rank=2)})
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    other = base(tmp_path / "other", model)
    calls = {
        "merge": (other, tmp_path / "a", tmp_path / "merged"),
        "convert": (tmp_path / "a", tmp_path / "b", "--to", "peft", "--model", other),
        "verify": (tmp_path / "a", "--model", other),
    }
    for command, given in calls.items():
        text = fails(capsys, command, *given)
        assert "made on another base" in text and "--any-base" in text
        assert run(command, *given, "--any-base") == 0
    assert run("inspect", tmp_path / "a", "--model", other) == 1
    assert "made on another base" in capsys.readouterr().out
