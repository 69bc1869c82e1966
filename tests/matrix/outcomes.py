"""What became of each check of a case."""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import pairs
from .cases import Case
from .checks import CHECKS, PeftFails, Row

REFUSALS = (ValueError, TypeError, KeyError, NotImplementedError)


class Outcome(NamedTuple):
    """status: holds, wrong, refused (an error of ours that names what is wrong), crash, sum (the documented sum of two
    adapters, where PEFT's is something else), or peft (PEFT itself fails)."""

    status: str
    detail: str = ""


def outcomes(case: Case) -> Iterator[tuple[str, Outcome]]:
    """(check, what became of it) for each check of a case."""
    with tempfile.TemporaryDirectory() as folder:
        if case.second is not None:
            what: Any = pairs.Pair(case, Path(folder))
            checks: tuple[Callable[[Any], None], ...] = pairs.CHECKS
        else:
            what, checks = Row(case, Path(folder)), CHECKS if case.generates else CHECKS[:-1]
        for check in checks:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield check.__name__, _outcome(check, what)


def _outcome(check: Callable[[Any], None], row: Any) -> Outcome:
    try:
        check(row)
    except PeftFails as e:
        return Outcome("peft", _short(e, row))
    except pairs.Composed as e:
        return Outcome("sum", _short(e, row))
    except AssertionError as e:
        return Outcome("wrong", _short(e, row))
    except REFUSALS as e:
        return Outcome("refused", f"{type(e).__name__}: {_short(e, row)}")
    except Exception as e:
        return Outcome("crash", f"{type(e).__name__}: {_short(e, row)}")
    return Outcome("holds")


def _short(e: Exception, row: Any) -> str:
    return " ".join(str(e).replace(str(row.folder), "folder").split())[:300]
