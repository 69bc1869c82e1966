"""A number in a file is no work: whatever a configuration asks for, `load` answers at once, and makes nothing large."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz import SECONDS, limited
from mutations import MODEL

import peftfn as pf
from peftfn.core.method import registry

FILES = {"native": "peftfn.json", "peft": "adapter_config.json"}
LARGE = (2**29, 2**40, 10**400)
OURS = sorted(n for n, cls in registry.items() if cls.__module__.startswith("peftfn.") and cls.cases)


def saved(name: str, format: str, path: Path) -> bool:
    """Whether an adapter of a method was saved in a format; no method is in all, and not every one fits the model."""
    cls: Any = registry[name]
    try:
        net = pf.adapt(MODEL, {"q_proj" if issubclass(cls, pf.Weight) else "model": cls(**cls.cases[0])})
        pf.save(path, net, net.init(), format=format)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def integers(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to the integers of a JSON value."""
    if isinstance(value, int) and not isinstance(value, bool):
        yield way
    for k, v in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from integers(v, (*way, k))


def test_there_are_files() -> None:
    assert len(OURS) > 60


@pytest.mark.parametrize("name", OURS)
def test_every_integer_of_a_configuration(name: str, tmp_path: Path) -> None:
    for format, file in FILES.items():
        path = tmp_path / format
        if not saved(name, format, path):
            continue
        text = (path / file).read_text()
        for way in integers(json.loads(text)):
            for large in LARGE:
                config = inner = json.loads(text)
                for k in way[:-1]:
                    inner = inner[k]
                inner[way[-1]] = large
                (path / file).write_text(json.dumps(config))
                with limited(SECONDS), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        pf.load(path, MODEL)
                    except ValueError as e:
                        assert str(path) in str(e), (way, large, e)
