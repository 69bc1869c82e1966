"""Regular expressions from a file, matched in bounded time.

Python's `re` backtracks, and a pattern such as `(a+)+b` can keep it busy for hours. Here the pattern, parsed by `re`
itself, is followed from all positions at once: which positions can a part of it end at, if it starts at these? Every
step is counted, and a pattern that needs too many is refused.
"""

import re
from functools import lru_cache
from re import _constants as C  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

STEPS = 200_000
"""Of one match; a pattern of PEFT's on a model's names takes some hundreds."""


class Pattern:
    """A regular expression whose `matches(text)` says whether it matches all of the text from `start` on.

    Groups, alternatives, repetitions, sets, anchors and look-ahead mean what they mean in `re`; look-behind, references
    and flags are a ValueError.
    """

    def __init__(self, source: str):
        self.source = source
        try:
            tree = _parser.parse(source)
        except (re.error, RecursionError, OverflowError) as e:
            raise ValueError(f"{source[:80]!r} is not a regular expression: {e}") from e
        if tree.state.flags & ~re.UNICODE:
            raise ValueError(f"{source[:80]!r} has flags; write both cases of a letter instead")
        self.tree = tree

    def matches(self, text: str, start: int = 0) -> bool:
        try:
            return len(text) in _Run(self.source, text).ends(self.tree, {start})
        except RecursionError as e:
            raise ValueError(f"{self.source[:80]!r} is nested too deeply") from e


class _Run:
    """One match."""

    def __init__(self, source: str, text: str):
        self.source, self.text, self.steps = source, text, 0

    def count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > STEPS:
            raise ValueError(f"{self.source[:80]!r} takes too long to match; use names, or a simpler pattern")

    def ends(self, tree: Any, at: set[int]) -> set[int]:
        """Positions at which a match of `tree` can end that starts at one of `at`."""
        for op, value in tree:
            self.count(len(at) + 1)
            at = self.after(op, value, at)
        return at

    def after(self, op: Any, value: Any, at: set[int]) -> set[int]:
        text = self.text
        match op:
            case C.LITERAL | C.NOT_LITERAL | C.ANY | C.IN:
                return {i + 1 for i in at if i < len(text) and _fits(op, value, text[i])}
            case C.SUBPATTERN if not value[1] and not value[2]:
                return self.ends(value[3], at)
            case C.BRANCH:
                return set[int]().union(*(self.ends(part, at) for part in value[1]))
            case C.MAX_REPEAT | C.MIN_REPEAT:
                return self.repeated(value[0], value[1], value[2], at)
            case C.AT if value in _ANCHORS:
                return {i for i in at if _ANCHORS[value](text, i)}
            case C.ASSERT | C.ASSERT_NOT if value[0] > 0:
                return {i for i in at if bool(self.ends(value[1], {i})) == (op is C.ASSERT)}
        raise ValueError(f"{self.source[:80]!r} has {str(op).lower()}, which is not allowed in files")

    def repeated(self, least: int, most: int, part: Any, at: set[int]) -> set[int]:
        for _ in range(least):
            self.count(1)
            at = self.ends(part, at)
        seen, new = set(at), at
        while new and most > least:
            new = self.ends(part, new) - seen
            seen |= new
            least += 1
        return seen


def _fits(op: Any, value: Any, c: str) -> bool:
    match op:
        case C.LITERAL:
            return ord(c) == value
        case C.NOT_LITERAL:
            return ord(c) != value
        case C.ANY:
            return c != "\n"
        case C.RANGE:
            return bool(value[0] <= ord(c) <= value[1])
        case C.CATEGORY:
            return _CLASSES[value].match(c) is not None
    negated = value[0][0] is C.NEGATE
    return any(_fits(o, v, c) for o, v in value[negated:]) != negated


_CLASSES = {
    C.CATEGORY_DIGIT: re.compile(r"\d"),
    C.CATEGORY_NOT_DIGIT: re.compile(r"\D"),
    C.CATEGORY_SPACE: re.compile(r"\s"),
    C.CATEGORY_NOT_SPACE: re.compile(r"\S"),
    C.CATEGORY_WORD: re.compile(r"\w"),
    C.CATEGORY_NOT_WORD: re.compile(r"\W"),
}
_ANCHORS = {
    C.AT_BEGINNING: lambda text, i: i == 0,
    C.AT_BEGINNING_STRING: lambda text, i: i == 0,
    C.AT_END: lambda text, i: text[i:] in ("", "\n"),
    C.AT_END_STRING: lambda text, i: i == len(text),
    C.AT_BOUNDARY: lambda text, i: re.compile(r"\b").match(text, i) is not None,
    C.AT_NON_BOUNDARY: lambda text, i: re.compile(r"\B").match(text, i) is not None,
}


@lru_cache(256)
def bounded(source: str) -> Pattern:
    """The pattern, parsed once."""
    return Pattern(source)
