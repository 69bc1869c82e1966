"""What a reproduction is, and what several share."""

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

from scipy.stats import rankdata

from peftfn.compare.environment import environment
from peftfn.compare.tasks import TASKS, Ready
from peftfn.formats.files import write

Json = dict[str, Any]
RECORDS = Path(__file__).parent / "records"
RUNNING = Path(__file__).parent / "running"
"""What an interrupted run has done so far."""
DOCS = Path(__file__).parents[2] / "docs"
YES, PARTLY, NO = "reproduced", "partly reproduced", "not reproduced"


@dataclass(frozen=True)
class Claim:
    """A claim, how it is tried, and what its figures say.

    Args:
        title: of the section.
        paper: whose claim it is, in Markdown.
        says: the claim.
        ours: how it is tried here, and what differs.
        rules: whose the verdicts' thresholds are, and whether they stood before the figures.
        run: (whether in seconds, to see that it runs; a folder to go on from) ↦ figures.
        found: figures ↦ (`YES`, `PARTLY` or `NO` of each part of the claim, by name; Markdown).
        draw: (figures, path) of a picture, if there is one.
    """

    title: str
    paper: str
    says: str
    ours: str
    rules: str
    run: Callable[[bool, Path], Json]
    found: Callable[[Json], tuple[dict[str, str], str]]
    draw: Callable[[Json, Path], None] | None = None

    def record(self, name: str, quick: bool = False, folder: Path = RUNNING) -> Json:
        """Run it."""
        start = perf_counter()
        figures = self.run(quick, folder / name)
        seconds = round(perf_counter() - start)
        return {"name": name, "quick": quick, "seconds": seconds, "environment": environment(), "figures": figures}


def save(record: Json, folder: Path = RECORDS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / f"{record['name']}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def read(name: str, folder: Path = RECORDS) -> Json | None:
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


@cache
def task(name: str) -> Ready:
    """A task of `peftfn compare`. Its base trains once a process; nothing here changes it."""
    return TASKS[name]()


def monotone(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation; 0 where all values of one are equal."""
    a, b = (rankdata(v) - (len(v) + 1) / 2 for v in (x, y))
    size = float((a @ a) * (b @ b)) ** 0.5
    return round(float(a @ b) / size, 3) if size else 0.0


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False, break_long_words=False) + "\n"
