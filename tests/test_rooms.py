"""The rooms of the library: which may import which. Typing-only and local imports count."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TENSORS, MODEL, KERNELS = "tensors", "model", "kernels"
MAY: dict[str, set[str]] = {
    "tensors": set(),
    "model": {"tensors"},
    "kernels": {"tensors"},
    "core": {"tensors", "model"},
    "methods": {"core", "kernels", "model", "tensors"},
    "slots": {"core", "kernels", "model", "tensors"},
    "net": {"slots", "core", "model", "tensors"},
    "many": {"net", "slots", "core", "model", "tensors", "formats"},
    "view": {"net", "slots", "core", "model", "tensors"},
    "formats": {"net", "core", "methods", "model", "tensors"},
    "tools": {"view", "net", "core", "methods", "model", "tensors"},
    "sweeps": {"many", "tools", "formats", "net", "core", "tensors"},
    "serving": {"many", "formats", "net", "tensors"},
}
"""Room → what it may import, beside itself. The root may import everything, as the rooms of `ABOVE` may."""
ABOVE = ("cli", "compare", "demo", "testing")


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] == "kernels" else parts[1] if len(parts) > 2 else ""


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, "peftfn.x.y") of every import of the library, wherever it stands in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, a.name) for a in node.names if a.name.split(".")[0] in ("peftfn", "kernels")]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("peftfn", "kernels"):
            found += [(node.lineno, f"{node.module}.{a.name}") for a in node.names]
    return found


def sources(room: str) -> list[Path]:
    folder = ROOT / "kernels" if room == "kernels" else ROOT / "peftfn" / room
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("room", MAY)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    files = sources(room)
    assert files, f"there is no room {room}"
    wrong = []
    for path in files:
        for line, name in imports(path):
            parts = name.split(".")
            assert parts[0] == "peftfn", f"{path}: {name} is the hub's package, ours is peftfn.kernels"
            to = parts[1] if len(parts) > 1 else ""
            if to != room and to not in MAY[room] and "/".join(parts[1:3]) not in MAY[room]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", MAY)
def test_a_room_takes_no_private_name_of_another(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(room)
        for line, name in imports(path)
        if name.rpartition(".")[2].startswith("_") and name.split(".")[1] != room
    ]
    assert not wrong, "\n".join(wrong)


def test_files_import_in_no_circle() -> None:
    edges: dict[str, set[str]] = {}
    files = {
        ".".join(("peftfn", *p.relative_to(ROOT / "peftfn").with_suffix("").parts)): p
        for p in (ROOT / "peftfn").rglob("*.py")
        if "kernels" not in p.parts
    }
    for name, path in files.items():
        to = (n for _, full in imports(path) for n in (full, full.rpartition(".")[0]) if n in files)
        edges[name] = {n for n in to if n != name}
    done: set[str] = set()

    def walk(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " → ".join([*above[above.index(name) :], name])
        if name in done:
            return
        for n in sorted(edges[name]):
            walk(n, (*above, name))
        done.add(name)

    for name in files:
        walk(name, ())


@pytest.mark.parametrize("room", MAY)
def test_a_room_says_what_it_promises(room: str) -> None:
    folder = ROOT / "kernels" if room == "kernels" else ROOT / "peftfn" / room
    text = (folder / "README.md").read_text()
    assert "Promise" in text and "May import" in text
    for other in MAY[room]:
        assert other.partition("/")[0] in text, f"{room}/README.md does not name {other}"


def test_each_folder_is_a_room() -> None:
    folders = {path.parent.name for path in (ROOT / "peftfn").glob("*/__init__.py")} | {"kernels"}
    assert folders == MAY.keys() | set(ABOVE)
    for room in ABOVE:
        text = (ROOT / "peftfn" / room / "README.md").read_text()
        assert "Promise" in text and "May import.** everything" in text


def test_nothing_but_kernels_asks_for_a_kind_of_device() -> None:
    """XPU, NPU and other accelerators run what a GPU runs: `is_cuda` and `torch.cuda` are for Triton kernels alone."""
    found = []
    for path in sorted((ROOT / "peftfn").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "cuda"):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, found
