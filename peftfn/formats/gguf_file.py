"""Reading a GGUF file as untrusted input: its keys and values, and its tensors. Numbers of a file are checked against
its size before anything is made of them."""

import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.formats.tensor_files import Tensors

MAGIC, VERSIONS = b"GGUF", (2, 3)
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
MOST = 1 << 20
"""Keys, tensors, or items of a list: the largest real adapters have some thousand tensors."""


class _Reader:
    """Little-endian values of a buffer, one after the other. ValueError beyond its end."""

    def __init__(self, data: Any):
        self.data, self.at = data, 0

    def bytes(self, n: int) -> bytes:
        if n < 0 or self.at + n > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, within a value")
        self.at += n
        return bytes(self.data[self.at - n : self.at])

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))[0]

    def count(self) -> int:
        n: int = self.number("Q")
        if n > min(MOST, len(self.data)):
            raise ValueError(f"it says {n} of something, in {len(self.data)} bytes")
        return n

    def string(self) -> str:
        return self.bytes(self.number("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner = self.number("I")
            if inner == _ARRAY:
                raise ValueError("a value is a list of lists")
            return [self.value(inner) for _ in range(self.count())]
        if kind not in _NUMBERS:
            raise ValueError(f"a value has the type {kind}, which GGUF does not have")
        return self.number(_NUMBERS[kind])


@contextmanager
def opened(where: Path) -> Iterator[tuple[Mapping[str, Any], Tensors]]:
    """(the values, the tensors) of a file, mapped. ValueError, naming the file, where it is none."""
    with where.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as e:
            raise ValueError(f"{where}: not a GGUF file: it is empty") from e
        with data:
            try:
                values, meta, places = _read(_Reader(data))
            except (ValueError, struct.error) as e:
                raise ValueError(f"{where}: not a valid GGUF file: {e}") from e
            read = {name: partial(_tensor, data, *places[name], t) for name, t in meta.items()}
            yield values, Tensors(where, meta, read)


def _read(r: _Reader) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, tuple[int, int]]]:
    """(values, name → the tensor without its values, name → (first byte, bytes))."""
    if r.bytes(4) != MAGIC or r.number("I") not in VERSIONS:
        raise ValueError(f"it does not start with GGUF and a version of {VERSIONS}, in little-endian order")
    tensors, keys = r.count(), r.count()
    values: dict[str, Any] = {}
    for _ in range(keys):
        if (key := r.string()) in values:
            raise ValueError(f"the key {key[:80]!r} occurs twice")
        values[key] = r.value(r.number("I"))
    meta, starts = dict[str, Tensor](), dict[str, int]()
    for _ in range(tensors):
        name, dims = r.string(), r.number("I")
        if name in meta or dims > 4:
            raise ValueError(f"the tensor {name[:80]!r} occurs twice, or has {dims} dimensions")
        shape = [r.number("Q") for _ in range(dims)][::-1]
        kind, starts[name] = r.number("I"), r.number("Q")
        if kind not in _DTYPES:
            raise ValueError(f"{name[:80]} has the type {kind}; an adapter's tensors are f32, f16, bf16 or f64")
        if prod(shape) > len(r.data):
            raise ValueError(f"{name[:80]} has the shape {shape}, in {len(r.data)} bytes")
        meta[name] = torch.empty(shape, dtype=_DTYPES[kind], device="meta")
    step = values.get("general.alignment", 32)
    if type(step) is not int or not 1 <= step <= MOST:
        raise ValueError(f"general.alignment is {step!r}")
    first = -(-r.at // step) * step
    places = {name: (first + start, meta[name].nbytes) for name, start in starts.items()}
    for name, (start, size) in places.items():
        if start + size > len(r.data):
            raise ValueError(f"{name[:80]} ends at byte {start + size}, and the file at {len(r.data)}")
    return values, meta, places


def _tensor(data: Any, start: int, size: int, like: Tensor) -> Tensor:
    """A copy: the map is closed when the file is read."""
    raw = bytearray(data[start : start + size])
    return (
        torch.frombuffer(raw, dtype=like.dtype).reshape(like.shape) if size else torch.empty(like.shape).to(like.dtype)
    )
