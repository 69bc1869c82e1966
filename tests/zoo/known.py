"""known.json: for each kind what fails today, with the reason, and which checks do not apply to it.

Outcomes are held against it both ways, so that the lists of failures can only shrink, and no check can fall silent.
`python -m zoo --write` (make zoo WRITE=1) writes it anew.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .outcome import FAILS, NOT_APPLICABLE, Outcome

PATH = Path(__file__).with_name("known.json")
Known = dict[str, dict[str, Any]]


def read(path: Path = PATH) -> Known:
    return json.loads(path.read_text())


def complaints(kind: str, outcomes: Mapping[str, Outcome], known: Known) -> list[str]:
    """What is not as the file says, one line each."""
    fails = known.get(kind, {}).get(FAILS, {})
    silent = known.get(kind, {}).get(NOT_APPLICABLE, [])
    out = [
        f"{kind}, {check}: there is no such check: remove it from the list"
        for check in [*fails, *silent]
        if check not in outcomes
    ]
    for check, o in outcomes.items():
        at = f"{kind}, {check}"
        if o.status == FAILS and check not in fails:
            out.append(f"{at} fails: {o.reason} {o.where}".rstrip())
        if o.status != FAILS and check in fails:
            out.append(f"{at} {o.status}, and is listed as failing: remove it from the list")
        if o.status == NOT_APPLICABLE and check not in silent:
            out.append(f"{at} does not apply: {o.reason}")
        if o.status != NOT_APPLICABLE and check in silent:
            out.append(f"{at} {o.status}, and is listed as not applicable: remove it from the list")
    return out


def updated(known: Known, kind: str, outcomes: Mapping[str, Outcome]) -> Known:
    """`known` with what was seen of one kind; the reasons of failures that it lists already stay."""
    old = known.get(kind, {}).get(FAILS, {})
    fails = {check: old.get(check) or o.reason for check, o in outcomes.items() if o.status == FAILS}
    silent = [check for check, o in outcomes.items() if o.status == NOT_APPLICABLE]
    return known | {kind: {FAILS: fails, NOT_APPLICABLE: silent}}


def write(known: Known, path: Path = PATH) -> None:
    """One kind a line, in the order of their names."""
    lines = [f" {json.dumps(kind)}: {json.dumps(known[kind], ensure_ascii=False)}" for kind in sorted(known)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
