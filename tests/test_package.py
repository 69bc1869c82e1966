"""The wheel holds all that is needed, and needs no more than torch, optree, safetensors, numpy and what they bring."""

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from support import ROOT

TORCH = ("torch", "torchgen", "functorch", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy")
BROUGHT = (*TORCH, "numpy", "optree", "safetensors")
"""What an installation of the wheel brings along, by its import names."""

SMOKE = """
import sys
from pathlib import Path
import torch
import peftfn as pf
from torch.func import grad, vmap

assert Path(pf.__file__).parent == Path(sys.argv[1]) / "peftfn", pf.__file__
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
x = torch.randn(3, 8)
for name in ("LoRA", "DoRA", "VeRA", "LoHa", "OFT", "BOFT"):
    net = pf.adapt(model, {"weight": getattr(pf, name)()} if name != "OFT" else {"weight": pf.OFT(block_size=4)})
    many = pf.stack([net.init(0), net.init(1)])
    assert net.mixed(many, [1, -1, 0], x).isfinite().all()
    assert vmap(net.apply, (0, None))(many, x).shape == (2, 3, 4)
    g = grad(lambda a: net.apply(a, x).sum())(net.init())
    assert all(t.isfinite().all() for t in pf.leaves(g))
    for format in ("native", "peft"):
        pf.save(f"{name}-{format}", net, net.init(), format=format)
        again, a = pf.load(f"{name}-{format}", model)
        torch.testing.assert_close(again.apply(a, x), net.apply(net.init(), x))
m = pf.as_module(net, net.init())
m(x).sum().backward()
from peftfn.kernels import use
with use("torch"):
    m(x)
from peftfn.testing import check_method
check_method(pf.LoRA(rank=2))
print("fine")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which is built from a copy in which no former build is."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("peftfn", "kernels"):
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    sdist = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_sdist('..')"]
    subprocess.run(sdist, check=True, capture_output=True, text=True, cwd=folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", folder]
    subprocess.run([*command, *folder.glob("*.tar.gz")], check=True, capture_output=True, text=True)
    (made,) = folder.glob("*.whl")
    return made


def test_the_wheel_has_every_file_and_no_other(wheel: Path) -> None:
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    sources = {p.relative_to(ROOT) for p in (ROOT / "peftfn").rglob("*.py")}
    wanted = {str(p) for p in sources} | {f"peftfn/kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}
    assert held == wanted | {"peftfn/py.typed"}


def test_the_wheel_works_alone(wheel: Path, tmp_path: Path) -> None:
    """With its dependencies, and neither transformers, PEFT, Triton nor anything else of this environment."""
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    for name in BROUGHT:
        (installed / name).symlink_to(Path(importlib.util.find_spec(name).origin).parent)
    (installed / "typing_extensions.py").symlink_to(importlib.util.find_spec("typing_extensions").origin)
    done = subprocess.run(
        [sys.executable, "-S", "-c", SMOKE, installed],  # -S: without the packages of this environment
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"
