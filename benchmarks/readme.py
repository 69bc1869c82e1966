"""The figures in README.md, from benchmarks/results/*.json: its table, and those in its sentences."""

import re
from pathlib import Path

from benchmarks.harness import RESULTS
from benchmarks.table import read

README = Path(__file__).parents[1] / "README.md"

Measured = dict[str, dict[str, float]]
"""case → other way → median of ours / the other's"""

COLUMNS = ("PEFT", "base")
TINY = "LoRA r16, forward, 224 linear layers, d 64, one row"
VMAP = "64 LoRA r16 adapters, forward, 2-layer Llama, d 128, 1×16 tokens"
ROW = r"^\| (.+) \| [\d.]+ \| [\d.]* ?\|$"


def filled(text: str, folder: Path = RESULTS) -> str:
    """README's text with the figures as they are measured.

    Raises:
        ValueError: a sentence that is to have a figure is not there, or a case of the table is not measured.
    """
    of = {
        record["name"]: {r["case"]: {way: q["median"] for way, q in r["ratio_to"].items()} for r in record["rows"]}
        for record in read(folder)
    }
    table: Measured = of["adapt"] | of["llama"] | of["mixed"]
    steps = [r["PEFT"] for case, r in of["methods"].items() if case.endswith(", training step") and "PEFT" in r]
    sentences = {
        r"64 adapters under one `vmap` take (\S+) of 64 calls": of["vmap"][VMAP]["64 calls"],
        r"which matters if layers are tiny and rows few \((\S+) in the table\)": table[TINY]["base"],
        r"Of the (\d+) methods that PEFT has too, \d+ take longer in a training step": len(steps),
        r"Of the \d+ methods that PEFT has too, (\d+) take longer in a training step": sum(s > 1 for s in steps),
    }
    text, rows = re.subn(ROW, lambda m: _row(m[1], table), text, flags=re.M)
    if not rows:
        raise ValueError("README.md has no table of figures")
    for sentence, figure in sentences.items():
        found = re.search(sentence.replace(" ", r"\s+"), text)
        if found is None:
            raise ValueError(f"README.md does not say {sentence!r}")
        shown = f"{figure:.2f}" if isinstance(figure, float) else str(figure)
        text = text[: found.start(1)] + shown + text[found.end(1) :]
    return text


def _row(case: str, table: Measured) -> str:
    if case not in table:
        raise ValueError(f"README.md's table has {case!r}, which no benchmark measures")
    cells = [f" {table[case][way]:.2f} " if way in table[case] else " " for way in COLUMNS]
    return f"| {case} |{'|'.join(cells)}|"


def write() -> Path:
    README.write_text(filled(README.read_text()))
    return README
