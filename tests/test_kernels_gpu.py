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


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True)


@needs_triton
def test_a_dry_run_does_all_of_it(tmp_path: Path) -> None:
    out, page = tmp_path / "r.json", tmp_path / "kernels.md"
    page.write_text(PAGE)
    only = [word for name in gpu.SECTIONS for word in ("--only", name)]
    done = run("--out", str(out), "--docs", str(page), *only)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["done"] == list(gpu.SECTIONS)
    assert len(record["gates"]) >= 20
    assert all(g["ok"] for g in record["gates"])
    assert not record["raised"] and not record["left_out"]
    sections = {row["section"] for row in record["rows"]}
    assert len(sections) == 9
    for row in record["rows"]:
        assert not [way for way in row["failed"] if "lycoris" not in way], row["failed"]
        for way, wrong in row["error"].items():
            assert way == "lycoris-lora" or wrong < 5e-3, (row["case"], way)
        for times in row["us"].values():
            assert "peftfn" in times and all(t["median"] > 0 for t in times.values())
    assert {t["kernel"].split(",")[0] for t in record["tune"]} == {"thin", "wide", "norm", "shrink", "sweep", "gemm"}
    for tuned in record["tune"]:
        assert all(tuned["us"].values()), tuned
        wrong = [e for way, e in tuned["error"].items() if not way.endswith(("alone", "no dropout"))]  # other jobs
        assert max(wrong) < 5e-3, tuned
    text = page.read_text()
    assert text.startswith("# Kernels\n\nwords") and text.endswith("more words\n")
    assert "old figures" not in text
    assert all(f"### {section}" in text for section in sections)


@needs_triton
def test_sections_run_in_processes_of_their_own(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    some = ("check-norms", "tune-norm", "norms")
    done = run("--out", str(out), *[word for name in gpu.SECTIONS if name not in some for word in ("--skip", name)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["done"] == list(some)
    assert record["gates"] and record["rows"] and record["tune"]
    assert all(row["us"] for row in record["rows"])  # what was run to compile alone is not in it


def test_a_process_that_dies_ends_one_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA error ends it: what it had written stays, and the sections after it run in a new process."""
    program = (
        "import json, os, sys; names = sys.argv[2::2]; out = sys.argv[1]\n"
        "for n in names:\n"
        "    record = json.load(open(out)) if os.path.exists(out) else json.loads(sys.stdin.read())\n"
        "    record['gates'].append({'gate': n, 'value': 0, 'limit': 1, 'ok': True})\n"
        "    record['done'] += [] if n == 'mixed' else [n]\n"
        "    json.dump(record, open(out, 'w'))\n"
        "    if n == 'mixed': os.abort()\n"
    )

    def command(self: gpu.Processes, *names: str, warm: bool = False) -> list[str]:
        path = self.path(names[0], warm)
        path.write_text(json.dumps(gpu.empty({"device": "none"})))
        return [sys.executable, "-c", program, str(path), *[word for n in names for word in (n, "")]]

    monkeypatch.setattr(gpu.Processes, "command", command)
    args = gpu.parse(["--dry", "--out", str(tmp_path / "r.json")])
    record = gpu.each_alone(args, ["check-norms", "norms", "mixed", "curve"])
    assert record["done"] == ["check-norms", "norms", "curve"]
    assert [g["gate"] for g in record["gates"]] == ["check-norms", "norms", "mixed", "curve"]
    assert [r["what"] for r in record["raised"]] == ["mixed"]
    assert json.loads((tmp_path / "r.json").read_text())["done"] == record["done"]


def test_gates_fail_on_what_is_not_a_number() -> None:
    one = torch.ones(3)
    assert gpu.error([one], [one.double()]) == 0
    assert gpu.error([one * float("nan")], [one.double()]) == float("inf")
    assert gpu.error([one, 1.5 * one], [one.double(), one.double()]) == pytest.approx(0.5)


def test_what_fails_is_told_and_ends_nothing_else(tmp_path: Path) -> None:
    run = gpu.Run(gpu.parse(["--dry", "--out", str(tmp_path / "r.json")]))
    run.gate("close", 0.1, 1)
    run.gate("far", float("nan"), 1)
    with run.trying("a section"):
        raise RuntimeError("broken\nin two lines")

    def absent() -> gpu.Call:
        raise ModuleNotFoundError("No module named 'unsloth'", name="unsloth")

    def fine() -> gpu.Call:
        return lambda: torch.ones(3)

    def broken() -> gpu.Call:
        return lambda: torch.ones(3) @ torch.ones(4)

    ways = {"base": fine, "another's": absent, "peftfn": fine, "peftfn, other": broken}
    run.row("Section", "case", ways, want=[torch.ones(3).double()])
    record = json.loads((tmp_path / "r.json").read_text())
    assert [g["ok"] for g in record["gates"]] == [True, False]
    assert record["rows"][0]["failed"]["another's"] == "unsloth is not installed"
    assert record["rows"][0]["us"]["eager, L2 hot"].keys() == {"base", "peftfn"}
    told = gpu.complaints(record)
    assert [line.split(":")[0] for line in told] == ["Gate failed", "Raised", "Failed"]
    assert "RuntimeError: broken in two lines" in told[1]
    assert all(line in gpu.tables(record | {"seconds": 1}) for line in told)


def test_short_calls_are_many_in_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph's own launch takes some µs: as long as the shortest calls. With L2 flushed, each call needs its own."""
    run = gpu.Run(gpu.parse(["--dry", "--out", str(tmp_path / "r.json")]))
    graphs: list[int] = []
    monkeypatch.setattr(run.clock, "dry", False)
    monkeypatch.setattr(run.clock, "graph", lambda call, copies=1: (graphs.append(copies), call)[1])
    for us, copies in ((2.0, 50), (30.0, 10), (1000.0, 1)):
        monkeypatch.setattr(run.clock, "sample", lambda call, cold, us=us: us)
        assert run.timed(int, "graph", False)[1] == copies
        assert run.timed(int, "graph", True)[1] == run.timed(int, "eager", False)[1] == 1
    assert graphs == [1, 50, 1, 1, 10, 1, 1, 1]


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
@pytest.mark.parametrize("name", [name for name in gpu.SECTIONS if name.startswith("check")])
def test_gates(name: str, tmp_path: Path) -> None:
    run = gpu.Run(gpu.parse(["--out", str(tmp_path / "r.json"), "--only", name]))
    gpu.sections(run, [name])
    assert gpu.complaints(run.record) == []
