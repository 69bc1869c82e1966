"""PEFT's names of tensors in a file, and their shapes at each kind of layer."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.method import Leaf, Method
from peftfn.core.peft import Peft
from peftfn.formats.peft_config import listed
from peftfn.model.model import Model
from peftfn.model.site import Site

PREFIX, BASE, TOKENS = "base_model.model.", "base_layer", "token_adapter"
_EMBEDDING = re.compile(r"^(lora|hira)_([AB])(\.weight)?$|^(oft)_(R\.weight)$")
_KERNEL = frozenset({"lora_A.weight", "hira_A"})  # [r, in, *kernel] at a convolution
_POINT = frozenset({"lora_B.weight", "hira_B"})  # [out, r, 1, …] at a convolution
_CHANNEL = frozenset({"ia3_l", "lora_magnitude_vector"})  # [1, n, 1, …] at a convolution


@dataclass(frozen=True)
class Place:
    """A site as PEFT writes it: keys are `base_model.model.<path>.<key>`."""

    site: Site
    path: str  # with `base_layer` where PEFT wraps a layer twice
    module: str  # the model's name of it
    called: str  # the file's, which the configuration's patterns and names are about
    twice: bool = False  # an attention's out-projection: PEFT 0.21.2 adds its B A twice, so B is there half of ours

    def key(self, key: str) -> str:
        """The method's key at this kind of layer."""
        if self.site.kind == "embedding" and (m := _EMBEDDING.match(key)):
            return f"{m[1]}_embedding_{m[2]}" if m[1] else f"{m[4]}_embedding_{m[5]}"
        return key

    def full(self, key: str) -> str:
        return f"{PREFIX}{self.path}.{self.key(key)}"

    def write(self, key: str, t: Tensor) -> Tensor:
        """t in the shape that PEFT's layer has it in."""
        t = t / 2 if self.twice and key == "lora_B.weight" else t
        site, point = self.site, (1,) * (len(self.site.shape) - 2)
        if site.stacked:  # [e, r, in] → [e·r, in] and [e, out, r] → [out, r·e], expert fastest
            return t.flatten(0, 1) if key == "lora_A.weight" else t.permute(1, 2, 0).flatten(1)
        if site.kind == "conv" and key in _KERNEL:
            return t.reshape(-1, *site.shape[1:])
        if site.kind == "conv" and key in _POINT:
            return t.reshape(*t.shape, *point)
        if site.kind == "conv" and key in _CHANNEL:
            if t.shape[0] == 1 and (k := site.shape[2:].numel()) > 1 and t.numel() == site.shape[1] * k:
                t = self.channels(t.reshape(-1, k))
            return t.reshape(1, t.numel(), *point)
        if site.kind == "conv" and key == "boft_s":
            return t.reshape(1, -1)
        return t

    def channels(self, t: Tensor) -> Tensor:
        """One number of each row [channels, window]: PEFT scales a convolution's input channels, we every column."""
        if not t.is_meta and not torch.equal(t, t[:, :1].expand_as(t)):
            raise ValueError(
                f"{self.site.name}: PEFT scales whole input channels, and here the window's columns differ"
            )
        return t[:, 0]

    def read(self, key: str, t: Tensor, shape: torch.Size) -> Tensor:
        """Back from the file, in the shape of our leaf."""
        if self.site.stacked and key != "lora_A.weight":
            return t.reshape(len(t), -1, self.site.shape[0]).permute(2, 0, 1).contiguous()
        if self.site.kind == "conv" and key == "ia3_l" and t.numel() < shape.numel():
            return t.flatten().repeat_interleave(shape.numel() // t.numel()).reshape(shape)
        return (t * 2 if self.twice and key == "lora_B.weight" else t).reshape(shape)


class PeftNames:
    """A model, and what the names of its parts mean to PEFT."""

    def __init__(self, read: Model):
        self.read, self.model = read, read.root
        self.sites, self.names = read.named, list(read.sites)  # by every name; the first of each
        self.modules, self.buffers, self.weights = read.distinct, read.buffers, read.weights
        self.called = {m: m for m in self.modules if m}  # module → its name in the file, where the file's model had it

    def whole_site(self, key: str) -> Site | None:
        """The site whose whole value is under this key, `base_layer`s left out."""
        path, _, attr = key.rpartition(".")
        return self.sites.get(key) or self.sites.get(f"{self.plain(path)[0]}.{attr}")

    def owner(self, module: str) -> str:
        """The module PEFT targets: for an attention's out-projection, the attention."""
        return module.rpartition(".")[0] if self.in_attention(module) else module

    def plain(self, path: str) -> tuple[str, int]:
        """(the path without the layers that PEFT wraps around one, how many `base_layer`s there were)."""
        if path in self.modules:
            return path, 0
        return without_wrappers(path), path.split(".").count(BASE)

    def own(self, module: str) -> list[tuple[str, nn.Parameter]]:
        """The parameters of a module itself."""
        return list(self.modules[module].named_parameters(recurse=False))

    def direct(self, module: str, targets: Iterable[str]) -> list[str]:
        """The parameters of a module that `target_parameters` names, in the order PEFT wraps them."""
        if (name := self.called.get(module)) is None:
            return []
        return [f"{module}.{n}" for n, _ in self.own(module) if any(f".{name}.{n}".endswith(f".{t}") for t in targets)]

    def place(self, path: str, config: Mapping[str, Any], method: Iterable[type[Method]]) -> Place | None:
        """Where PEFT's tensors under `path` belong."""
        module, depth = self.plain(path)
        if module not in self.modules:
            return None
        params = self.direct(module, listed(config.get("target_parameters")))
        if params:
            name = params[len(params) - 1 - depth] if depth < len(params) else ""
            called = f"{self.called[module]}.{name.rpartition('.')[2]}"
            return Place(self.sites[name], path, name, called) if name in self.sites else None
        for attr in ("weight", "in_proj_weight", "bias"):
            site = self.sites.get(f"{module}.{attr}" if module else attr)
            if site and any(site.kind in m.kinds for m in method):
                return Place(site, path, module, self.called.get(module, module), self.in_attention(module))
        return None

    def in_attention(self, module: str) -> bool:
        """Whether the module is an attention's out-projection."""
        return isinstance(self.modules.get(module.rpartition(".")[0]), nn.MultiheadAttention)

    def written(self, site: Site, parameters: Iterable[str]) -> Place:
        """Where PEFT looks for the tensors of a site; parameters: the sites that only `target_parameters` can name."""
        module, _, attr = site.name.rpartition(".")
        mine = [n for n, _ in self.modules[module].named_parameters(recurse=False) if f"{module}.{n}" in parameters]
        if mine:
            return Place(site, f"{module}{f'.{BASE}' * (len(mine) - 1 - mine.index(attr))}", site.name, site.name)
        parent, _, last = module.rpartition(".")
        if self.in_attention(module):
            return Place(site, ".".join(p for p in (parent, BASE, last) if p), module, module, twice=True)
        return Place(site, module, module, module)


def ties(model: nn.Module) -> bool:
    """Whether a transformers model says that its head is its embedding: PEFT then trains tokens of both as one."""
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def without_wrappers(path: str) -> str:
    """The path without what PEFT puts around a layer."""
    return ".".join(p for p in path.split(".") if p not in (BASE, TOKENS))


def clean(key: str, parameter: str = "") -> str:
    """A key behind `base_model.model.`; without `parameter` too (LN-Tuning's copies)."""
    key = key.removeprefix(PREFIX)
    return key.replace(f".{parameter}.", ".") if parameter else key


def split(key: str, suffixes: Iterable[str]) -> tuple[str, str] | None:
    """(path, method's key) of a file's key."""
    for s in suffixes:
        if key == s or key.endswith(f".{s}"):
            return key[: len(key) - len(s)].removesuffix("."), s
    return None


def described(method: Method) -> Peft:
    """How PEFT writes the method, which is one that PEFT has."""
    assert method.peft is not None
    return method.peft


def tensors(place: Place, method: Method, p: Leaf) -> Leaf:
    """{PEFT's key: tensor in PEFT's shape} of a leaf and its constants."""
    return {place.key(k): place.write(k, t) for k, t in described(method).tensors(method, p).items()}


def heads(key: str) -> Iterator[str]:
    """The key without its last component, without its last two, …"""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def variants(key: str) -> list[str]:
    """Other keys of the same tensor: at an embedding."""
    m = _EMBEDDING.match(key)
    return [] if m is None else [f"{m[1]}_embedding_{m[2]}" if m[1] else f"{m[4]}_embedding_{m[5]}"]


def rows(key: str, shape: torch.Size, group: str = "") -> list[str]:
    """The keys of one shared tensor: itself (at its group), or one for each row where it ends in `*`."""
    key = key.replace("{}", group)
    return [f"{key[:-1]}{i}" for i in range(shape[0])] if key.endswith("*") else [key]
