"""`peftfn merge`: an adapter folded into a folder of safetensors, one tensor at a time, the model never built."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.cli.base import INDEX, Base, guard, load_base, opened_shard
from peftfn.cli.progress import progress
from peftfn.core import functions
from peftfn.core.plan import Entry
from peftfn.formats import hub, load
from peftfn.formats.files import read_json
from peftfn.model.model import Model
from peftfn.net.net import Adapted

_WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx"})


def merge(base: Path, adapter: str | Path, out: Path, *, any_base: bool = False) -> dict[str, list[str]]:
    """Write to the folder `out` the model of the folder `base` with the adapter folded in.

    An adapted tensor is computed in fp32 or wider and rounded once to its dtype; all others are copied bit for bit, as
    are the index and the other files at the top of the folder (other formats' weights are not). Besides the adapter,
    one tensor is in memory at a time. `out` appears when all of it is written. Tied weights that the adapter makes
    different become two tensors, and config.json says `tie_word_embeddings: false`.

    Args:
        any_base: whether the base may have other values than the one that the adapter was made on.

    Returns:
        {"adapted": names of the changed tensors, "untied": names of the new ones, "files": files written}

    Raises:
        FileExistsError: `out` is there, and no empty folder.
        FileNotFoundError: no base or no adapter there.
        ValueError: the adapter does not fit, the base lacks a tensor of it, or it cannot be merged: it depends on the
            input, adds a bias to a layer without one, or the result is not finite. `out` does not exist then.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists; name a new folder")
    if not base.is_dir():
        raise FileNotFoundError(f"{base} is not a folder")
    adapter = hub.find(adapter)
    model = load_base(base)
    if model.hollow:
        raise FileNotFoundError(f"{base} holds no *.safetensors to merge into")
    guard(model, adapter)
    net, values = load(adapter, model.model, base="any" if any_base else None)
    if net.model is not model.model:
        raise ValueError(
            f"{adapter}: it is for a model with repeated layers, and the base's files have each layer once"
        )
    job = _Merge(model, net, values)
    index = next((p for p in base.iterdir() if p.name.endswith(INDEX)), None)
    files = sorted(set(model.files.values()))
    with _folder(out) as folder, progress("merging", sum(p.stat().st_size for p in files)) as done:
        for file in files:
            job.write(file, folder / file.name, done)
        for path in sorted(base.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHTS and path != index:
                shutil.copyfile(path, folder / path.name)
        if index is not None:
            _index(index, folder / index.name, job.untied)
        if job.untied:
            _untie(folder, job.untied)
        written = sorted(p.name for p in folder.iterdir())
    return {"adapted": sorted(job.adapted), "untied": sorted(job.untied), "files": written}


class _Merge:
    """What becomes of each tensor in the files."""

    def __init__(self, base: Base, net: Adapted, adapter: Mapping[str, Any]):
        self.base, self.plan, self.adapter = base, net.plan, adapter
        known = Model.of(base.model)
        self.weights = {n: p.detach() for n, p in known.parameters.items()}
        self.slots: dict[str, list[str]] = {}  # tensor in the files → the slots that hold it
        self.adapted: set[str] = set()
        self.untied: dict[str, tuple[str, str]] = {}  # new tensor → (its slot, the file it is in)
        for site in known.sites.values():
            for name in (site.name, *site.aliases):
                if name in base.keys and site.name not in (here := self.slots.setdefault(base.keys[name], [])):
                    here.append(site.name)
        for name, entry in self.plan.items():
            self.check(name, entry)

    def check(self, name: str, entry: Entry) -> None:
        """ValueError unless the site can be merged into the files."""
        entry.check_merge()
        method, bias = entry.method, entry.site.bias
        if entry.site.quantised or not method.mergeable:
            why = "its weight is quantised" if entry.site.quantised else f"{method} depends on the input"
            raise ValueError(f"{name}: {why}, so there is no tensor to merge into")
        if entry.adds_bias and bias not in self.weights:
            raise ValueError(f"{name}: {method} adds a bias, and this layer has none to merge it into")
        for slot in (name, *((bias,) if bias in self.plan.owners and bias in self.weights else ())):
            if slot not in self.base.keys:
                raise ValueError(f"{slot}: the adapter changes it, and no file of the base has it")

    def value(self, slot: str) -> Tensor:
        """What the slot holds after the merge."""
        old = self.weights[slot]
        # clones are aligned as tensors in memory are, so that the sums round alike
        held = {n: self.weights[n].clone() for n in self.plan.slots if n in self.weights and self._meets(n, slot)}
        new = functions.value(self.plan, {slot: old} | held, self.adapter, slot)
        if new is not old and not new.isfinite().all():
            raise ValueError(
                f"{slot}: the merged tensor has {int((~new.isfinite()).sum())} values that are not finite; so has the "
                "adapter or the base"
            )
        return new

    def _meets(self, name: str, slot: str) -> bool:
        """Whether the value of `slot` depends on the parameter `name`."""
        return name in (slot, self.plan.owners.get(slot))

    def change(self, key: str, file: str) -> dict[str, Callable[[], Tensor]]:
        """{name: its value} of what stands in the place of a tensor in the files."""
        slots = self.slots.get(key, [])
        if not any(s in self.plan.slots for s in slots):
            return {}
        self.adapted.add(key)
        owner = next((s for s in slots if s == key or s.endswith(f".{key}") or key.endswith(f".{s}")), slots[0])
        out: dict[str, Callable[[], Tensor]] = {key: partial(self.value, owner)}
        for slot in slots:
            if slot == owner or torch.equal(self.value(slot), self.value(owner)):
                continue
            new = slot.removeprefix(owner.removesuffix(key)) if owner.endswith(f".{key}") else slot
            if new in self.base.files:
                raise ValueError(f"{slot}: its merged name would be {new}, which is another tensor of the base")
            self.untied[new] = slot, file
            out[new] = partial(self.value, slot)
        return out

    def write(self, source: Path, target: Path, done: Callable[[int], None]) -> None:
        """A file with its tensors, merged, in their order, and its metadata; tensor by tensor."""
        with opened_shard(source) as file:
            values: dict[str, Callable[[], Tensor]] = {}
            header: dict[str, Any] = {"__metadata__": file.metadata()} if file.metadata() else {}
            end = 0
            for key in file.keys():  # noqa: SIM118 - no mapping
                mine = self.change(key, source.name) or {key: partial(file.get_tensor, key)}
                part, size = file.get_slice(key), file.get_tensor(key).nbytes
                for name in mine:
                    place = {"shape": part.get_shape(), "data_offsets": [end, end + size]}
                    header[name] = {"dtype": part.get_dtype(), **place}
                    end += size
                values |= mine
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            with target.open("wb") as out:
                out.write(len(text).to_bytes(8, "little") + text)
                out.truncate(out.tell() + end)
                out.flush()
                os.fsync(out.fileno())
            begin = 8 + len(text)
            mapped = torch.from_file(str(target), shared=True, size=begin + end, dtype=torch.uint8)
            for name, value in values.items():
                a, b = header[name]["data_offsets"]
                mapped[begin + a : begin + b] = value().contiguous().reshape(-1).view(torch.uint8)
                done(b - a)
            del mapped
            with target.open("rb+") as out:
                os.fsync(out.fileno())


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A new folder that gets its name when everything went well, and is gone otherwise."""
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _index(source: Path, target: Path, untied: Mapping[str, tuple[str, str]]) -> None:
    if not untied:
        shutil.copyfile(source, target)
        return
    index = read_json(source)
    index["weight_map"] |= {name: file for name, (_, file) in untied.items()}
    for name, (_, file) in untied.items():
        with opened_shard(target.parent / file) as shard:
            if isinstance(size := (index.get("metadata") or {}).get("total_size"), int):
                index["metadata"]["total_size"] = size + shard.get_tensor(name).nbytes
    target.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _untie(folder: Path, untied: Mapping[str, tuple[str, str]]) -> None:
    """Say in config.json that the weights are no longer tied. ValueError where the model ties them all the same."""
    path = folder / "config.json"
    config = read_json(path)
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        if part is config or "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    now = load_base(folder)
    tied = {n for s in Model.of(now.model).sites.values() if s.tied for n in (s.name, *s.aliases)}
    for name, (slot, _) in untied.items():
        if now.keys.get(slot) != name or slot in tied:
            raise ValueError(
                f"{slot}: this model always ties it with another weight, and the adapter makes the two different; use "
                "the adapter without merging it"
            )
