"""Every example under docs/examples runs, in an empty folder, and what it asserts holds."""

import runpy
from pathlib import Path

import pytest
import torch
from support import ROOT

FOLDER = ROOT / "docs" / "examples"
EXAMPLES = [p for p in sorted(FOLDER.glob("*.py")) if p.stem != "base"]
LONGEST = 60  # lines


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("default")  # they call other libraries as users do
def test_example(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    from base import model  # trained once a process, and shared by all: none may change it

    before = {name: t.clone() for name, t in model.state_dict().items()}
    runpy.run_path(str(path), run_name="__main__")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert len(path.read_text().splitlines()) <= LONGEST


def test_each_is_on_the_page() -> None:
    page = (ROOT / "docs" / "examples.md").read_text()
    assert [p.name for p in EXAMPLES if f"](examples/{p.name})" not in page] == []
