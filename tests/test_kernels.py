"""peftfn.kernels: each op equals its plain-torch reference, forward, backward and twice backward, at odd sizes; and
where its files may be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftfn.kernels.lora_linear import lora_linear, reference
from peftfn.testing import close


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 13, 5, 3), (33, 17, 31, 16), (64, 8, 40, 9)])
@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_lora_linear_is_its_reference(shape: tuple[int, int, int, int], lead: tuple[int, ...]) -> None:
    m, k, n, r = shape
    g = torch.Generator().manual_seed(0)

    def leaf(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64).requires_grad_()

    x, w, a, b = leaf(*lead, m, k), leaf(n, k), leaf(r, k), leaf(n, r)
    v = torch.randn((*lead, m, n), generator=g, dtype=torch.float64)
    got, want = (f(x, w, a, b, 0.7) for f in (lora_linear, reference))
    close(got.detach(), want.detach(), "forward", 1e-12)
    inputs = [x, w, a, b]
    first = [torch.autograd.grad((y * v).sum(), inputs, create_graph=True) for y in (got, want)]
    for name, p, q in zip("xwab", *first, strict=True):
        close(p.detach(), q.detach(), f"d{name}", 1e-12)
    second = [torch.autograd.grad(sum((t * t).sum() for t in grads), inputs) for grads in first]  # type: ignore[arg-type]
    for name, p, q in zip("xwab", *second, strict=True):
        close(p, q, f"second derivative in {name}", 1e-12)


def test_lora_linear_keeps_no_full_size_tensor() -> None:
    """Backward needs x, the weights and S [m, r]; not the dense product of A and B, and no copy of x."""
    x, w, a, b = torch.randn(50, 40), torch.randn(30, 40), torch.randn(4, 40), torch.randn(30, 4)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, w, a.requires_grad_(), b.requires_grad_())
    own = [t for t in saved if all(t.data_ptr() != p.data_ptr() for p in (x, w, a, b))]
    assert [t.shape for t in own] == [(50, 4)]


def test_lora_linear_without_gradients_saves_nothing() -> None:
    x, w, a, b = torch.randn(5, 4), torch.randn(3, 4), torch.randn(2, 4), torch.randn(3, 2)
    with torch.no_grad():
        y = lora_linear(x, w, a.requires_grad_(), b, 2.0)
    assert y.grad_fn is None
    close(y, reference(x, w, a.detach(), b, 2.0), "no_grad", 1e-5)


ROOT = Path(__file__).parents[1]
PROGRAM = """
import importlib.util, sys
import torch, peftfn
from peftfn.kernels import choose, use
import peftfn.kernels.lora_linear as ops
with use("torch"):
    assert choose._mode.get() == "torch"
other = importlib.util.find_spec("kernels")
print(ops.__file__, other is None or other.origin is None)
"""


@pytest.mark.parametrize("layout", ["a clone", "an installed wheel"])
def test_the_files_are_found_and_shadow_no_package(layout: str, tmp_path: Path) -> None:
    """A folder `kernels` on the path that is no package loses to the package that transformers and PEFT look for."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "peftfn", tmp_path / "peftfn", ignore=ignore)
    folder = tmp_path / "kernels" if layout == "a clone" else tmp_path / "peftfn" / "kernels"
    shutil.copytree(ROOT / "kernels", folder, ignore=ignore)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "lora_linear.py"), "True"]
    (tmp_path / "other" / "kernels").mkdir(parents=True)
    (tmp_path / "other" / "kernels" / "__init__.py").write_text("get_kernel = 1")
    env["PYTHONPATH"] += os.pathsep + str(tmp_path / "other")
    command = [sys.executable, "-c", "import peftfn.kernels; from kernels import get_kernel"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
