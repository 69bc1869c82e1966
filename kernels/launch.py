"""Launching a kernel: the one place through which all do, so that tests can see what would be compiled."""

from collections.abc import Callable
from typing import Any

import torch

Grid = tuple[int, ...]


def run(kernel: Any, grid: Grid, args: tuple[Any, ...], meta: dict[str, Any]) -> None:
    """args: a tensor first, on whose device the kernel runs, whichever is current. meta: constexpr arguments by name,
    and num_warps and num_stages."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **meta)


_run: Callable[[Any, Grid, tuple[Any, ...], dict[str, Any]], None] = run


def launch(kernel: Any, grid: Grid, *args: Any, **meta: Any) -> None:
    if all(grid):
        _run(kernel, grid, args, meta)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power(n: int, least: int = 16) -> int:
    """The next power of two from n, at least 16: what `tl.dot` takes."""
    return max(least, 1 << (n - 1).bit_length())
