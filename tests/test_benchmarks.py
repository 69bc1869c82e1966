"""The benchmarks' harness tells right ratios, and every results file becomes a table."""

import json
import sys
from pathlib import Path

import pytest

with pytest.MonkeyPatch.context() as path:
    path.syspath_prepend(Path(__file__).parents[1])
    from benchmarks import harness, routed, table, tenants
    from benchmarks.harness import BASE, OURS, Ratio, Target, compare, row


class Clock:
    """A clock that ways move on themselves: what they take is exact, and nobody waits."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds):
        """A way that takes that long; one after the other if there are several."""
        each = iter(seconds) if not isinstance(seconds, float) else None

        def way(*_):
            self.now += seconds if each is None else next(each)

        return way


def test_ratios_of_known_functions():
    clock = Clock()
    times = compare({OURS: clock.takes(1.0), "PEFT": clock.takes(4.0), BASE: clock.takes(0.5)}, clock=clock)
    assert {name: len(t) for name, t in times.items()} == {OURS: 31, "PEFT": 31, BASE: 31}
    line = row("x", times, target=Target("PEFT", 0.3, stretch=0.2), note="n", reason="never told")
    assert line["ratio_to"]["PEFT"] == {"median": 0.25, "q1": 0.25, "q3": 0.25}
    assert line["ratio_to"][BASE]["median"] == 2
    assert line["median_ms"] == {OURS: 1000, "PEFT": 4000, BASE: 500}
    assert line["target"]["met"] == "yes"
    assert line["floor"]["median"] == 0.125
    assert line["note"] == "n"
    beyond = row("x", times, target=Target("PEFT", 0.1), beyond=BASE, reason="why")
    assert beyond["ratio_to"] == {"PEFT": {k: pytest.approx(0.5 / 3.5) for k in ("median", "q1", "q3")}}
    assert beyond["target"]["met"] == "no"
    assert beyond["note"] == "why"


def test_ratios_are_paired():
    """A machine that slows down tenfold half way changes both sides of each ratio, and so none of them."""
    clock, speed = Clock(), [1.0] * 5 + [10.0] * 5
    ours, theirs = clock.takes(iter([1.0, *speed])), clock.takes(iter([2.0, *(2 * s for s in speed)]))
    times = compare({OURS: ours, "PEFT": theirs}, repeats=10, warmup=1, clock=clock)
    assert Ratio.of(times[OURS], times["PEFT"]) == Ratio(0.5, 0.5, 0.5)


def test_quartiles():
    ours = [float(i) for i in range(1, 32)]
    assert Ratio.of(ours, [2.0] * 31) == Ratio(8.0, 4.25, 11.75)
    assert Ratio.of([3.0], [2.0]) == Ratio(1.5, 1.5, 1.5)


def test_ways_take_turns_and_get_fresh_things():
    order, made = [], []

    def fresh():
        made.append(len(made))
        return made[-1]

    ways = {name: lambda thing, name=name: order.append((name, thing)) for name in "abc"}
    compare(ways, repeats=3, warmup=1, fresh=fresh)
    assert "".join(name for name, _ in order) == "abc" + "abc" + "bca" + "cab"
    assert [thing for _, thing in order] == made == list(range(12))


def test_short_ways_are_repeated_alike():
    clock, calls = Clock(), {"a": 0, "b": 0}

    def way(name, seconds):
        def run():
            clock.now += seconds
            calls[name] += 1

        return run

    times = compare({"a": way("a", 1e-4), "b": way("b", 3e-4)}, repeats=2, warmup=1, at_least=1e-3, clock=clock)
    assert calls == {"a": 1 + 2 * 10, "b": 1 + 2 * 10}
    assert Ratio.of(times["b"], times["a"]).median == pytest.approx(3)


@pytest.mark.parametrize(
    ("value", "met"), [(0.96, "no"), (0.95, "yes"), (0.91, "yes"), (0.9, "yes, stretch"), (0.1, "yes, stretch")]
)
def test_targets(value, met):
    assert Target("PEFT", 0.95, stretch=0.9).met(value) == met


def test_pinned_process_is_not_started_again(monkeypatch):
    def execve(*args):
        started.append(args)

    started = []
    monkeypatch.setattr(harness.os, "execve", execve)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    harness.pin(2)
    ((program, argv, env),) = started
    assert program == sys.executable
    assert argv == [sys.executable, *sys.orig_argv[1:]]
    assert env["OMP_NUM_THREADS"] == "2"
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    harness.pin(2)
    assert len(started) == 1


def test_results_round_trip(tmp_path):
    rows = [
        row(
            "plain", {OURS: [1.0, 2.0], "PEFT": [4.0, 4.0], BASE: [1.0, 1.0]}, target=Target("PEFT", 0.2), reason="why"
        ),
        row("other", {OURS: [0.01, 0.01], "64 calls": [1.0, 1.0]}),
    ]
    path = harness.write("llama", rows, harness.Options(2, 1), 3.4, tmp_path)
    record = json.loads(path.read_text())
    assert record["rows"] == rows
    text = table.write(tmp_path, tmp_path / "docs" / "benchmarks.md").read_text()
    assert "## A whole model" in text
    assert "| plain [1] | 0.38 (0.31–0.44) | 1.50 (1.25–1.75) |  | ≤ 0.2 of PEFT | 0.25 | **no** |" in text
    assert "| other |  |  | 0.010 (0.010–0.010) |  |  |  |" in text
    assert "\n[1] why\n" in text


RECORDS = sorted(harness.RESULTS.glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_every_results_file_is_rendered(path):
    record = json.loads(path.read_text())
    text = table.render([record])
    assert record["name"] == path.stem
    assert max(line["repeats"] for line in record["rows"]) >= 31, "the results of a --quick run"
    for line in record["rows"]:
        assert line["case"] in text
        assert line["repeats"] >= 5  # what takes seconds is not run 31 times; the page says so
        for ratio in line["ratio_to"].values():
            assert table.cell(ratio) in text


def test_the_page_is_made_from_the_results():
    """docs/benchmarks.md is what `python -m benchmarks` writes; after changing benchmarks/table.py, run that module."""
    assert table.DOCS.read_text() == table.render(table.read())


def test_the_page_of_many_adapters_has_the_figures_of_tenants():
    """After changing benchmarks/tenants.py, run that module."""
    record = next(r for r in table.read() if r["name"] == "tenants")
    assert f"<!-- tenants -->\n\n{tenants.page(record)}\n\n<!-- /tenants -->" in tenants.PAGE.read_text()


def test_the_page_of_many_adapters_has_the_figures_of_routed_modules():
    """After changing benchmarks/routed.py, run that module."""
    record = next(r for r in table.read() if r["name"] == "routed")
    assert f"<!-- routed -->\n\n{routed.page(record)}\n\n<!-- /routed -->" in routed.PAGE.read_text()


def test_where_batching_tenants_stops_to_pay_is_read_off_the_figures():
    def at(q3):
        return {"median": q3 - 0.1, "q1": q3 - 0.2, "q3": q3}

    found = {("serving", k, t): at(v) for (k, t), v in {(2, 1): 0.7, (8, 1): 0.3, (2, 8): 0.9, (8, 8): 1.1}.items()}
    assert "up to 1 tokens" in tenants._verdict("serving", found)
    assert "From 8 on" in tenants._verdict("serving", found)
    assert "(0.20 at 1)" in tenants._verdict("serving", found)
    assert "every length" in tenants._verdict("serving", {k: r for k, r in found.items() if k[2] == 1})
    assert "does not pay" in tenants._verdict("serving", {k: at(1.2) for k in found})
