"""Which form of an op runs: plain torch or Triton. `use` forces it, the rules below choose where nothing is forced.

A kernel is taken only where plain eager autograd is all there is. Under a torch.func transform, forward-mode
differentiation, a compiler, autocast, a dispatch mode (make_fx, FakeTensor, selective checkpointing), for a tensor
subclass (quantised, sharded), for fp64 and for integers, the plain operations run: they are what every op means.
"""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from peftfn.tensors.lent import Lent
from peftfn.tensors.transform import eager

Mode = Literal["auto", "torch", "triton"]
_mode: ContextVar[Mode] = ContextVar("peftfn.kernels.use", default="auto")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels read; they accumulate in fp32."""


@dataclass(frozen=True)
class Target:
    """What a kernel is configured for. arch: 80, 90, 100 … for CUDA, gfx942 … for ROCm."""

    kind: Literal["cuda", "hip", "interpreter"]
    arch: str
    processors: int

    @property
    def shared(self) -> int:
        """Bytes of shared memory that one program may use."""
        return {"80": 163, "86": 99, "89": 99}.get(self.arch, 227) * 1024 if self.kind != "hip" else 64 * 1024


@contextmanager
def use(mode: Mode) -> Iterator[None]:
    """Inside this context, the ops run as plain torch, as Triton kernels, or as the rules choose ("auto").

    "triton" takes a kernel wherever one is right; what no kernel can do (fp64, a transform, a tensor on a CPU) still
    runs as plain torch. The mode belongs to the thread or task that enters; a backward pass follows its forward pass.

    Raises:
        ValueError: an unknown mode, or "triton" where Triton is not installed.
    """
    if mode not in ("auto", "torch", "triton"):
        raise ValueError(f'peftfn.kernels.use({mode!r}): choose "auto", "torch" or "triton"')
    if mode == "triton" and not installed():
        raise ValueError('peftfn.kernels.use("triton"): Triton is not installed; pip install "peftfn[triton]"')
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


@cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

"""Whether kernels run in Triton's interpreter, on a CPU: decided before Triton is imported, as Triton itself does."""


def fits(x: Tensor) -> bool:
    """Whether x is where kernels run; the cheap question, before all others."""
    return x.is_cuda or INTERPRETED


def target(device: torch.device) -> Target | None:
    """What kernels on this device are compiled for; None where there are none."""
    if not installed():
        return None
    if INTERPRETED and device.type == "cpu":
        return Target("interpreter", "", 2)
    return _gpu(device.index) if device.type == "cuda" else None


@cache
def _gpu(index: int | None) -> Target | None:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    processors = properties.multi_processor_count
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], processors)
    return Target("cuda", f"{properties.major}{properties.minor}", processors) if properties.major >= 8 else None


def plain(t: Tensor) -> bool:
    """Whether t is an ordinary dense tensor of a dtype that the kernels read."""
    return type(t) in (Tensor, nn.Parameter, Lent) and t.dtype in FLOATS and t.layout is torch.strided


def kernels_for(x: Tensor, *others: Tensor | None) -> Target | None:
    """The target to launch kernels on for these operands, or None where plain torch has to run."""
    if not fits(x):  # the common case, and the cheap one
        return None
    if not eager(x) or _mode.get() == "torch" or torch._C._len_torch_dispatch_stack():
        return None
    there = target(x.device)
    if there is None:
        return None
    for t in (x, *others):
        if t is not None and (not plain(t) or t.device != x.device):
            return None
    return there


@dataclass(frozen=True)
class Products:
    """How the products of one `fused_linear` run: the large ones (x Wᵀ, dy W) and the thin ones (x Aᵀ, dyᵀ S, …)."""

    large: bool
    thin: bool


@dataclass(frozen=True)
class Rule:
    """For half precision from so many rows and so wide a matrix, up to a rank: `plain` without c and dropout, else
    `rank`; on one architecture or on all."""

    rows: int
    width: int
    plain: int
    rank: int
    products: Products
    arch: str | None = None

    def fits(self, there: Target, m: int, n: int, k: int, r: int, plain: bool) -> bool:
        rank = self.plain if plain else self.rank
        return m >= self.rows and min(n, k) >= self.width and r <= rank and self.arch in (None, there.arch)


RULES = (Rule(rows=512, width=512, plain=0, rank=64, products=Products(large=False, thin=True)),)
"""The first that fits counts; where none does, nothing is a kernel. From figures of one H100 (docs/kernels.md): large
products stay with the vendor's library, whose lead over the fused Triton GEMM is more than the passes that this saves.
What dropout or c adds is worth kernels. Of LoRA alone, kernels for the thin products save 4 % of a step on the device,
and cost the host more than that: launching them takes it longer than launching the library's."""


def products(there: Target, m: int, n: int, k: int, r: int, dtype: torch.dtype, *, plain: bool) -> Products | None:
    """What runs as a kernel for x [m, k], W [n, k] and rank r; None: nothing does. plain: without c and dropout."""
    if not m * n * k * r:
        return None
    if _mode.get() == "triton":
        return Products(True, True)
    if dtype is torch.float32:  # exact products have no tensor cores in Triton
        return None
    return next((rule.products for rule in RULES if rule.fits(there, m, n, k, r, plain)), None)


def memory_bound(n: int, k: int) -> bool:
    """Whether an op on a matrix [n, k] that reads it once is worth a kernel. Measured from 4096 by 4096 up, where it is
    7 to 14 times as fast as the plain form; below it is taken to hold, down to where launches are all of the time."""
    return _mode.get() == "triton" or min(n, k) >= 512


def by_segment(x: Tensor, rows: float, n: int, k: int, r: int) -> bool:
    """Whether adapters of rank r with so many rows each, of a mixed batch x, should have products of their own, by the
    vendor's library: in fp32, whose exact products have no tensor cores in Triton, from 512 rows. In half precision
    kernels were faster for 1024 rows each at every rank from 16 to 256."""
    if rows < 512 or x.dtype is not torch.float32 or _mode.get() != "auto":
        return False
    return kernels_for(x) is not None
