"""What a check says of a subject."""

import re
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peftfn as pf
from peftfn import kernels

from .build import Subject
from .checks import CHECKS, NotApplicable

OURS = tuple(str(Path(m.__file__ or "").parent) for m in (pf, kernels))
HOLDS, REFUSED, FAILS, NOT_APPLICABLE = "holds", "refused", "fails", "does not apply"


@dataclass(frozen=True)
class Outcome:
    """status: one of the four words above. reason: one line, the same in every run."""

    status: str
    reason: str = ""
    where: str = ""
    """Where in the code a failure came up."""


def outcome(check: Callable[[Subject], None], s: Subject) -> Outcome:
    try:
        check(s)
    except NotApplicable as e:
        return Outcome(NOT_APPLICABLE, one_line(e))
    except AssertionError as e:
        return Outcome(FAILS, one_line(e), where(e))
    except Exception as e:
        return Outcome(REFUSED if refused(e, s) else FAILS, f"{type(e).__name__}: {one_line(e)}", where(e))
    return Outcome(HOLDS)


def outcomes(s: Subject) -> dict[str, Outcome]:
    return {name: outcome(check, s) for name, check in CHECKS.items()}


def one_line(e: BaseException) -> str:
    """Without the temporary folder of the run."""
    text = re.sub(rf"{re.escape(tempfile.gettempdir())}/\w+/", "", str(e))
    return " ".join(text.split())[:200]


def refused(e: Exception, s: Subject) -> bool:
    """Whether the library itself raised it, and says where in the model: an error that its reader can act on."""
    frames = traceback.extract_tb(e.__traceback__)
    ours = frames[-1].filename.startswith(OURS)
    return ours and isinstance(e, ValueError | TypeError | KeyError | RuntimeError) and names_a_place(str(e), s)


def names_a_place(message: str, s: Subject) -> bool:
    """Whether a module or parameter of the model stands in the message: by its dotted name, or in quotes."""
    names = {n for n, _ in s.model.named_modules()} | {n for n, _ in s.model.named_parameters(remove_duplicate=False)}
    words = {w.strip(".") for w in re.findall(r"[\w.]+", message)}
    quoted = set(re.findall(r"['\"`]([\w.]+)['\"`]", message))
    return bool({w for w in words if "." in w} & names or quoted & names)


def where(e: BaseException) -> str:
    """The innermost line of the library, and the line that raised if that is another."""
    frames = traceback.extract_tb(e.__traceback__)
    told = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if f.filename.startswith(OURS) or f is frames[-1]]
    return ", ".join(dict.fromkeys(told[-2:]))
