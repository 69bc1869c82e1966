"""The tensors of a file, read as untrusted input: names, shapes and dtypes first, values when they are asked for."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What an adapter's tensors may be, by safetensors' names."""


class Tensors:
    """The tensors of a file: names, shapes and dtypes at once, each value when it is asked for.

    meta: name → the tensor without its values. names: name → its name in the file, for errors.
    """

    def __init__(
        self,
        where: Path,
        meta: Mapping[str, Tensor],
        read: Mapping[str, Callable[[], Tensor]],
        names: Mapping[str, str] | None = None,
        metadata: Mapping[str, str] | None = None,
    ):
        self.where, self.meta, self.sources = where, dict(meta), dict(read)
        self.names = {k: k for k in meta} if names is None else dict(names)
        self.metadata = dict(metadata or {})

    def renamed(self, rename: Callable[[str], str | None]) -> "Tensors":
        """The same tensors under other names; those that get None are left out. ValueError where two get one name."""
        old: dict[str, str] = {}
        for key in self.meta:
            if (new := rename(key)) is None:
                continue
            if new in old:
                raise ValueError(f"{self.where}: {self.names[old[new]]!r} and {self.names[key]!r} both become {new!r}")
            old[new] = key
        return Tensors(
            self.where,
            {new: self.meta[key] for new, key in old.items()},
            {new: self.sources[key] for new, key in old.items()},
            {new: self.names[key] for new, key in old.items()},
            self.metadata,
        )

    def replaced(self, gone: Iterable[str], key: str, value: Callable[[], Tensor], shape: Iterable[int]) -> None:
        """Put a floating tensor, made from others when it is asked for, in the place of those."""
        names = [self.names[k] for k in gone]
        for k in gone:
            del self.meta[k], self.sources[k], self.names[k]
        self.meta[key], self.sources[key] = torch.empty(tuple(shape), device="meta"), value
        self.names[key] = " and ".join(names)

    def dropped(self, key: str) -> None:
        """Take a tensor out that says nothing."""
        del self.meta[key], self.sources[key], self.names[key]

    def divided(self, key: str, parts: Mapping[str, tuple[Callable[[], Tensor], Iterable[int]]]) -> None:
        """Put several tensors, new key → (value, shape), in the place of one."""
        dtype, name = self.meta[key].dtype, self.names[key]
        self.dropped(key)
        for new, (value, shape) in parts.items():
            self.meta[new] = torch.empty(tuple(shape), dtype=dtype, device="meta")
            self.sources[new], self.names[new] = value, name

    def check(self, key: str, shape: Iterable[int], floating: bool = True) -> None:
        """ValueError unless the tensor has this shape and is a floating (or integer) one."""
        have = self.meta[key]
        if have.shape != (want := torch.Size(shape)):
            raise ValueError(
                f"{self.where}: {self.names[key]} has shape {list(have.shape)}, and the model needs {list(want)}"
            )
        if have.is_floating_point() != floating:
            kind = "floating" if floating else "integer"
            raise ValueError(f"{self.where}: {self.names[key]} is {have.dtype}; it must be {kind}")

    def tensor(self, key: str, device: torch.device | str = "cpu", *, exact: bool = False) -> Tensor:
        """A tensor on the device, copied there once; in fp32 or wider unless `exact`. ValueError for one with a NaN.

        A copy also on the CPU: a mapped tensor changes with its file, and is not aligned as torch aligns its own.
        """
        t = self.sources[key]()
        values = t.float() if t.element_size() == 1 and t.is_floating_point() else t  # fp8 has no isnan
        if t.is_floating_point() and values.isnan().any():
            count = int(values.isnan().sum())
            raise ValueError(f"{self.where}: {self.names[key]} contains {count} NaN")
        wide = torch.float32 if t.is_floating_point() and t.element_size() < 4 and not exact else t.dtype
        return t.to(device, wide, copy=True)


@contextmanager
def opened(where: Path) -> Iterator[Tensors]:
    """The tensors of a safetensors file, mapped. ValueError, naming the file, where it is none."""
    if not where.is_file():
        raise FileNotFoundError(f"{where} is missing{_shards(where)}")
    try:
        with safe_open(where, framework="pt") as file:
            meta: dict[str, Tensor] = {}
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                if (kind := str(part.get_dtype())) not in DTYPES:
                    raise ValueError(
                        f"{where}: {name} is {kind}; an adapter's tensors have one of the dtypes {', '.join(DTYPES)}"
                    )
                meta[name] = torch.empty(part.get_shape(), dtype=DTYPES[kind], device="meta")
            yield Tensors(where, meta, _mapped(where, meta), metadata=file.metadata())
    except SafetensorError as e:
        raise ValueError(f"{where}: not a valid safetensors file: {e}") from e


def _mapped(where: Path, meta: Mapping[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """What reads each tensor of a safetensors file that `safe_open` has found well formed, out of a mapping of it.

    Not `safe_open.get_tensor`: each of its calls loses 64 bytes (safetensors 0.8), which a bank that fetches adapters
    all day adds up to gigabytes.
    """
    with where.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    size = where.stat().st_size
    data = torch.from_file(str(where), shared=False, size=size, dtype=torch.uint8)
    places = {name: [start + at for at in header[name]["data_offsets"]] for name in meta if name in header}

    def read(name: str) -> Tensor:
        shape, dtype = meta[name].shape, meta[name].dtype
        first, end = places.get(name, (0, -1))
        if end - first != meta[name].nbytes or end > size:
            raise ValueError(f"{where}: it was replaced while it was read: load it again")
        part = data[first:end]
        if first % dtype.itemsize:  # which the format allows
            part = part.clone()
        return part.view(dtype).view(shape)

    return {name: partial(read, name) for name in meta}


def _shards(where: Path) -> str:
    """What there is of a file that was written in parts, and the cure."""
    parts = sorted(p.name for p in where.parent.glob(f"{where.stem}-*-of-*{where.suffix}"))
    if not parts:
        return ""
    return (
        f": it was written in {len(parts)} parts ({parts[0]}, …), and an adapter has one file: put their tensors "
        "together, safetensors.torch.save_file({k: t for part in parts for k, t in load_file(part).items()}, "
        f"{where.name!r})"
    )


def unpickled(where: Path) -> Tensors:
    """Read a file of tensors by torch.save, with `weights_only=True`, so no code runs. ValueError for other files."""
    try:
        state = torch.load(where, map_location="cpu", weights_only=True)
    except Exception as e:  # of a broken one, anything: its instructions are run as they come
        if isinstance(e, OSError) and e.filename is not None:
            raise
        why = next(iter(str(e).splitlines()), type(e).__name__)[:200]
        raise ValueError(f"{where}: not a file that has only tensors: {why}") from e
    if not isinstance(state, dict) or not all(isinstance(k, str) for k in state):
        raise ValueError(f"{where}: it has a {type(state).__name__}; an adapter is a dict of name → tensor")
    for name, t in state.items():
        if not isinstance(t, Tensor) or t.dtype not in DTYPES.values() or t.layout != torch.strided:
            raise ValueError(f"{where}: {name} is not a plain tensor of {', '.join(DTYPES)}")
    meta = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in state.items()}
    return Tensors(where, meta, {name: partial(state.__getitem__, name) for name in state})
