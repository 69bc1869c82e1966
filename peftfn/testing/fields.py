"""The tables of docs/methods.md that are about hyper-parameters: every field, from dataclasses and docstrings, and
learning rates that papers and PEFT advise."""

import dataclasses
import inspect
import re
from collections.abc import Sequence

import peftfn as pf
from peftfn.core.method import Method

PEFT = "https://huggingface.co/docs/peft/package_reference"
ARXIV = "https://arxiv.org/abs"
RATES: dict[str, tuple[str, str]] = {
    "LoRA": ("2e-4", f"[paper]({ARXIV}/2106.09685), for GPT-2 and GPT-3"),
    "C3A": ("1e-1, and little weight decay", f"[PEFT]({PEFT}/c3a)"),
    "IA3": ("3e-3, with Adafactor", f"[paper]({ARXIV}/2205.05638), T-Few's"),
    "RoAd": ("1e-3", f"[PEFT]({PEFT}/road)"),
    "VBLoRA": ("1e-2 for logits, 1e-3 for the bank: `pf.optim.vb_lora`", f"[PEFT]({PEFT}/vblora)"),
    "PromptTuning": ("0.3, with Adafactor", f"[paper]({ARXIV}/2104.08691)"),
}
"""Method → (rate, who advises it)."""


def described(cls: type[Method]) -> dict[str, str]:
    """field → its text among the `Args:` of a class's docstring."""
    block = re.search(r"^Args:\n((?:    .*\n?|\n)+)", inspect.getdoc(cls) or "", flags=re.M)
    found: dict[str, str] = {}
    names: list[str] = []
    for line in block[1].splitlines() if block else ():
        if head := re.match(r"    (\w[\w, ]*): (.*)", line):
            names = [n.strip() for n in head[1].split(",")]
            found |= dict.fromkeys(names, head[2])
        elif line.strip():
            found |= {n: f"{found[n]} {line.strip()}" for n in names}
    return found


def field_table(classes: Sequence[type[Method]]) -> list[str]:
    """One row a field. ValueError for a field without a text."""
    rows = ["| method | field | default | what it is |", "|---|---|---|---|"]
    for cls in classes:
        texts = described(cls)
        for f in dataclasses.fields(cls):
            if f.name not in texts:
                raise ValueError(f"{cls.__name__}: its docstring has no line for the field {f.name} among its Args")
            needed = f.default is dataclasses.MISSING
            default = "required" if needed else f"`{f.default!r}`"
            text = texts[f.name].replace("|", "\\|")
            rows += [f"| `{cls.__name__}` | `{f.name}` | {default} | {text} |"]
    return rows


def rate_table() -> list[str]:
    """The learning rates as a table."""
    assert all(hasattr(pf, name) for name in RATES)
    rows = ["| method | learning rate | from |", "|---|---|---|"]
    return rows + [f"| `{name}` | {rate} | {source} |" for name, (rate, source) in RATES.items()]
