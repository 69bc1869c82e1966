"""Every example and recipe of the docs runs, in an empty folder, and what it asserts holds."""

import runpy
from pathlib import Path

import pytest
import torch
from support import ROOT

FOLDERS = [ROOT / "docs" / name for name in ("examples", "recipes")]
EXAMPLES = [p for folder in FOLDERS for p in sorted(folder.glob("*.py")) if p.stem not in ("base", "digits")]
LONGEST = 60  # lines


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
@pytest.mark.filterwarnings("default")  # they call other libraries as users do
def test_example(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(str(folder))
    from base import model  # trained once a process, and shared by all: none may change it

    before = {name: t.clone() for name, t in model.state_dict().items()}
    runpy.run_path(str(path), run_name="__main__")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert len(path.read_text().splitlines()) <= LONGEST


def test_each_is_on_its_page() -> None:
    assert len(EXAMPLES) > 20
    for path in EXAMPLES:
        page = path.parent.with_suffix(".md").read_text()
        assert f"]({path.parent.name}/{path.name})" in page
