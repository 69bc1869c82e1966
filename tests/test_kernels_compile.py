"""Kernels compile for every architecture, within its shared memory and without spills but for those listed, in the
modes and dtypes that occur; and run-time values stay run-time values. Needs no GPU: the public ops run on meta tensors,
and what they would launch is compiled. PEFTFN_COMPILE=all compiles every call for every target, in every dtype and mode
(it takes an hour on one core); without it, a selection."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import TARGETS, Launch, recorded
from torch import Tensor

from peftfn.kernels import choose, use
from peftfn.kernels.dora_norm import dora_norm, dora_norms
from peftfn.kernels.lora_fused import fused_linear
from peftfn.kernels.mixed_lora import Stack, mixed_embedding, mixed_lora
from peftfn.kernels.segments import segments

triton = pytest.importorskip("triton", reason="needs Triton: pip install peftfn[triton]")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*size: int, dtype: torch.dtype = FP32, grad: bool = False) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta", requires_grad=grad)


def linear(
    m: int = 4096, n: int = 4096, k: int = 4096, r: int = 16, *, dtype: torch.dtype = BF16, c: bool = False,
    bias: bool = False, dropout: float = 0.0, scale: float = 2.0, seed: int = 0,
) -> None:  # fmt: skip
    x, w = meta(m, k, dtype=dtype, grad=True), meta(n, k, dtype=dtype)
    a, b, rows = meta(r, k, grad=True), meta(n, r, grad=True), meta(n, grad=True) if c else None
    given = meta(n, dtype=dtype) if bias else None
    y = fused_linear(x, w, a, b, scale, c=rows, bias=given, dropout=dropout, seed=meta(1, dtype=torch.int64))
    if y is not None:  # the rules leave some to plain torch
        y.backward(torch.empty_like(y))


def norms(dtype: torch.dtype = BF16, r: int = 16) -> None:
    w, a, b = meta(4096, 4096, dtype=dtype), meta(r, 4096), meta(4096, r)
    dora_norm(w, a, b, 2.0)
    dora_norms([w, w], [a, a], [b, b], [1.0, 2.0])


def mixed(
    t: int = 64, slots: int = 32, r: int = 16, *, dtype: torch.dtype = BF16, train: bool = True, embed: bool = False,
) -> None:  # fmt: skip
    x, n = meta(t, 4096, dtype=dtype, grad=train), 4096
    index = meta(t, dtype=torch.int64)
    down, up, c = meta(slots, r, 4096, grad=train), meta(slots, n, r, grad=train), meta(slots, n, grad=train)
    rows = segments(index, slots)
    y = mixed_lora(x, meta(n, 4096, dtype=dtype), (Stack(down, up, 2.0, c), rows))
    if train:
        y.backward(torch.empty_like(y))
    if embed:
        mixed_embedding(index, meta(n, 50000, dtype=dtype), (Stack(meta(slots, r, 50000), up, 2.0, c), rows))


CALLS: dict[str, Callable[[torch.dtype], None]] = {
    "DoRA with dropout": lambda t: linear(dtype=t, c=True, bias=True, dropout=0.05),
    "LoRA": lambda t: linear(dtype=t),
    "norms": lambda t: norms(t),
    "mixed": lambda t: mixed(dtype=t),
    "mixed, no gradient": lambda t: mixed(dtype=t, train=False, embed=True),
    "mixed, few rows": lambda t: mixed(dtype=t, t=8, slots=8),
    "mixed, long segments": lambda t: mixed(dtype=t, t=8192, slots=8, r=64),
    "LoRA with dropout": lambda t: linear(dtype=t, dropout=0.05),
    "LoRA of rank 8 with dropout": lambda t: linear(dtype=t, r=8, dropout=0.05),
    "LoRA of few rows": lambda t: linear(dtype=t, m=32),
    "LoRA with a bias": lambda t: linear(dtype=t, bias=True),
    "DoRA of rank 64": lambda t: linear(dtype=t, r=64, c=True),
    "mixed of high ranks": lambda t: mixed(dtype=t, t=4096, slots=4, r=512),
    "norms of high ranks": lambda t: norms(t, 384),
}
Case = tuple[choose.Target, str, torch.dtype, choose.Mode]
SOME: dict[str, list[tuple[str, torch.dtype, choose.Mode]]] = {
    "80": [("DoRA with dropout", BF16, "auto"), ("mixed, no gradient", BF16, "triton")],
    "90": [
        ("DoRA with dropout", BF16, "triton"), ("DoRA with dropout", BF16, "auto"), ("LoRA with dropout", FP16, "auto"),
        ("LoRA", BF16, "triton"), ("norms", BF16, "triton"), ("norms of high ranks", BF16, "triton"),
        ("mixed", BF16, "triton"), ("mixed, few rows", BF16, "triton"), ("mixed, no gradient", FP32, "triton"),
    ],
    "100": [("DoRA with dropout", BF16, "auto"), ("mixed, few rows", BF16, "triton")],
    "gfx942": [("DoRA with dropout", BF16, "auto"), ("mixed, no gradient", BF16, "triton")],
}  # fmt: skip
EVERY = [(call, dtype, mode) for call in CALLS for dtype in (BF16, FP16, FP32) for mode in ("triton", "auto")]
ALL = os.environ.get("PEFTFN_COMPILE") == "all"
CASES: list[Case] = [(there, *case) for there in TARGETS for case in (EVERY if ALL else SOME[there.arch])]
SPILLS: dict[tuple[str, str], int] = {
    ("80", "_sweep"): 112,
    ("80", "_thin"): 4328,  # fp32, blocks of 64 rows, of rank 64
    ("80", "_wide"): 208,
    ("90", "_outer"): 8,  # fp32
    ("90", "_sweep"): 40,  # with c, of rank 64
    ("90", "_wide"): 152,  # blocks of 64 rows, of rank 64, with c and v
    ("90", "_norm"): 584, ("90", "_norms"): 584,  # fp32, ranks above 64
    ("100", "_wide"): 16,
    ("100", "_norm"): 584, ("100", "_norms"): 584,
}  # fmt: skip
"""Bytes that a kernel spills at most, by architecture, where it does: found by compiling every call for sm_90 and
sm_100, and about half of them for sm_80, with Triton 3.9."""


def launches(
    call: Callable[[], None], there: choose.Target, monkeypatch: pytest.MonkeyPatch, mode: choose.Mode = "triton"
) -> list[Launch]:
    monkeypatch.setattr(choose, "INTERPRETED", True)  # any device counts as one with kernels …
    monkeypatch.setattr(choose, "target", lambda device: there)  # … namely this
    with recorded() as found, use(mode):
        call()
    return found


def spills(kernel: Any, folder: Path) -> int:
    """Bytes of stack, or spilled registers: what a kernel's registers did not hold."""
    if "cubin" in kernel.asm:
        path = folder / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        out = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
        found = re.search(r"STACK:(\d+).*LOCAL:(\d+)", out)
    else:
        code = kernel.asm["amdgcn"]
        found = re.search(r"private_segment_fixed_size: (\d+)[\s\S]*vgpr_spill_count: *(\d+)", code)
    assert found, "the compiler did not tell"
    return sum(map(int, found.groups()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join([case[0].arch, case[1], str(case[2]), case[3]]))
def test_compiles(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there, call, dtype, mode = case
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    found = launches(lambda: CALLS[call](dtype), there, monkeypatch, mode)
    assert found or mode == "auto"
    for key, launch in {launch.key(): launch for launch in found}.items():
        kernel, name = launch.compile(there), launch.kernel.__name__
        assert kernel.metadata.shared <= there.shared, key
        assert spills(kernel, tmp_path) <= SPILLS.get((there.arch, name), 0), key
        if name == "_gemm" and launch.args[0].dtype is BF16:  # the matrix units of each architecture
            unit = {"80": "mma.sync", "90": "wgmma", "100": "tcgen05", "gfx942": "v_mfma"}[there.arch]
            assert unit in kernel.asm["ptx" if there.kind == "cuda" else "amdgcn"], key


def keys(monkeypatch: pytest.MonkeyPatch, *calls: Callable[[], None]) -> list[set[str]]:
    found = [{launch.key() for launch in launches(call, TARGETS[1], monkeypatch)} for call in calls]
    assert all(found)
    return found


@pytest.mark.parametrize("c", [False, True])
def test_run_time_values_compile_nothing(c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale, dropout rate, seed, the rows of a batch, and the rank within one tile, but for its own alignment."""
    first, *others = keys(
        monkeypatch,
        lambda: linear(c=c, dropout=0.05),
        lambda: linear(c=c, dropout=0.5, scale=1.0, seed=2**40),
        lambda: linear(c=c, dropout=0.05, m=1023),
    )
    for other in others:
        assert other == first
    one, two = keys(monkeypatch, lambda: linear(c=c, dropout=0.05, r=9), lambda: linear(c=c, dropout=0.05, r=13))
    assert one == two


def test_mixed_batches_compile_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and adapters, at one number of planes; and the rank within one tile, but for its own alignment. (Blocks have
    1, 16, 32 or 64 rows, by the rows of an adapter.)"""
    for r, same in ((16, (16,)), (9, (9, 13))):
        first, *others = keys(
            monkeypatch,
            lambda r=r: mixed(t=64, slots=64, r=r),
            *[lambda t=t, k=k, r=r: mixed(t=t, slots=k, r=r) for t, k in ((62, 70), (48, 33)) for r in same],
        )
        for other in others:
            assert other == first


def test_a_new_shape_does_compile() -> None:
    """That equal keys above mean something."""
    with pytest.MonkeyPatch.context() as patch:
        one, two, three = keys(patch, linear, lambda: linear(k=1023), lambda: linear(dtype=FP32))
    assert one != two != three
