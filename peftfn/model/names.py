"""Names of sites: which a pattern finds, and which are like one that was not found."""

import difflib
import re


def matches(pattern: str, name: str) -> bool:
    """Word characters and dots match whole dotted components; anything else is a regular expression, searched."""
    if re.fullmatch(r"[\w.]+", pattern):
        return f".{pattern}." in f".{name}."
    return re.search(pattern, name) is not None


def ends(pattern: str, name: str) -> bool:
    """Like `matches`, at the end of the name alone: "mlp" finds "layers.0.mlp" and nothing that is inside of it."""
    if re.fullmatch(r"[\w.]*", pattern):
        return f".{name}".endswith(f".{pattern}")
    return re.search(f"(?:{pattern})$", name) is not None


def near(name: str, names: list[str], n: int = 3) -> str:
    """The names, or parts of names, most like `name`; for an error message."""
    parts = list(dict.fromkeys(part for full in names for part in full.split(".") if not part.isdigit()))
    words = re.findall(r"\w+", name)
    found = difflib.get_close_matches(name, names, n=n, cutoff=0.6) or [
        hit for w in reversed(words) for hit in difflib.get_close_matches(w, parts, n=n, cutoff=0.5)
    ]
    has = ", ".join((parts or names)[:8])
    return f"; near: {', '.join(dict.fromkeys(found[:n]))}" if found else f"; it has {has} …"
