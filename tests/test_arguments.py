"""A number that a public function is given is checked before any work: an error names it and what was given.

The call that is right is the one of the function's own example; each of its numbers in turn is then what it cannot be.
"""

import inspect
import re
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest
import torch

import peftfn as pf
from tests.test_docs import EXAMPLES, MODULES, PARTS, PUBLIC


def kinds(annotation: Any) -> set[Any]:
    """The types that a parameter may have."""
    if get_origin(annotation) in (Union, types.UnionType):
        return {k for a in get_args(annotation) for k in kinds(a)}
    return {annotation}


def bad_values(may: set[Any]) -> list[Any]:
    wrong = [object()] + ([] if str in may else ["8"]) + ([] if type(None) in may else [None])
    return wrong + ([float("nan")] if float in may else [2.5])


CASES = {
    f"{name}: {p.name}": (name, p.name, bad_values(kinds(p.annotation)))
    for name, thing in PUBLIC.items()
    if isinstance(thing, types.FunctionType) and name in EXAMPLES
    for p in inspect.signature(thing).parameters.values()
    if kinds(p.annotation) & {int, float} and bool not in kinds(p.annotation)
}


def home(name: str) -> tuple[Any, str]:
    """(where the function is looked up, its name there)"""
    head, _, rest = name.rpartition(".")
    if not head:
        return next((m, name) for m in MODULES if hasattr(m, name))
    return (PARTS[head], rest) if head in PARTS else (next(getattr(m, head) for m in MODULES if hasattr(m, head)), rest)


class Caught(Exception):
    """What the example would have called."""

    def __init__(self, call: inspect.BoundArguments):
        self.call = call


def called(name: str, monkeypatch: pytest.MonkeyPatch) -> inspect.BoundArguments:
    """How the example calls the function."""
    signature = inspect.signature(PUBLIC[name])

    def catch(*args: Any, **kwargs: Any) -> Any:
        raise Caught(signature.bind(*args, **kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(*home(name), catch)
        with pytest.raises(Caught) as found:
            exec(compile(EXAMPLES[name], f"the example of {name}", "exec"), {"torch": torch, "pf": pf})
    return found.value.call


def entered(made: Any) -> None:
    """A context manager's work begins where it is entered."""
    if isinstance(made, AbstractContextManager):
        made.__enter__()


@pytest.mark.parametrize("case", CASES)
def test_a_number_is_checked_before_any_work(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, parameter, values = CASES[case]
    monkeypatch.chdir(tmp_path)
    call, f = called(name, monkeypatch), PUBLIC[name]
    for value in values:
        call.arguments[parameter] = value
        call = inspect.signature(f).bind(*call.args, **call.kwargs)
        with pytest.raises((TypeError, ValueError)) as e:
            entered(f(*call.args, **call.kwargs))
        assert re.search(rf"\b{parameter}\b", str(e.value)), f"{value!r}: {e.value}"


def test_a_number_of_any_size_and_kind_is_one() -> None:
    numpy = pytest.importorskip("numpy")
    for rows in (10**400, numpy.int64(3)):
        assert callable(pf.patience(rows))
    a = linear()[1]
    for s in (2, numpy.float32(2), torch.tensor(2.0)):
        assert pf.scale(a, s).keys() == a.keys()


def linear() -> tuple[pf.Adapted, pf.Adapter]:
    net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
    return net, net.init()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: pf.steps.cosine(-1), "cosine: total is -1"),
        (lambda: pf.steps.linear(10, end=-0.5), "linear: end is -0.5"),
        (lambda: pf.steps.cosine(5, warmup=6), "cosine: warmup is 6, and total is 5: give warmup <= total"),
        (lambda: pf.grid(lr=1e-3), r"grid: lr is 0.001; give its values in a list: grid\(lr=\[0.001\]\)"),
        (lambda: pf.grid(start="zeros"), "grid: start is 'zeros'; give its values in a list"),
        (lambda: linear()[0].checkpointed(3), "checkpointed: pattern is 3"),  # type: ignore[arg-type]
        (lambda: pf.save(None, *linear()), "the path is None: give a string or a Path"),  # type: ignore[arg-type]
        (
            lambda: linear()[0].gated(pf.stack([linear()[1]]), "x", torch.ones(2, 8)),  # type: ignore[arg-type]
            "gated: gates are 'x', which torch cannot make a tensor of",
        ),
    ],
)
def test_other_arguments_that_nothing_can_be_made_of(call: Callable[[], Any], says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        call()


def test_saving_onto_a_file_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"notes\.txt is a file, and format='native' writes a folder"):
        pf.save(path, *linear())
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_a_sweep_of_no_steps_says_which_configuration() -> None:
    net, _ = linear()
    with pytest.raises(ValueError, match=r"sweep: steps is 0 for \{'lr': 0.1\}; it must be at least 1"):
        pf.sweep(
            pf.grid(lr=[0.1]),
            net,
            lambda n, a, x: n.apply(a, x).mean(),
            lambda c, step: torch.ones(2, 8),
            lambda c: pf.steps.adamw(c["lr"]),
            steps=0,
        )
