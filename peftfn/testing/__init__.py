"""The laws every method obeys, to check your own with: `check_method(MyMethod(rank=2))`."""

import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType

from peftfn.core.method import Method
from peftfn.core.modules import ModuleMethod
from peftfn.model.model import sites
from peftfn.testing.case import Case, close, leaves, shaken
from peftfn.testing.laws import CORE, FEW, LAWS, ONCE, TRAINED
from peftfn.testing.models import ALIKE, AROUND, INPUTS, MODELS, SEVERAL, Model

__all__ = [
    "CORE",
    "LAWS",
    "MODELS",
    "ONCE",
    "Case",
    "LawBroken",
    "check_law",
    "check_method",
    "close",
    "leaves",
    "models_for",
    "shaken",
]


_DIFFERENT = ("linear, no bias", "embedding", "other", "module, attention")
"""Models that differ from "linear" in what a function gets, and not only in how a call reaches it: for `FEW`."""


class LawBroken(AssertionError):
    """A method breaks a law; the message says which, and on what smallest case."""


ADAPT = """`adapt` runs init, frozen, prepare, delta and bias (around a module: before and after) on the meta device
first, where tensors have shapes and no values: make tensors by `rng`, or from w and p, and read none of their values;
init and frozen give dicts."""


def models_for(method: Method) -> list[str]:
    """The tiny models whose sites the method accepts: with one site, and, where sites share tensors, with several.

    LawBroken if `adapt` fails on the first of them (of those with modules as sites: on all), or if the method refuses
    all those with several sites.
    """
    if not isinstance(method, Method):
        raise TypeError(f"the laws are about a method with its hyper-parameters, like LoRA(rank=2), not {method!r}")
    names = [n for n, m in (MODELS | AROUND | INPUTS).items() if m.kind in method.kinds]
    names = [n for n in names if n != "dense" or Case(method).merges]
    if not names:
        raise TypeError(f"there are no laws of methods at {', '.join(sorted(method.kinds))}: {method}")
    names = _accepted(method, names)
    case = Case(method, names[0])
    first = case.net.plan[case.site]
    if method.overrides("shared") or method.overrides("bank"):
        several = _several(method, SEVERAL) or _several(method, ALIKE)
        if not several:
            raise LawBroken(f"adapt: {method} shares tensors among sites, and refuses every model with several sites")
        names += several
    return [n for n in names if not first.adds_bias or sites(Case(method, n).model)[case.site].bias is not None]


def _accepted(method: Method, names: list[str]) -> list[str]:
    """Those of the models that the method can adapt: of those with weights all, the first of which is tried; of those
    with modules all that `init` does not refuse with a ValueError."""
    out: list[str] = []
    failed: list[tuple[Case, Exception]] = []
    for name in names if isinstance(method, ModuleMethod) else names[:1]:
        case = Case(method, name)
        try:
            case.net  # noqa: B018
            out.append(name)
        except Exception as e:
            failed.append((case, e))
            if not isinstance(e, ValueError):
                raise LawBroken(_message("adapt", case, ADAPT, e)) from e
    if failed and not out:
        raise LawBroken(_message("adapt", failed[0][0], ADAPT, failed[0][1])) from failed[0][1]
    return out if isinstance(method, ModuleMethod) else names


def _several(method: Method, models: Mapping[str, Model]) -> list[str]:
    """The models of several sites that the method accepts: all of its kinds but those that its `shared` or `bank`
    refuses with a ValueError."""
    names = []
    for name, model in models.items():
        if model.kind in method.kinds:
            case = Case(method, name)
            try:
                case.net.init()
            except Exception as e:
                if not isinstance(e, ValueError) or not {"shared", "bank"} & set(_functions(method, e)):
                    raise LawBroken(_message("adapt", case, ADAPT, e)) from e
            else:
                names.append(name)
    return names


def _functions(method: Method, e: BaseException) -> list[str]:
    """The functions of the method that were running when e was raised, the innermost last."""
    codes = {
        f.__code__: n
        for c in type(method).__mro__
        if issubclass(c, Method) and not c._family
        for n, f in vars(c).items()
        if isinstance(f, FunctionType)
    }
    frames = traceback.walk_tb(e.__traceback__)
    return [codes[frame.f_code] for frame, _ in frames if frame.f_code in codes]


def check_law(law: str, method: Method, examples: int | None = None, models: Sequence[str] | None = None) -> None:
    """Check one law of `LAWS` on the simplest case of each kind of site, and on `examples` random cases.

    Args:
        models: the kinds of site; those of `models_for(method)` if not given.
        examples: none if not given, or as the environment's PEFTFN_EXAMPLES says.

    Raises:
        LawBroken: naming the law and the smallest failing case.
        ValueError: there is no such law.
    """
    _known(law)
    names = models_for(method) if models is None else list(models)
    _check(law, method, names, _examples() if examples is None else examples)


def _examples() -> int:
    return int(os.environ.get("PEFTFN_EXAMPLES", "0"))


def _check(law: str, method: Method, names: list[str], n: int) -> None:
    for name in _some(law, names):
        _run(law, Case(method, name))
    if n and law not in ONCE:
        _search(law, method, names, n)


def _some(law: str, names: list[str]) -> list[str]:
    """Those of the models that the law is checked on."""
    several = [name for name in names if name not in MODELS | AROUND | INPUTS]
    if law in ONCE:
        return [*several, *names][:1]
    if law in CORE:
        return [names[0], *(several or names[1:])[:1]]
    if law in FEW:
        return [names[0], *(name for name in names[1:] if name in _DIFFERENT), *several[:2]]
    return names


def _search(law: str, method: Method, names: list[str], n: int) -> None:
    """Check n random cases, and find the smallest that fails."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    run = LAWS[law]
    failed: list[Case] = []

    def one(name: str, seed: int, rows: int) -> None:
        failed[:] = [Case(method, name, seed, rows)]
        run(failed[0])

    search = settings(
        max_examples=n, deadline=None, database=None, phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    try:
        search(given(st.sampled_from(names), st.integers(0, 9999), st.integers(2, 4))(one))()
    except Exception as e:
        raise LawBroken(_message(law, failed[0], LAWS[law].__doc__, e)) from e


def _run(law: str, case: Case) -> None:
    if law in TRAINED and not leaves(case.adapter()):
        return
    try:
        LAWS[law](case)
    except Exception as e:
        raise LawBroken(_message(law, case, LAWS[law].__doc__, e)) from e


def _message(law: str, case: Case, meaning: str | None, e: Exception) -> str:
    lines = [f"{law}: {case}", " ".join((meaning or "").split()), f"{type(e).__name__}: {e}"]
    where = _functions(case.method, e)
    lines += [f"raised in {type(case.method).__name__}.{where[-1]}"] if where else []
    return "\n  ".join([*lines, *getattr(e, "__notes__", [])])


def check_method(method: Method, laws: Iterable[str] = tuple(LAWS)) -> None:
    """Check that a method obeys every law, at every kind of site it accepts. Takes a few seconds.

        check_method(MyMethod(rank=2))

    Args:
        method: with sizes that fit a weight of [6, 8] (`rank=2`, `block_size=2`); of a method around a module, one that
            takes 8 features and returns 6, or 8.
        laws: names of some of `LAWS`, for those alone.

    Raises:
        LawBroken: the first law that fails, what it says, and the smallest case in which it does.
    """
    names = models_for(method)
    for law in laws:
        _known(law)
        _check(law, method, names, _examples())


def _known(law: str) -> None:
    if law not in LAWS:
        raise ValueError(f"there is no law {law!r}; choose from {', '.join(LAWS)}")
