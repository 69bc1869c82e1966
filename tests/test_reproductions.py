"""The reproductions run, their page is made from their records, and their verdicts follow from the figures."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(Path(__file__).parents[1])
    from benchmarks import figures
    from benchmarks.reproductions import learning_rates, lora_plus
    from benchmarks.reproductions.claim import DOCS, NO, PARTLY, RECORDS, YES, Claim, Json, monotone, read, save
    from benchmarks.reproductions.claims import CLAIMS
    from benchmarks.reproductions.page import anchor, page, picture, section

import peftfn as pf
from peftfn.compare import run as compare_run


@pytest.mark.parametrize("name", CLAIMS)
@pytest.mark.filterwarnings("default")  # PEFT's, in one of them
def test_each_runs_and_says_what_it_found(name: str, tmp_path: Path) -> None:
    claim = CLAIMS[name]
    record = json.loads(json.dumps(claim.record(name, quick=True, folder=tmp_path)))  # as a file gives it back
    verdicts, text = claim.found(record["figures"])
    assert set(verdicts.values()) <= {YES, PARTLY, NO}
    shown = section(name, claim, record)
    assert text.strip() in shown
    assert "nan" not in shown
    assert all(f"* {what}: **{verdict}**." in shown for what, verdict in verdicts.items())
    if claim.draw is not None:
        claim.draw(record["figures"], tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 1000


def test_the_docs_page_is_made_from_the_records() -> None:
    """After changing a claim's words: python -m benchmarks.reproductions --page"""
    records = {name: record for name in CLAIMS if (record := read(name))}
    assert sorted(path.stem for path in RECORDS.glob("*.json")) == sorted(records)
    assert not any(record["quick"] for record in records.values())
    text = page(CLAIMS, records)
    assert (DOCS / "reproductions.md").read_text() == text
    for name in records:
        assert text.count(f"(#{anchor(CLAIMS[name].title)})") == 1
        assert all(f"| {what} | {v} |" in text for what, v in CLAIMS[name].found(records[name]["figures"])[0].items())
        assert CLAIMS[name].draw is None or (DOCS / picture(name)).is_file()


def test_learning_rates_are_those_of_the_comparisons_records(tmp_path: Path) -> None:
    """After running peftfn compare: python -m benchmarks.reproductions learning_rates"""
    assert read("learning_rates")["figures"] == json.loads(json.dumps(learning_rates.run(False, tmp_path)))


def variant(best: float, test: float, sharpness: float, at: dict[str, float]) -> dict[str, Any]:
    return {"trained": 1, "sharpness": sharpness, "best": best, "test": test, "spread": 0.0, "rates": at}


def test_the_verdicts_follow_from_the_figures() -> None:
    lora = variant(0.1, 0.80, 1.0, {"0.1": 0.80, "0.01": 0.3})
    near = variant(0.01, 0.81, 9.0, {"0.1": 0.60, "0.01": 0.81})
    far = variant(0.1, 0.90, 0.5, {"0.1": 0.90, "0.01": 0.3})
    assert list(learning_rates.found({"t": {"LoRA": lora, "PiSSA": near}})[0].values()) == [YES, YES, YES, YES]
    assert list(learning_rates.found({"t": {"LoRA": lora, "PiSSA": far}})[0].values()) == [NO, NO, NO, NO]


def test_ranks_and_cells() -> None:
    assert monotone([1, 2, 3, 4], [10, 20, 25, 100]) == 1
    assert monotone([1, 2, 3], [3, 2, 1]) == -1
    assert monotone([1, 1, 2], [1, 1, 1]) == 0  # nothing to say, and no warning
    assert monotone([1, 1, 2, 3], [2, 1, 3, 4]) == pytest.approx(0.949)
    loss = [[None, 3.0], [1.0, 2.0]]
    assert lora_plus.least(loss, [-2, -1]) == (1.0, -1, -2)
    assert lora_plus.least(loss, [-2, -1], diagonal=True) == (2.0, -1, -1)


def test_either_start_of_a_lora_is_the_identity_and_one_factor_is_random() -> None:
    model, x, _ = lora_plus.teacher(32)
    net = pf.adapt(model, {"2.weight": pf.LoRA(rank=lora_plus.RANK)})
    for random in lora_plus.STARTS.values():
        a = lora_plus.start(net, {"seed": 3}, random)
        (leaf,) = a.values()
        assert torch.equal(net.apply(a, x), model(x))
        assert {k for k, t in leaf.items() if t.any()} == {random}
        assert float(leaf[random].std()) == pytest.approx(leaf[random].shape[-1] ** -0.5, rel=0.2)


def test_all_figures_are_remade_together_and_go_on_after_an_interrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, old, build = list[str](), tmp_path / "old", tmp_path / "build"

    def run(name: str, fails: list[str], quick: bool, folder: Path) -> Json:
        ran.append(name)
        if name in fails:
            fails.remove(name)
            raise KeyboardInterrupt
        return {"by": name}

    fails = ["two"]
    monkeypatch.setattr(compare_run, "pairs", lambda: [("a method", "digits")])
    monkeypatch.setattr(figures, "compare_pair", lambda method, task, _: ran.append(f"{task}, {method}"))
    monkeypatch.setattr(figures, "write_page", lambda: ran.append("the comparison's page"))
    monkeypatch.setattr(figures, "READS_RECORDS", ("two",))
    claims = {n: Claim(n, "", "", "", "", partial(run, n, fails), lambda _: ({}, "")) for n in ("one", "two")}
    monkeypatch.setattr(figures, "CLAIMS", claims)
    monkeypatch.setattr(figures.claim, "RECORDS", old)
    monkeypatch.setattr(figures.reproductions, "write_page", lambda: ran.append("page"))
    save({"name": "gone"}, old)
    with pytest.raises(KeyboardInterrupt):
        figures.everything(build, 1)
    assert [p.stem for p in old.glob("*.json")] == ["gone"]
    figures.everything(build, 1)
    pair = ["digits, a method", "the comparison's page"]
    assert ran == ["one", *pair, "two", *pair, "two", "page"]
    assert sorted(p.stem for p in old.glob("*.json")) == ["one", "two"]
    assert not (build / "reproductions").exists()


def test_figures_are_made_in_several_processes(tmp_path: Path) -> None:
    figures.side_by_side([partial((tmp_path / name).touch) for name in "abc"], 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
    with pytest.raises(FileExistsError):
        figures.side_by_side([partial((tmp_path / "a").touch, exist_ok=False)], 2)
