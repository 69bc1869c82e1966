"""benchmarks/gpu.py: its code runs without a GPU, and its gates hold on one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

needs_triton = pytest.mark.skipif(not gpu.has_triton(), reason="needs Triton: pip install peftfn[triton]")
PAGE = f"# Kernels\n\nwords\n\n{gpu.MARKS[0]}\nold figures\n{gpu.MARKS[1]}\n\nmore words\n"


@needs_triton
def test_a_dry_run_does_all_of_it(tmp_path: Path) -> None:
    out, page = tmp_path / "r.json", tmp_path / "kernels.md"
    page.write_text(PAGE)
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(out), "--docs", str(page)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert len(record["gates"]) >= 10
    assert all(g["ok"] for g in record["gates"])
    sections = {row["section"] for row in record["rows"]}
    assert len(sections) == 5
    assert not record["left_out"]
    for row in record["rows"]:
        assert not [way for way in row["failed"] if "lycoris" not in way], row["failed"]
        for way, wrong in row["error"].items():
            assert way == "lycoris-lora" or wrong < 5e-3, (row["case"], way)
        for times in row["us"].values():
            assert "peftfn" in times and all(t["median"] > 0 for t in times.values())
    text = page.read_text()
    assert text.startswith("# Kernels\n\nwords") and text.endswith("more words\n")
    assert "old figures" not in text
    assert all(f"### {section}" in text for section in sections)


def test_gates_fail_on_what_is_not_a_number() -> None:
    one = torch.ones(3)
    assert gpu.error([one], [one.double()]) == 0
    assert gpu.error([one * float("nan")], [one.double()]) == float("inf")
    assert gpu.error([one, 1.5 * one], [one.double(), one.double()]) == pytest.approx(0.5)


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry" in capsys.readouterr().err


def test_the_page_has_the_marks_and_only_measured_figures() -> None:
    """Figures stand between the marks, and come from a results file."""
    page = gpu.DOCS.read_text()
    begin, end = (page.index(mark) for mark in gpu.MARKS)
    between = page[begin + len(gpu.MARKS[0]) : end].strip()
    results = sorted(gpu.RESULTS.glob("*.json"))
    if results:
        assert between == gpu.tables(json.loads(results[-1].read_text())).strip()
    else:
        assert between == "None yet: no GPU has run `python -m benchmarks.gpu`."


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gates(tmp_path: Path) -> None:
    run = gpu.Run(gpu.parse(["--out", str(tmp_path / "r.json")]))
    gpu.gates(run)
    assert [g for g in run.record["gates"] if not g["ok"]] == []
