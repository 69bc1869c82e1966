"""What would be compiled for a GPU, seen and compiled without one: launches recorded, then compiled ahead of time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftfn.kernels import launch as launching
from peftfn.kernels.choose import Target

TARGETS = (
    Target("cuda", "80", 108),
    Target("cuda", "90", 132),
    Target("cuda", "100", 148),
    Target("hip", "gfx942", 304),
)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]

    def source(self) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
        """(signature, constants, attributes), as Triton's own launcher would specialise these arguments."""
        signature, constants, attrs = {}, {}, {}
        values = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.meta
        for i, parameter in enumerate(self.kernel.params):
            name, v = parameter.name, values[parameter.name]
            special = not parameter.do_not_specialize
            if parameter.is_constexpr or v is None or (special and isinstance(v, int) and v == 1):
                signature[name], constants[name] = "constexpr", v
                if isinstance(v, str):  # of no effect but on Triton's own key
                    attrs[(i,)] = []
                continue
            if isinstance(v, Tensor):
                signature[name], aligned = f"*{NAMES[v.dtype]}", special
            elif isinstance(v, float):
                signature[name], aligned = "fp32", False
            else:
                signature[name], aligned = "i32" if -(2**31) <= v < 2**31 else "i64", special and v % 16 == 0
            if aligned:
                attrs[(i,)] = [["tt.divisibility", 16]]
        return signature, constants, attrs

    def key(self) -> str:
        """Equal for two launches that share one compilation."""
        return repr((self.kernel.__name__, *self.source(), sorted(self.meta.items())))

    def compile(self, there: Target) -> Any:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        gpu = GPUTarget("cuda", int(there.arch), 32) if there.kind == "cuda" else GPUTarget("hip", there.arch, 64)
        options = {k: v for k, v in self.meta.items() if k in OPTIONS}
        signature, constants, attrs = self.source()
        return triton.compile(ASTSource(self.kernel, signature, constants, attrs), target=gpu, options=options)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels are noted and not run."""
    launches: list[Launch] = []
    run, launching._run = launching._run, lambda *launch: launches.append(Launch(*launch))
    try:
        yield launches
    finally:
        launching._run = run


def compiled(there: Target, *calls: Callable[[Target], Any]) -> Iterator[tuple[str, Any]]:
    """Every different kernel that these calls launch on a target, compiled: (what it is, what came out)."""
    with recorded() as launches:
        for call in calls:
            call(there)
    for key, launch in {launch.key(): launch for launch in launches}.items():
        yield key, launch.compile(there)
