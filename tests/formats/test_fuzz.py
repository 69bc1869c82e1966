"""Broken and hostile files: `load` raises a clean error that names the file, at once, or gives what the file says.

PEFTFN_FUZZ=10000 python -m pytest tests/formats/test_fuzz.py    runs that many mutations in place of a few hundred.
make fuzz    runs 100,000, goes on after a failure, and says how to repeat it.
"""

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from fuzz import as_the_file_says, one
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutations import MODEL, OTHERS, XLORA, good_files

import peftfn as pf
from peftfn.formats.tensor_files import unpickled
from peftfn.testing import shaken

EXAMPLES = int(os.environ.get("PEFTFN_FUZZ", "300"))


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
    names = [n for n in good_files() if n.startswith(format) and n.split(" ")[-1].removesuffix(".gguf").isdecimal()]
    assert len(names) == len(OTHERS[format])
    for name in names:
        for file, content in good_files()[name].items():
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_bytes(content)
        net, adapter = pf.load(tmp_path / name, MODEL)
        as_the_file_says(tmp_path / name, net, adapter)
        with pytest.raises(AssertionError):
            as_the_file_says(tmp_path / name, net, shaken(adapter, 1))


@pytest.mark.parametrize("broken", [b"lear\xf3ed", b"", b"PK\x03\x04" + b"\0" * 60, b"\x80\x02."], ids=repr)
def test_a_broken_pickle_is_named(broken: bytes, tmp_path: Path) -> None:
    """torch raises what it comes upon in one: a UnicodeDecodeError, an EOFError, an OSError that names no file."""
    whole, path = tmp_path / "whole.bin", tmp_path / "adapter_model.bin"
    torch.save({"learned": torch.ones(2)}, whole)
    path.write_bytes(whole.read_bytes().replace(b"learned", broken) if b"ed" in broken else broken)
    with pytest.raises(ValueError, match=r"adapter_model\.bin: not a file that has only tensors"):
        unpickled(path)


def test_an_expert_that_is_not_there_is_told_with_the_file_that_names_it(tmp_path: Path) -> None:
    for file, content in good_files()[XLORA].items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    where = tmp_path / XLORA / "adapter_config.json"
    config = json.loads(where.read_text())
    where.write_text(json.dumps(config | {"adapters": {"0": "gone", "1": "gone"}}))
    with pytest.raises(FileNotFoundError, match=r"xlora.adapter_config\.json: an expert is not there: gone"):
        pf.XLoRA.load(tmp_path / XLORA, MODEL)
