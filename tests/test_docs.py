"""Every Python block of the README and the docs runs, top to bottom, each page in one namespace and an empty folder.

So does every `Example:` in a docstring of a public object. And what the README says besides: figures, links, the
package's parts.
"""

import importlib
import inspect
import json
import re
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import peftfn as pf
from benchmarks import readme
from benchmarks.readme import filled
from peftfn.core.method import registry

ROOT = Path(__file__).parent.parent
PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if "```python" in p.read_text()]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    module = types.ModuleType(f"docs_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # what a page defines can be pickled
    for match in re.finditer(r"^```python\n(.*?)^```", text, flags=re.S | re.M):
        line = text[: match.start(1)].count("\n")
        exec(compile("\n" * line + match[1], str(page), "exec"), vars(module))


def test_the_readme_is_among_them() -> None:
    assert ROOT / "README.md" in PAGES
    assert {"adding_a_method.md"} <= {p.name for p in PAGES}


PARTS = {name: getattr(pf, name) for name in ("merging", "optim", "routing", "starts", "steps", "suggest")}
"""Modules that are a part of peftfn's interface: their names are shown with the module's before them."""
MODULES = (
    pf,
    *PARTS.values(),
    *(importlib.import_module(f"peftfn.{m}") for m in ("method", "fields", "testing", "kernels")),
)
OURS = {*pf.__all__, *(f"{part}.{n}" for part, module in PARTS.items() for n in module.__all__)}


def public() -> dict[str, Any]:
    """ "name" or "class.member" → every class and function that peftfn's modules export, and their public members."""
    found: dict[str, Any] = {}
    prefixes = {id(module): f"{part}." for part, module in PARTS.items()}
    for module in MODULES:
        for bare in getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")]):
            thing, name = getattr(module, bare), prefixes.get(id(module), "") + bare
            if isinstance(thing, type | types.FunctionType):
                found[name] = thing
            for n, member in vars(thing).items() if inspect.isclass(thing) else ():
                if not n.startswith("_") and isinstance(member, types.FunctionType | property | classmethod):
                    found[f"{name}.{n}"] = member
    return found


PUBLIC = public()


def example(thing: Any) -> str | None:
    """The code of the `Example:` in a docstring."""
    block = re.search(r"^Example:\n((?:    .*\n?|\n)+)", inspect.getdoc(thing) or "", flags=re.M)
    return inspect.cleandoc(block[1]) if block else None


EXAMPLES = {name: code for name, thing in PUBLIC.items() if (code := example(thing))}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an example, torch and pf are imported."""
    monkeypatch.chdir(tmp_path)
    lines = EXAMPLES[name].splitlines()
    assert 2 <= len(lines) <= 6, f"{name}: an example has two to six lines"
    exec(compile(EXAMPLES[name], f"the example of {name}", "exec"), {"torch": torch, "pf": pf})


HOOKS = {"Method", "Weight", "ModuleMethod", "Along", "Tokens", "Prefix", "Place", "Rng", *registry}
"""Classes whose members are explained together, in docs/adding_a_method.md, rather than one by one."""


def test_every_public_object_has_an_example() -> None:
    """Each class, each function, and each public member of a class that users call."""
    wanted = [n for n in PUBLIC if n in OURS or (n.split(".")[0] in {"Adapted", "Bank", "Nets"})]
    assert len(wanted) > 100
    assert not [n for n in wanted if n not in EXAMPLES]


def test_every_public_function_says_what_it_takes_and_returns() -> None:
    lacks = []
    for name, thing in PUBLIC.items():
        head = name.split(".")[0]
        if head not in OURS - HOOKS or not isinstance(thing, types.FunctionType):
            continue
        doc, signature = inspect.getdoc(thing) or "", inspect.signature(thing)
        section = re.search(r"^Args:\n((?:    .*\n?)+)", doc, flags=re.M)
        for p in signature.parameters if name in OURS else ():
            if not re.search(rf"(^|[ ,]){p}[:,]", section[1] if section else "", flags=re.M):
                lacks.append(f"{name}: {p}")
        returns = signature.return_annotation
        if returns not in (None, "None", inspect.Signature.empty) and "Returns:" not in doc:
            lacks.append(f"{name}: what it returns")
    assert not lacks


def test_dir_shows_what_users_call() -> None:
    shown = [n for n in dir(pf) if not n.startswith("__")]
    assert shown == sorted(pf.__all__)
    assert [n for n in shown if inspect.ismodule(getattr(pf, n))] == list(PARTS)


def test_every_method_has_an_example_of_itself() -> None:
    ours = [n for n, c in registry.items() if c.__module__.startswith("peftfn.methods")]
    assert not [n for n in ours if f"pf.{n}(" not in EXAMPLES.get(n, "")]


def test_the_reference_is_complete() -> None:
    """docs/api.md has every public name once a table, each with a summary, and no other name."""
    text = (ROOT / "docs" / "api.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", text, flags=re.M)
    listed = re.search(r"^## Methods\n\n.*\n\n(.*)$", text, flags=re.M)
    assert listed is not None
    methods = re.findall(r"`(\w+)`", listed[1])
    members = {n for n in PUBLIC if n.split(".")[0] in {"Adapted", "Bank", "Continuous", "Nets"} and "." in n}
    of_method, of_fields = (importlib.import_module(f"peftfn.{m}").__all__ for m in ("method", "fields"))
    wanted = {*OURS, *members, *of_method, *of_fields, "use"}
    shown = {*(name for name, _ in rows), *methods}
    assert wanted - shown == set(), "not in docs/api.md"
    rest = shown - wanted
    assert rest <= set(importlib.import_module("peftfn.testing").__all__), "in docs/api.md, and not public"
    assert not [name for name, summary in rows if not summary.endswith(".")]


def test_figures_of_the_readme_are_those_measured() -> None:
    """`python -m benchmarks` writes them."""
    text = (ROOT / "README.md").read_text()
    assert filled(text) == text
    assert len(re.findall(readme.ROW, text, flags=re.M)) >= 5


def test_a_figure_of_the_readme_that_is_not_measured_is_found() -> None:
    text = (ROOT / "README.md").read_text()
    row = re.search(readme.ROW, text, flags=re.M)
    assert row is not None
    assert filled(text.replace(row[0], f"| {row[1]} | 0.01 | |")) == text
    with pytest.raises(ValueError, match="no benchmark measures"):
        filled(text.replace(row[1], "a case of another day"))
    with pytest.raises(ValueError, match="does not say"):
        filled(text.replace("under one `vmap`", "under `vmap`"))


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text()):
            name, _, part = link.partition("#")
            to = page.parent / name if name else page
            assert to.exists(), f"{page.name}: {link}"
            headings = re.findall(r"^#+ (.+)$", to.read_text(), flags=re.M) if part else []
            anchors = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}
            assert not part or part in anchors, f"{page.name}: {link} is none of {sorted(anchors)}"


def test_every_package_is_installed() -> None:
    """pyproject lists the packages by hand, because kernels/ is installed as peftfn.kernels."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "peftfn").rglob("__init__.py")}
    assert listed == found | {"peftfn.kernels"}


def test_the_readme_says_what_the_zoo_found() -> None:
    """`make zoo ZOO=--write` writes the figures."""
    zoo = json.loads((ROOT / "benchmarks" / "zoo.json").read_text())
    line = " ".join((ROOT / "README.md").read_text().split())
    assert f"{zoo['hold']} of the {zoo['built']} that build here from a configuration pass every check" in line


def test_pefts_tables_are_as_the_page_says() -> None:
    record = json.loads((ROOT / "benchmarks" / "peft_tables.json").read_text())
    assert "no value is wrong" in " ".join((ROOT / "docs" / "from_peft.md").read_text().split())
    assert not {status for counts in record["counts"].values() for status in counts} - {"holds", "refused", "peft"}
    assert all(sum(counts.values()) for counts in record["counts"].values())
