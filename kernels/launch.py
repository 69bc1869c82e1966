"""Launching a kernel: the one place through which all do, so that tests can see what would be compiled."""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch

Grid = tuple[int, ...]


def run(kernel: Any, grid: Grid, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """args: a tensor first, on whose device the kernel runs, whichever is current. meta: constexpr arguments by name,
    and num_warps and num_stages."""
    device = args[0].get_device()
    if device < 0:  # the interpreter, on a CPU
        kernel[grid](*args, **meta)
    elif device == torch.cuda.current_device():
        _on_device(kernel, device, grid, args, meta)
    else:
        with torch.cuda.device(device):
            _on_device(kernel, device, grid, args, meta)


class Known:
    """What is compiled of one kernel, by what it was compiled for.

    Triton's own launcher binds and specialises some 30 arguments by name in each call, which costs several times what
    the launch itself does. `key` has the same meaning: equal for two calls only if Triton compiles nothing anew.
    `exactly` is cheaper, and equal only for calls that differ in nothing but in addresses: layers of one shape.
    """

    def __init__(self, kernel: Any, args: tuple[Any, ...]):
        self.names = tuple(p.name for p in kernel.params if p.is_constexpr)
        self.special = tuple(not p.do_not_specialize for p in kernel.params if not p.is_constexpr)
        self.tensors = [i for i, v in enumerate(args) if not isinstance(v, int | float)]  # or None, here and there
        self.numbers = itemgetter(*[i for i, v in enumerate(args) if isinstance(v, int | float)])
        self.compiled: dict[Any, Any] = {}
        self.calls: dict[Any, Any] = {}

    def exactly(self, device: int, args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
        addresses, dtypes = 0, []
        for i in self.tensors:
            t = args[i]
            if t is not None:
                addresses |= t.data_ptr()
                t = t.dtype
            dtypes.append(t)
        if addresses % 16:  # which of them, `key` looks
            return None
        return device, self.numbers(args), *dtypes, *meta.values()

    def key(self, device: int, args: tuple[Any, ...], meta: dict[str, Any]) -> Any:
        key: list[Any] = [device, *meta.values()]
        for v, special in zip(args, self.special, strict=True):
            if v is None:
                key.append(None)
            elif isinstance(v, int):
                key.append((0 if not special else 1 if v == 1 else 16 if v % 16 == 0 else 0, v < 2**31))
            elif not isinstance(v, float):
                key.append((v.dtype, v.data_ptr() % 16 == 0))
        return tuple(key)


CALLS = 4096
"""So many different calls of a kernel are remembered."""

_known: dict[int, Known] = {}
"""By the kernel's id: kernels are functions of modules, launched from one place each, and live as long as these."""


def _on_device(kernel: Any, device: int, grid: Grid, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    known = _known.get(id(kernel))
    if known is None:
        known = _known[id(kernel)] = Known(kernel, args)
    exactly = known.exactly(device, args, meta)
    compiled = known.calls.get(exactly) if exactly is not None else None
    if compiled is None:
        key = known.key(device, args, meta)
        compiled = known.compiled.get(key)
        if compiled is None:
            known.compiled[key] = kernel[grid](*args, **meta)
            return
        if exactly is not None:
            if len(known.calls) >= CALLS:
                known.calls.clear()
            known.calls[exactly] = compiled
    compiled[(*grid, 1, 1)[:3]](*args, *[meta[name] for name in known.names])


_run: Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], None] = run


def launch(kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
    if all(grid):
        _run(kernel, grid, args, meta)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power(n: int, least: int = 16) -> int:
    """The next power of two from n, at least 16: what `tl.dot` takes."""
    return max(least, 1 << (n - 1).bit_length())
