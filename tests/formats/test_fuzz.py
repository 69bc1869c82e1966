"""Broken and hostile files: `load` raises a clean error that names the file, at once, or gives what the file says.

PEFTFN_FUZZ=10000 python -m pytest tests/test_fuzz.py    runs that many mutations in place of a few hundred.
"""

import json
import os
import random
import resource
import signal
import struct
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import small_readers
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import by_name, tokens
from safetensors.torch import load_file
from test_peft_parity import randomised

import peftfn as pf
from peftfn.formats.kohya import FILE as KOHYA
from peftfn.testing import shaken

EXAMPLES = int(os.environ.get("PEFTFN_FUZZ", "300"))
SECONDS = 5.0
"""A load of the tiny model may take this long, on a busy machine; a good one takes some milliseconds."""
MODEL = by_name["llama"].build()
KINDS = ("flip", "cut", "header", "json", "values")


Q, K, V, GATE = (rf"{n}_proj\.weight" for n in ["q", "k", "v", "gate"])
OTHERS: dict[str, list[dict[str, pf.Method]]] = {
    "swift": [{Q: pf.LoRA(2), V: pf.LoRA(2)}, {Q: pf.DoRA(2, alpha=3)}, {"norm": pf.Full()}],
    "kohya": [
        {Q: pf.LoRA(2, alpha=3), K: pf.LoHa(2), V: pf.DoRA(2)},
        {Q: pf.InputDoRA(pf.LoRA(2)), K: pf.LoKr(2), V: pf.GLoRALycoris(2, alpha=3), GATE: pf.DiagOFT(4)},
        {Q: pf.LoKr(2, decompose_both=True), V: pf.IA3(), K: pf.IA3(feedforward=True), GATE: pf.Full()},
    ],
}


@cache
def good_files() -> dict[str, dict[str, bytes]]:
    """name → {file name: its bytes}, of every format and with every kind of entry a configuration may have."""
    with tempfile.TemporaryDirectory() as folder:
        return written(Path(folder))


def written(root: Path) -> dict[str, dict[str, bytes]]:
    lora = {"r": 2, "lora_alpha": 3}
    configs: dict[str, peft.PeftConfig] = {
        "lora": peft.LoraConfig(
            target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3}, alpha_pattern={"0.*v_proj": 5}, **lora
        ),
        "dora": peft.LoraConfig(target_modules=r".*\.(q|k)_proj", use_dora=True, modules_to_save=["lm_head"], **lora),
        "embedding": peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 7], **lora),
        "layers": peft.LoraConfig(
            target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="layers", exclude_modules=["x"], **lora
        ),
        "vera": peft.VeraConfig(target_modules=["q_proj"], r=3),
        "vblora": peft.VBLoRAConfig(
            target_modules=["q_proj"], r=2, num_vectors=6, vector_length=4, topk=3, save_only_topk_weights=True
        ),
        "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "lokr": peft.LoKrConfig(target_modules=["q_proj"], r=2),
        "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4, r=0),
        "norms": peft.LNTuningConfig(target_modules=["norm"]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, config in configs.items():
            randomised(peft.get_peft_model(by_name["llama"].build(), config)).save_pretrained(root / f"peft {name}")
    rules = {
        "q_proj": pf.VeRA(3),
        r"\.1\..*v_proj": pf.LoRA(2),
        "v_proj": pf.chain(pf.LoRA(1), pf.IA3()),
        "k_proj": pf.VBLoRA(1, vectors=3, length=4),
    }
    net = pf.adapt(MODEL, rules)
    pf.save(root / "native", net, net.init(3))
    for format, rules in OTHERS.items():
        for i, methods in enumerate(rules):
            other = pf.adapt(MODEL, methods)
            pf.save(root / f"{format} {i}", other, shaken(other.init(3), 3), format=format)
    out = {}
    for path in sorted(root.iterdir()):
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in (".json", ".safetensors")]
        out[path.name] = {str(p.relative_to(root)): p.read_bytes() for p in files}
    return out


VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 65, 10**6, 10**12, 2**63, -(10**30), 0.5, 1e308, float("nan"), float("inf"), "",
    "x", "q_proj", "r", "LORA", "VERA", "OSF", "PROMPT_TUNING", "../../x", "/etc/passwd", "\0", "ä" * 300, "(a+)+b",
    "(a*){999999999}", ".*" * 100 + "x", "(", "(?P<a>.)(?P=a)", r"\d+", [], [[]], ["q_proj"], ["x", 3], [None], [1.5],
    {}, {"q_proj": 1}, {"q_proj": "a"}, {"a": {"b": {"c": []}}}, {"method": "LoRA", "rank": 10**12},
    {"(a*){999999999}": 2}, {"method": "VeRA"}, {"method": "Chain", "methods": []}, {"": 3},
]  # fmt: skip
NAMES = ["", "x", "/etc/passwd", "../../x", "a/b", "__metadata__", "base_model.", "lora_A.weight", "\0", "é" * 200]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in items for p in places(v, (*path, k)))]


def edited(value: Any, rng: random.Random, values: list[Any], names: list[str]) -> Any:
    """A JSON value with one thing in it changed."""
    *path, last = rng.choice(places(value)[1:] or [("",)])
    value = inside = json.loads(json.dumps(value))
    for k in path:
        inside = inside[k]
    match rng.choice(["set", "set", "set", "remove", "rename", "swap", "add"]):
        case "set":
            inside[last] = rng.choice(values)
        case "remove":
            del inside[last]
        case "rename" if isinstance(inside, dict):
            inside[rng.choice([*names, *inside])] = inside.pop(last)
        case "swap" if isinstance(inside, dict):
            other = rng.choice(sorted(inside))
            inside[last], inside[other] = inside[other], inside[last]
        case _ if isinstance(inside, dict):
            inside[rng.choice(names)] = rng.choice(values)
        case _:
            inside.append(rng.choice(values))
    return value


def mutated(name: str, content: bytes, rng: random.Random) -> bytes:
    kind = rng.choice(KINDS)
    where = rng.randrange(max(1, len(content)))
    if name.endswith(".json") and kind in ("json", "header", "values"):
        text = json.dumps(
            edited(json.loads(content), rng, VALUES, [*NAMES, "r", "use_dora", "bias", "init_lora_weights"])
        )
        if rng.random() < 0.1:  # a key twice
            text = '{"peft_type": "IA3", "version": 1, ' + text[1:]
        return text.encode("utf-8", "surrogatepass")
    if kind == "cut":
        return content[:where] if rng.random() < 0.5 else content + content[where:]
    if kind == "flip" or name.endswith(".json"):
        out = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            out[rng.randrange(rng.choice([len(content), min(len(content), 400)]))] = rng.randrange(256)
        return bytes(out)
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    if kind == "values":
        if not data:
            return content
        at = rng.randrange(len(data) // 4) * 4
        number = rng.choice([float("nan"), float("inf"), -1.0, 1e3, 0.0])
        return content[: 8 + size] + data[:at] + struct.pack("<f", number) + data[at + 4 :]
    edges: list[Any] = [
        0,
        1,
        -1,
        2,
        10**12,
        2**63,
        [],
        [10**12],
        [2**31, 2**33],
        [0],
        [1, 1, 1],
        "F64",
        "F16",
        "I64",
        "BOOL",
        "X",
        None,
        "",
        len(data),
    ]
    if rng.random() < 0.1:  # the same name twice
        twice = rng.choice(sorted(header))
        text = "{" + json.dumps(twice) + ":" + json.dumps(header[twice]) + "," + json.dumps(header)[1:]
    else:
        text = json.dumps(edited(header, rng, edges, [*NAMES, *header]))
    raw = text.encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    length = rng.choice([len(raw)] * 9 + [2**62])
    return struct.pack("<Q", length) + raw + data


class Hang(BaseException):
    """Not an Exception, so that nothing on the way can catch it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise Hang after so many seconds."""

    def hang(*_: Any) -> None:
        raise Hang(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def outputs(net: pf.Adapted, adapter: Any) -> torch.Tensor:
    with torch.no_grad():
        return net.apply(adapter, tokens(2)).logits


def as_the_file_says(path: Path, net: pf.Adapted, adapter: Any) -> None:
    """An oracle of its own: the tensors of a native file, by name; PEFT itself for a file of PEFT's; and for those of
    kohya and ms-swift readers of a few lines."""
    if (path / "peftfn.json").exists():
        given = load_file(path / "adapter.safetensors")
        for site, leaf in adapter.items():
            for k, t in leaf.items():
                assert t.numpy().tobytes() == given[f"adapter/{site}/{k}"].numpy().tobytes(), (site, k)
    elif (path / "adapter_config.json").exists():
        try:
            with limited(SECONDS), warnings.catch_warnings(record=True) as said, torch.no_grad():
                warnings.simplefilter("always")
                theirs = peft.PeftModel.from_pretrained(by_name["llama"].build(), path).eval()
                want = theirs(tokens(2)).logits
        except (Exception, Hang):  # what PEFT refuses, in whatever way, says nothing about us
            return
        if any("missing adapter keys" in str(w.message) for w in said):
            return  # it took other layers, by default, and left them as they start
        got = outputs(net, adapter)
        scale = want.nan_to_num(0, 0, 0).abs().max().clamp(min=1)
        assert torch.allclose(got, want, rtol=1e-4, atol=float(1e-4 * scale), equal_nan=True), (
            "other outputs than PEFT's"
        )
    else:
        file = path / KOHYA
        want = small_readers.kohya(file, MODEL) if file.exists() else small_readers.swift(path / "default", MODEL)
        got = net.merge(adapter)
        for name, value in (want or {}).items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)
        changed = {n for n, p in MODEL.named_parameters() if n in net.plan}
        assert want is None or changed == want.keys()


def one(root: Path, seed: int) -> str:
    """What `load` made of one mutated file: "loaded" or "refused"; AssertionError for anything else."""
    rng = random.Random(seed)
    name = rng.choice(sorted(good_files()))
    files = good_files()[name]
    victim = rng.choice(sorted(files))
    changed = mutated(victim, files[victim], rng)
    for file, content in {**files, victim: changed}.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content)
    path = root / name
    before = {n: (p, p._version, p.data_ptr()) for n, p in MODEL.named_parameters()}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with limited(SECONDS):
            loaded = pf.load(path, MODEL)
    except (ValueError, FileNotFoundError) as e:
        assert str(root) in str(e) and len(str(e)) < 3000, f"an error that names no file: {e!r}"
        loaded = None
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert grown < 1 << 19, f"{grown} KiB for a tiny file"
    assert {n: (p, p._version, p.data_ptr()) for n, p in MODEL.named_parameters()} == before, "the model was changed"
    if loaded is not None and changed != files[victim]:
        as_the_file_says(path, *loaded)
    return "refused" if loaded is None else "loaded"


def test_mutated_files() -> None:
    """Whatever is done to a file. Both outcomes must occur, or nothing was tested."""
    seen = {"loaded": 0, "refused": 0}

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.generate],  # a seed has no smaller form
        derandomize=EXAMPLES <= 300,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**32))
    def mutations(seed: int) -> None:
        with tempfile.TemporaryDirectory() as root:
            seen[one(Path(root), seed)] += 1

    mutations()
    print(f"{sum(seen.values())} mutations: {seen}")
    assert seen["loaded"] > 0.02 * sum(seen.values()) and seen["refused"] > 0.3 * sum(seen.values()), seen


@pytest.mark.parametrize("format", OTHERS)
def test_the_oracles_know_the_good_files(format: str, tmp_path: Path) -> None:
    names = [n for n in good_files() if n.startswith(format)]
    assert len(names) == len(OTHERS[format])
    for name in names:
        for file, content in good_files()[name].items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(content)
        net, adapter = pf.load(tmp_path / name, MODEL)
        as_the_file_says(tmp_path / name, net, adapter)
        with pytest.raises(AssertionError):
            as_the_file_says(tmp_path / name, net, shaken(adapter, 1))
