"""The types that users see: mypy finds the mistakes in what a user writes, and nothing else."""

import re
import subprocess
import sys

from support import ROOT


def test_a_users_program_has_the_errors_that_it_says() -> None:
    program = ROOT / "tests" / "typed" / "user.py"
    wanted = {i for i, line in enumerate(program.read_text().splitlines(), 1) if "# an error" in line}
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", ROOT / ".mypy_cache", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    found = {int(n) for n in re.findall(r"^tests/typed/user\.py:(\d+): error", done.stdout, flags=re.M)}
    assert len(wanted) == 2
    assert found == wanted, done.stdout + done.stderr
