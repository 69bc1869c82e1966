"""Broken and hostile files: `load` raises a clean error that names the file, at once, or gives what the file says.

PEFTFN_FUZZ=10000 python -m pytest tests/formats/test_fuzz.py    runs that many mutations in place of a few hundred.
"""

import os
import random
import resource
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models import by_name, tokens
from mutations import MODEL, OTHERS, good_files, mutated
from safetensors.torch import load_file
from workers import small_readers

import peftfn as pf
from peftfn.formats.kohya import FILE as KOHYA
from peftfn.testing import shaken

EXAMPLES = int(os.environ.get("PEFTFN_FUZZ", "300"))
SECONDS = 5.0
"""A load of the tiny model may take this long, on a busy machine; a good one takes some milliseconds."""


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
    elif (path / "adapter_config.json").exists() and not (path / "adapters.safetensors").exists():
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
        if file.exists():
            want = small_readers.kohya(file, MODEL)
        elif (path / "adapters.safetensors").exists():
            want = small_readers.mlx(path, MODEL)
        else:
            want = small_readers.swift(path / "default", MODEL)
        got = net.merge(adapter)
        for name, value in (want or {}).items():
            torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)
        changed = {n for n, p in MODEL.named_parameters() if n in net.plan}
        assert want is None or changed == want.keys()


@cache
def served() -> pf.Adapted:
    """The net that the bank's file was saved with."""
    with tempfile.TemporaryDirectory() as root:
        for file, content in good_files()["native, served"].items():
            (Path(root) / file).parent.mkdir(parents=True, exist_ok=True)
            (Path(root) / file).write_bytes(content)
        return pf.load(Path(root) / "native, served", MODEL).net


def banked(path: Path, loaded: Any) -> None:
    """A bank reads the file as `load` does, or refuses it; what `load` refuses it refuses too."""
    bank = pf.Bank([served()], capacity=1)
    try:
        with limited(SECONDS):
            bank.put("a", served(), path)
            got = bank.apply(["a", "a"], tokens(2)).logits
    except (ValueError, FileNotFoundError) as e:
        assert str(path) in str(e), f"an error that names no file: {e!r}"
        return
    assert loaded is not None, "the bank reads what load refuses"
    want = outputs(*loaded)
    scale = want.nan_to_num(0, 0, 0).abs().max().clamp(min=1)
    assert torch.allclose(got, want, rtol=1e-4, atol=float(1e-4 * scale), equal_nan=True), "other outputs than load's"


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
    if name == "native, served":
        banked(path, loaded)
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
