"""Kernels compile for every architecture, within its shared memory and without spills, in the configurations of `OF`
(docs/kernels.md says which are left out); and run-time values stay run-time values. Needs no GPU: the public ops run on
meta tensors, and what they would launch is compiled."""

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
BF16, FP32 = torch.bfloat16, torch.float32


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
    assert y is not None
    y.backward(torch.empty_like(y))


def norms() -> None:
    w, a, b = meta(4096, 4096, dtype=BF16), meta(16, 4096), meta(4096, 16)
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


CALLS: dict[str, Callable[[], None]] = {
    "DoRA with dropout": lambda: linear(c=True, bias=True, dropout=0.05),
    "LoRA": linear,
    "norms": norms,
    "mixed": mixed,
    "mixed, no gradient": lambda: mixed(train=False, embed=True),
    "LoRA of few rows": lambda: linear(m=32),
    "LoRA with a bias": lambda: linear(bias=True),
    "DoRA of rank 64": lambda: linear(r=64, c=True),
    "LoRA in fp32": lambda: linear(dtype=FP32),
    "mixed of long segments and high ranks": lambda: mixed(t=4096, slots=4, r=512),
    "mixed in fp32": lambda: mixed(dtype=FP32, train=False),
}
SOME = ["DoRA with dropout", "norms", "mixed", "mixed, no gradient"]
OF = {"80": SOME, "90": list(CALLS), "100": [*SOME, "LoRA"], "gfx942": SOME}
"""sm_90 compiles all of these calls, the others a selection: the whole takes minutes."""


def launches(
    call: Callable[[], None], there: choose.Target, monkeypatch: pytest.MonkeyPatch, mode: choose.Mode = "triton"
) -> list[Launch]:
    monkeypatch.setattr(choose, "INTERPRETED", True)  # any device counts as one with kernels …
    monkeypatch.setattr(choose, "target", lambda device: there)  # … namely this
    with recorded() as found, use(mode):
        call()
    assert found
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


@pytest.mark.parametrize(
    ("there", "call"),
    [pytest.param(t, c, id=f"{t.arch}-{c}") for t in TARGETS for c in OF[t.arch]],
)
def test_compiles(there: choose.Target, call: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    found = launches(CALLS[call], there, monkeypatch)
    for key, launch in {launch.key(): launch for launch in found}.items():
        kernel = launch.compile(there)
        assert kernel.metadata.shared <= there.shared, key
        assert spills(kernel, tmp_path) == 0, key
        if launch.kernel.__name__ == "_gemm" and launch.args[0].dtype is BF16:  # the matrix units of each architecture
            unit = {"80": "mma.sync", "90": "wgmma", "100": "tcgen05", "gfx942": "v_mfma"}[there.arch]
            assert unit in kernel.asm["ptx" if there.kind == "cuda" else "amdgcn"], key


def keys(monkeypatch: pytest.MonkeyPatch, *calls: Callable[[], None]) -> list[set[str]]:
    return [{launch.key() for launch in launches(call, TARGETS[1], monkeypatch)} for call in calls]


@pytest.mark.parametrize("c", [False, True])
def test_run_time_values_compile_nothing(c: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale, dropout rate, seed, the rank within one tile of ranks, and the rows of a batch."""
    first, *others = keys(
        monkeypatch,
        lambda: linear(c=c, dropout=0.05),
        lambda: linear(c=c, dropout=0.5, scale=1.0, seed=2**40),
        lambda: linear(c=c, dropout=0.05, r=1),
        lambda: linear(c=c, dropout=0.05, r=13),
        lambda: linear(c=c, dropout=0.05, m=1023),
    )
    for other in others:
        assert other == first


@pytest.mark.parametrize("packed", [False, True])
def test_mixed_batches_compile_nothing_anew(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows, adapters, and ranks within one tile. (Blocks have 16, 32 or 64 rows, by rows per adapter.)"""
    first, *others = keys(
        monkeypatch,
        lambda: mixed(packed=packed),
        lambda: mixed(packed=packed, t=1, slots=3),
        lambda: mixed(packed=packed, t=37, slots=17, r=9),
        lambda: mixed(packed=packed, slots=3, r=1),
    )
    for other in others:
        assert other == first


def test_a_new_shape_does_compile() -> None:
    """That equal keys above mean something."""
    with pytest.MonkeyPatch.context() as patch:
        one, two, three = keys(patch, linear, lambda: linear(k=1023), lambda: linear(dtype=FP32))
    assert one != two != three
