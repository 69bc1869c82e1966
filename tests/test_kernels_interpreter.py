"""The kernels' numbers, in Triton's interpreter. It must be chosen before Triton is imported, so each file of tests
runs in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install peftfn[triton]")
HERE = Path(__file__).parent


@pytest.mark.parametrize("file", sorted(p.name for p in HERE.glob("interpreted_*.py")))
def test_interpreted(file: str) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(HERE / file)]
    command += ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]  # Triton 3.6's own, of numpy
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
