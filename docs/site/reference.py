"""A Sphinx extension: the reference, from the sections of api.md and the docstrings of what they list.

api.md is the list of what is public, which a test keeps complete. Each of its sections becomes a page with the whole
docstrings, and each name on it a link there.
"""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROW = re.compile(r"^\| `([\w.]+)` \| (.+) \|$", flags=re.M)
HOMES = ("peftfn", "peftfn.method", "peftfn.fields", "peftfn.testing", "peftfn.kernels")


def sections(text: str) -> Iterator[tuple[str, str]]:
    """(title, text) of each section of api.md."""
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def names(text: str) -> list[str]:
    """The names that a section lists: in the first column of a table, or in a line of nothing but names."""
    listed = re.findall(r"^((?:`\w+`(?:, |\.$))+)$", text, flags=re.M)
    found = [name for name, _ in ROW.findall(text)] + [n for line in listed for n in re.findall(r"`(\w+)`", line)]
    return list(dict.fromkeys(found))


def find(name: str) -> tuple[str, Any]:
    """(the full name, the object) of a public name. LookupError if no module of the interface has it."""
    for home in HOMES:
        thing: Any = importlib.import_module(home)
        try:
            for part in name.split("."):
                thing = getattr(thing, part)
        except AttributeError:
            continue
        return f"{home}.{name}", thing
    raise LookupError(f"api.md lists {name}, which none of {', '.join(HOMES)} has")


def slug(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")


def directive(name: str) -> str:
    """What documents a name: its docstring, with its signature. Members of a class have rows of their own."""
    full, thing = find(name)
    module, _, member = full.rpartition(".")
    if inspect.ismodule(thing):
        return f".. automodule:: {thing.__name__}\n   :no-index:"
    if isinstance(thing, type):  # not a type such as dict[str, Tensor]
        return f".. autoclass:: {full}"
    if "." in name and isinstance(find(name.rpartition(".")[0])[1], type):
        kind = "autoproperty" if isinstance(thing, property) else "automethod"
        return f".. {kind}:: {full}"
    return f".. autofunction:: {full}" if inspect.isroutine(thing) else f".. py:data:: {member}\n   :module: {module}"


def pages(text: str) -> dict[str, str]:
    """file name → text of every page of the reference."""
    made: dict[str, str] = {}
    seen: set[str] = set()
    for title, section in sections(text):
        summaries = dict(ROW.findall(section))
        intro = re.sub(r"\]\((\w+\.md)", r"](../\1", section.strip().split("\n\n|")[0].split("\n\n`")[0].strip())
        parts = [f"# {title}\n", "" if intro.startswith("|") else intro]
        for name in names(section):
            if name in seen:  # api.md says "see above"
                continue
            seen.add(name)
            text = directive(name)
            if ".. py:data::" in text:
                text += f"\n\n   {summaries[name].replace('`', '``')}"
            parts.append(f"## {name}\n\n```{{eval-rst}}\n{text}\n```")
        made[slug(title)] = "\n\n".join(p for p in parts if p) + "\n"
    return made


def write(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "reference"
    folder.mkdir(exist_ok=True)
    made = pages((Path(app.srcdir) / "api.md").read_text())
    for old in folder.glob("*.md"):
        if old.stem not in made:
            old.unlink()
    for name, text in made.items():
        path = folder / f"{name}.md"
        if not path.exists() or path.read_text() != text:  # what has not changed is not built again
            path.write_text(text)


def link(app: Sphinx, page: str, source: list[str]) -> None:
    """In api.md, each name leads to its docstring, and the pages of the reference are its parts."""
    if page != "api":
        return
    first: dict[str, str] = {}  # name → the page that has its docstring
    for title, section in sections(source[0]):
        linked = section
        for name in names(section):
            where = first.setdefault(name, slug(title))
            linked = linked.replace(f"`{name}`", f"[`{name}`](reference/{where}.md#{slug_of(name)})")
        source[0] = source[0].replace(section, linked)
    entries = "\n".join(f"reference/{name}" for name in dict.fromkeys(first.values()))
    source[0] += f"\n```{{toctree}}\n:hidden:\n\n{entries}\n```\n"


def slug_of(name: str) -> str:
    return re.sub(r"[^\w\- ]", "", name.lower())


def to_rst(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written as Markdown is: `name` is code. And what follows "Example:" is a block of code."""
    text, found, example = "\n".join(lines).partition("\nExample:\n")
    pieces = re.split(r"(`[^`]+`)", text)  # code may go on in the next line
    text = "".join(f"`{p}`" if p.startswith("`") else re.sub(r"([*|\\]|(?<=\w)_(?!\w))", r"\\\1", p) for p in pieces)
    lines[:] = text.split("\n")
    if found:
        lines += ["", "Example:", "    .. code-block:: python", "", *(f"    {line}" for line in example.split("\n"))]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("builder-inited", write)
    app.connect("source-read", link)
    app.connect("autodoc-process-docstring", to_rst, priority=400)  # before napoleon
    return {"parallel_read_safe": True}
