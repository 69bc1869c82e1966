"""What commands have in common: how one is added to the parser, and what its arguments may be."""

import argparse
from typing import Any, Protocol

ADAPTER = "an adapter's folder or file, or the hub's owner/name"
ANY_BASE = "the base may have other values than the one that the adapter was made on"


class Command(Protocol):
    """Adds a command to the parser, and returns where its arguments go."""

    def __call__(self, name: str, run: Any, brief: str, description: str) -> argparse.ArgumentParser: ...


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def rates(text: str) -> tuple[float, ...]:
    """Numbers above 0."""
    try:
        rates = tuple(float(x) for x in text.split(","))
    except ValueError:
        rates = ()
    if not rates or not all(0 < r < float("inf") for r in rates):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers above 0")
    return rates


def positive(text: str) -> int:
    """An integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value
