"""Which method for what, drawn from records by rules that are told beside the answers."""

import statistics
import textwrap
from collections.abc import Callable, Sequence

from peftfn.compare.run import Json, best, forgotten, mean_test, near

CLOSE = 0.05
"""Of accuracy: what is not this much below the best is good enough to ask for something else."""

Rule = Callable[[Json], tuple[float, ...]]
"""record ↦ what to minimise"""


def signed(x: float) -> str:
    """With its sign, unless it rounds to zero."""
    return f"{x:+.2f}" if abs(x) >= 0.005 else "0.00"


RULES: dict[str, tuple[Rule, Callable[[Json], str]]] = {
    "fewest trained numbers": (lambda r: (r["trained"],), lambda r: f"{r['trained']:,}"),
    "smallest file": (lambda r: (r["bytes"],), lambda r: f"{r['bytes'] / 1024:.0f} KiB"),
    "least memory": (lambda r: (r["peak_bytes_alone"],), lambda r: f"{r['peak_bytes_alone'] / 2**20:.1f} MiB"),
    "least forgotten": (lambda r: (forgotten(r),), lambda r: signed(forgotten(r))),
    "most rates good": (lambda r: (-near(r), -mean_test(r)), lambda r: f"{near(r)} of {len(r['settings']['rates'])}"),
}


def chosen(records: Sequence[Json]) -> str:
    """Markdown: a table of questions × tasks."""
    tasks = {task: [r for r in records if r["task"] == task and best(r)] for task in _tasks(records)}
    tasks = {task: rs for task, rs in tasks.items() if len(rs) > 1}
    if not tasks:
        return ""
    rows = {"most accurate": [_equals(rs) for rs in tasks.values()]}
    for name, (rule, shown) in RULES.items():
        rows[name] = [_first(good(rs), rule, shown) for rs in tasks.values()]
    rows["none is better in accuracy and trained numbers"] = [
        ", ".join(r["method"] for r in front(rs)) for rs in tasks.values()
    ]
    words = (
        "The rules: most accurate are the method with the highest mean and those whose mean is within its and their "
        f"own spread of it, added up. All other rows but the last choose among the methods within {100 * CLOSE:.0f} "
        "points of the highest mean. Seconds choose nothing, because the machine had other work."
    )
    lines = [
        "## Which method for what",
        "",
        "| | " + " | ".join(f"{task} ({len(rs)} methods)" for task, rs in tasks.items()) + " |",
        "|" + " --- |" * (len(tasks) + 1),
        *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()),
        "",
        textwrap.fill(words, 120, break_on_hyphens=False),
        "",
    ]
    return "\n".join(lines)


def good(records: Sequence[Json]) -> list[Json]:
    """Those close to the most accurate."""
    most = max(map(mean_test, records))
    return [r for r in records if mean_test(r) >= most - CLOSE]


def front(records: Sequence[Json]) -> list[Json]:
    """Those that no other beats in both accuracy and trained numbers, from the fewest numbers on."""
    out: list[Json] = []
    for r in sorted(records, key=lambda r: (r["trained"], -mean_test(r))):
        if not out or mean_test(r) > mean_test(out[-1]):
            out.append(r)
    return out


def spread(record: Json) -> float:
    """The standard deviation of the test accuracy over the seeds at the best rate."""
    found = best(record)
    tests = [] if found is None else [t["test"] for t in found[1]]
    return statistics.stdev(tests) if len(tests) > 1 else 0.0


def _equals(records: Sequence[Json]) -> str:
    """The most accurate, and those that its spread and theirs do not tell from it."""
    by = sorted(records, key=lambda r: -mean_test(r))
    top = by[0]
    return ", ".join(r["method"] for r in by if mean_test(r) + spread(r) + spread(top) >= mean_test(top))


def _first(records: Sequence[Json], rule: Rule, shown: Callable[[Json], str]) -> str:
    r = min(records, key=rule)
    return f"{r['method']} ({shown(r)})"


def _tasks(records: Sequence[Json]) -> list[str]:
    return list(dict.fromkeys(r["task"] for r in records))
