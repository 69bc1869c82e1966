"""The keys of kohya's and diffusers' files by module, then by method."""

import re
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from peftfn.formats.kohya_keys import ENDS, Key, Names, nameless
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.weights.lora import LoRA
from peftfn.model.model import Model


class Sorted:
    """A file's keys by module.

    found: module → {(method, tensor): the file's key}. called: module → its name in the file. stray: keys of no module.
    """

    def __init__(self, file: Tensors, model: Model, key_mapping: Mapping[str, str]):
        self.file, self.where, self.names = file, file.where, Names(model)
        try:
            self.mapping = {re.compile(k): v for k, v in key_mapping.items()}
        except re.error as e:
            raise ValueError(f"load: key_mapping has {e.pattern!r}, which is not a regular expression: {e}") from e
        self.found: dict[str, dict[Key, str]] = {}
        self.called: dict[str, str] = {}
        self.stray: list[str] = []
        self.sort()

    def sort(self) -> None:
        ends = sorted(ENDS, key=len, reverse=True)
        for key in list(self.file.meta):
            bare = nameless(key)
            end = next((e for e in ends if bare.endswith(f".{e}")), None)
            name = bare.removesuffix(f".{end}")
            for regex, new in self.mapping.items():
                if regex.search(name):
                    name = regex.sub(new, name)
                    break
            if end and name in self.names.fused:
                self.unfuse(key, name, end, [self.names.fused[name][i] for i in sorted(self.names.fused[name])])
                continue
            module = self.names.find(name, self.where) if end else None
            if end is None or module is None:
                self.stray.append(key)
                continue
            self.once(module, end, key, key)
            self.called[module] = name

    def once(self, module: str, end: str, key: str, name: str) -> None:
        """Note where a module's tensor is. ValueError, with the file's name of it, where it is there twice."""
        have = self.found.setdefault(module, {}).setdefault(ENDS[end], key)
        if have != key or (key != name and key in self.file.meta):
            raise ValueError(f"{self.where}: {self.file.names[have]!r} and {name!r} are the same tensor")

    def unfuse(self, key: str, name: str, end: str, modules: list[str]) -> None:
        """Give one tensor of several layers in one to each of the model's: the rows of what has the layer's, and a
        factor that all have in common as a copy."""
        cls, k = ENDS[end]
        rows = [self.names.sites[m, "weight"].shape[0] for m in modules]
        shape, source = self.file.meta[key].shape, self.file.sources[key]
        if cls not in (LoRA, None) or k == "mid":
            raise ValueError(
                f"{self.where}: {key}: {name} is {', '.join(modules)} in this model, and of these methods only LoRA "
                "and DoRA can be divided among them"
            )
        cut = k in ("b", "beta") or (k == "m" and len(shape) > 0 and shape[0] == sum(rows))
        if cut and (not shape or shape[0] != sum(rows)):
            raise ValueError(f"{self.where}: {key} has shape {list(shape)}; it must have {sum(rows)} rows: {rows}")
        starts = [sum(rows[:i]) for i in range(len(rows))]
        parts = {
            f"{module}.{end}": (partial(_rows, source, at, n), (n, *shape[1:])) if cut else (source, shape)
            for module, at, n in zip(modules, starts, rows, strict=True)
        }
        for module in modules:
            self.called[module] = name
            self.once(module, end, f"{module}.{end}", key)
        self.file.divided(key, parts)


def _rows(read: Callable[[], Tensor], start: int, count: int) -> Tensor:
    return read()[start : start + count]
