"""llama.cpp's LoRA adapters: one GGUF file, both ways.

`general.type` is "adapter", `adapter.type` "lora", `adapter.lora.alpha` one number for all, and the tensors are
`blk.0.attn_q.weight.lora_a` [rank, in] and `….lora_b` [out, rank] under llama.cpp's names of the weights; its scale is
alpha / rank, or 1 where alpha is 0. An embedding's A is transposed. The rows of Llama's q and k stand in another order,
and those of their B with them: llama.cpp rotates pairs of neighbours, transformers the two halves of a head.

Reading is a renaming in front of PEFT's reader.
"""

import os
import re
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.core.combine import is_expression
from peftfn.formats import gguf_file, peft
from peftfn.formats import peft_config as configs
from peftfn.formats.files import Loaded, Options
from peftfn.formats.peft_keys import PREFIX
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.weights.lora import LoRA
from peftfn.model.model import Model
from peftfn.model.site import Site
from peftfn.net.net import Adapted

END = ".gguf"
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "GemmaForCausalLM": ("gemma", False),
    "Gemma2ForCausalLM": ("gemma2", False),
}
"""transformers' class → (llama.cpp's architecture, whether the rows of q and k stand in another order there). Others
may rearrange weights in ways of their own when they are converted."""
EMBEDDING = "token_embd.weight"
ALPHA = "adapter.lora.alpha"


def is_mine(path: Path) -> bool:
    return path.suffix == END and path.is_file()


def save(path: Path, net: Adapted, adapter: Mapping[str, Any]) -> None:
    """Write one file. ValueError, naming the site, for what llama.cpp has no form for."""
    if path.suffix != END or path.is_dir():
        raise ValueError(f"save: llama.cpp's adapter is one file: give a name that ends in {END}, not {path}")
    names = Names(Model.of(net.model), "save")
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for name, entry in net.plan.items():
        method, leaf = entry.method, adapter[name]
        if is_expression(leaf) or leaf.keys() != entry.spec.keys():
            raise ValueError(f"{name}: llama.cpp's files have no sums, scalings or prepared leaves; save their origin")
        if type(method) is not LoRA or method.lora_bias or entry.site.kind not in ("linear", "embedding"):
            cure = ": peftfn.to_lora(net, adapter) converts it" if method.mergeable else ""
            raise ValueError(f"{name}: llama.cpp has no {method} for this layer ({entry.site.kind}){cure}")
        alphas[name] = method.scale * method.rank
    alpha = Counter(alphas.values()).most_common(1)[0][0]  # one for all: another scale is in B
    if not alpha:
        raise ValueError(f"{next(iter(alphas))}: its scale is 0, and to llama.cpp an alpha of 0 is a scale of 1")
    for name, entry in net.plan.items():
        theirs, leaf, site = names.of(entry.site), adapter[name], entry.site
        a, b = leaf["a"].float(), leaf["b"].float()
        b = b if alphas[name] == alpha else b * (alphas[name] / alpha)
        tensors[f"{theirs}.lora_a"] = a.mT if site.kind == "embedding" else a
        tensors[f"{theirs}.lora_b"] = names.ordered(theirs, b)
    _written(path, names.architecture, alpha, tensors)


def load(path: Path, model: Model, options: Options) -> Loaded:
    options.only(path, "stored")
    names = Names(model, path)
    with gguf_file.opened(path) as (values, file):
        _check(values, names.architecture, path)
        mine = {names.of(s): s for s in model.sites.values() if s.kind in ("linear", "embedding") and names.known(s)}
        ranks: dict[str, int] = {}
        for key in list(file.meta):
            weight, _, end = key.rpartition(".")
            site = mine.get(weight)
            if site is None or end not in ("lora_a", "lora_b"):
                continue  # unexpected, and reported with all others
            if file.meta[key].dim() != 2:
                raise ValueError(f"{path}: {key} has shape {list(file.meta[key].shape)}; it must be a matrix")
            if end == "lora_b":
                ranks[site.module] = file.meta[key].shape[1]
            _renamed(file, key, site, names)
        theirs = _configuration(ranks, float(values[ALPHA]))
        return peft.build(model, configs.checked(theirs, path), file, path, options)


def _configuration(ranks: Mapping[str, int], alpha: float) -> dict[str, Any]:
    """PEFT's, of one alpha and several ranks; an alpha of 0 is a scale of 1."""
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    named = {f"^{re.escape(m)}": n for m, n in ranks.items() if n != r}
    own = {} if alpha else {"alpha_pattern": named}
    return {"peft_type": "LORA", "r": r, "lora_alpha": alpha or float(r), "rank_pattern": named, **own}


def _renamed(file: Tensors, key: str, site: Site, names: "Names") -> None:
    """One tensor under PEFT's name, in PEFT's order and shape."""
    weight, _, end = key.rpartition(".")
    shape, source = file.meta[key].shape, file.sources[key]
    embedding = site.kind == "embedding"
    name = f"lora_embedding_{end[-1].upper()}" if embedding else f"lora_{end[-1].upper()}.weight"
    if end == "lora_a":
        value, shape = (partial(_transposed, source), shape[::-1]) if embedding else (source, shape)
    else:
        if shape[0] != site.shape[int(embedding)]:
            raise ValueError(f"{file.where}: {key} has shape {list(shape)}, and the weight is {list(site.shape)}")
        value = partial(names.back, weight, source)
    file.replaced([key], f"{PREFIX}{site.module}.{name}", value, shape)


def _transposed(read: Callable[[], Tensor]) -> Tensor:
    return read().mT


def _check(values: Mapping[str, Any], architecture: str, path: Path) -> None:
    """ValueError unless the file is a LoRA adapter for the architecture."""
    for key, want in {
        "general.type": "adapter",
        "adapter.type": "lora",
        "general.architecture": architecture,
    }.items():
        if values.get(key) != want:
            raise ValueError(f"{path}: {key} is {str(values.get(key))[:80]!r}, and a LoRA for this model has {want!r}")
    alpha = values.setdefault(ALPHA, 0.0) if isinstance(values, dict) else values.get(ALPHA)
    if type(alpha) is not float or not abs(alpha) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{path}: {ALPHA} is {str(alpha)[:80]}; it must be a finite number")
    if values.get("adapter.alora.invocation_tokens"):
        raise ValueError(
            f"{path}: adapter.alora.invocation_tokens makes it an activated LoRA, which acts from certain tokens on: "
            "load it from PEFT's folder"
        )


class Names:
    """llama.cpp's names of a transformers model's weights, and the order of their rows."""

    def __init__(self, model: Model, where: object):
        kind = type(model.root).__name__
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"{where}: llama.cpp may rearrange the weights of a {kind} in a way that is not known here; known are "
                f"{', '.join(ARCHITECTURES)}. Its own convert_lora_to_gguf.py reads what format='peft' writes"
            )
        try:
            import gguf
        except ModuleNotFoundError as e:
            raise ModuleNotFoundError("llama.cpp's files need the package gguf: pip install 'peftfn[gguf]'") from e
        self.architecture, self.turned = ARCHITECTURES[kind]
        root: Any = model.root
        self.config = root.config
        arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._map: Any = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)
        self.where = where

    def known(self, site: Site) -> bool:
        """Whether llama.cpp has the weight, and a LoRA of it can mean there what it means here."""
        headless = self.architecture.startswith("gemma") and site.module == "lm_head"
        return not headless and not site.tied and self._name(site) is not None

    def of(self, site: Site) -> str:
        """ValueError for a weight that llama.cpp does not have, or has once for two."""
        if not self.known(site):
            why = f"is tied to {site.tied[0]}, and llama.cpp has one weight for both" if site.tied else "is not there"
            raise ValueError(f"{self.where}: {site.name}: in llama.cpp's {self.architecture} this weight {why}")
        return str(self._name(site))

    def _name(self, site: Site) -> str | None:
        name: str | None = self._map.get_name(site.name, try_suffixes=(".weight",))
        return name

    def ordered(self, name: str, b: Tensor) -> Tensor:
        """B [out, rank] with its rows in llama.cpp's order."""
        if (heads := self._heads(name)) is None:
            return b
        return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)

    def back(self, name: str, read: Callable[[], Tensor]) -> Tensor:
        """The reverse, of what `read` returns."""
        b = read()
        if (heads := self._heads(name)) is None:
            return b
        return b.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def _heads(self, name: str) -> int | None:
        """How many heads the rows are divided into; None where their order is the same."""
        if not self.turned or not name.endswith(("attn_q.weight", "attn_k.weight")):
            return None
        own, shared = self.config.num_attention_heads, getattr(self.config, "num_key_value_heads", None)
        return int(own if name.endswith("attn_q.weight") else shared or own)


def _written(path: Path, architecture: str, alpha: float, tensors: Mapping[str, Tensor]) -> None:
    """It replaces the old file only when it is complete."""
    import gguf

    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, t in tensors.items():
            writer.add_tensor(name, t.detach().cpu().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
