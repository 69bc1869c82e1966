"""Adapter files: others' are read as untrusted input, ours are written so that none is ever half there."""

import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peftfn.core.plan import Adapter, Plan
from peftfn.model.model import Model
from peftfn.net.net import Adapted
from peftfn.tensors.sharded import is_sharded
from peftfn.tensors.tree import leaves, mapped

LIMIT = 1 << 24
"""Bytes of a configuration file; the largest real ones (a pattern for every layer) are far smaller."""
MOST = 1000
"""Steps of an iteration (terms of a series, layers of a small net) that a file may ask for."""
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


@dataclass(frozen=True)
class Loaded:
    """What `load` returns. It unpacks into two: `net, adapter = load(…)`.

    Args:
        net: the net, bound to the model.
        adapter: an adapter of it.
        missing: with strict=False, keys that the adapter needs and the file lacks; these tensors have the values of a
            fresh adapter.
        unexpected: with strict=False, keys of the file that have no place in the model; these tensors are not used.
        extra: what the file says that is not about the method, under PEFT's keys: `task_type`,
            `base_model_name_or_path`, the `alora_invocation_tokens` of an activated LoRA, … In the native and PEFT's
            format, `save(…, extra=loaded.extra)` writes them.
        mismatched: with strict=False, key → (shape in the file, shape in the model) of tensors that do not fit; these
            tensors are not used, and are in `missing` where the adapter needs them.
        buffers: with buffers=True, the file's buffers that differ from the model's, by the model's names. The adapter
            was trained with them: `model.load_state_dict(loaded.buffers, strict=False)`.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pf.save("adapter", net, net.init())
        loaded = pf.load("adapter", net.model, strict=False)
        assert loaded.missing == loaded.unexpected == ()
    """

    net: Adapted
    adapter: Adapter
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    mismatched: Mapping[str, tuple[torch.Size, torch.Size]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.net, self.adapter))


@dataclass(frozen=True)
class Options:
    """How a file is read: what `load` says of each of these. A format refuses all but what has a meaning for it."""

    strict: bool = True
    key_mapping: Mapping[str, str] | None = None
    pickled: bool = False
    experts: Literal["peft", "unsloth"] = "peft"
    buffers: bool = False
    ignore: tuple[str, ...] = ()
    stored: bool = False
    base: Literal["any", "same"] | None = None

    def __post_init__(self) -> None:
        if self.experts not in ("peft", "unsloth"):
            raise ValueError(f"load: experts is {self.experts!r}; give 'peft' or 'unsloth'")
        if self.base not in ("any", "same", None):
            raise ValueError(f"load: base is {self.base!r}; give 'any' or 'same'")

    def only(self, where: Path, *taken: Literal["key_mapping", "experts", "ignore", "stored", "base"]) -> None:
        """ValueError for an option that would have no effect on what is read at `where`: any but those that its reader
        takes, and `strict`, `pickled` and `buffers`, which allow something."""
        for option in fields(self):
            said = getattr(self, option.name) != option.default
            if said and option.name not in ("strict", "pickled", "buffers", *taken):
                name = {"stored": "dtype='file'"}.get(option.name, option.name)
                raise ValueError(f"load: {name} has no effect on what is read at {where}: leave it out")


def read_json(path: Path) -> Any:
    """The value in a JSON file. ValueError for a large file, one that is not JSON, and a key that is there twice."""
    if (size := path.stat().st_size) > LIMIT:
        raise ValueError(f"{path}: {size} bytes; a configuration has at most {LIMIT}")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for k, v in pairs:
            if k in seen:
                raise ValueError(f"the key {k!r} occurs twice")
            seen[k] = v
        return seen

    try:
        return json.loads(path.read_bytes(), object_pairs_hook=once, parse_float=_number, parse_int=_number)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: not valid JSON: {e}") from e


def _number(text: str) -> float:
    """A number of a JSON text. ValueError for one that no tensor could hold."""
    value = float(text)
    if abs(value) > torch.finfo(torch.float32).max:
        raise ValueError(f"{text[:20]} is too large for fp32")
    return int(text) if text.lstrip("-").isdigit() else value


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


def on_devices(loaded: Loaded) -> Loaded:
    """The leaves of modules on the devices of their modules. Those of weights are read onto theirs."""
    net, adapter = loaded.net, dict(loaded.adapter)
    for name, place in Model.of(net.model).at(net.plan.places).items() if net.plan.places else ():
        adapter[name] = mapped(adapter[name], partial(Tensor.to, device=place.device))
    return replace(loaded, adapter=adapter)


def as_stored(loaded: Loaded, file: Tensors) -> Loaded:
    """The adapter in the dtype that the file's tensors have. ValueError where they have several."""
    kinds = {t.dtype for t in file.meta.values() if t.is_floating_point() and t.dim()}  # an alpha is a number
    if len(kinds) != 1 or any(k.itemsize < 2 for k in kinds):
        names = ", ".join(sorted(str(k).removeprefix("torch.") for k in kinds))
        raise ValueError(
            f"{file.where}: its tensors are {names}, so dtype='file' says no dtype to compute in: give one"
        )
    (dtype,) = kinds
    return replace(loaded, adapter=mapped(loaded.adapter, lambda t: t.to(dtype)))


def mismatch(where: Path, missing: Iterable[str], unexpected: Iterable[str], more: str = "") -> ValueError:
    """The error for tensors that a file lacks or that have no place."""

    def some(keys: list[str]) -> str:
        return ", ".join(map(repr, keys[:4])) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")

    lacks, odd = sorted(missing), sorted(unexpected)
    parts = [f"lacks {len(lacks)} tensors: {some(lacks)}"] if lacks else []
    parts += [f"{len(odd)} tensors have no place in this model: {some(odd)}{more}"] if odd else []
    return ValueError(f"{where}: {'; '.join(parts)}. load(…, strict=False) leaves such tensors out and lists them.")


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


def write(path: Path, content: Mapping[str, Tensor] | str, metadata: Mapping[str, str] | None = None) -> None:
    """Write a file (tensors: as safetensors). It replaces the old one only when it is complete."""
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            tensors = {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in content.items()}
            save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def refuse_sharded(plan: Plan, adapter: Mapping[str, Any]) -> None:
    """ValueError unless every tensor of the adapter and of the plan's constants is whole, as a file holds them."""
    for name, tree in adapter.items():
        if any(map(is_sharded, leaves(tree))):
            raise ValueError(
                f"{name}: its leaf is sharded, and a file holds whole tensors. Call a = peftfn.gather(adapter, rank=0) "
                "on every rank, and save a on rank 0"
            )
    for name, e in plan.items():
        if any(map(is_sharded, e.frozen.values())):
            raise ValueError(
                f"{name}: its constants are sharded like the model, and a file holds whole tensors. Save with a net "
                "of the model without sharding, peftfn.adapt(model, rules)"
            )
