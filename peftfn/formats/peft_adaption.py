"""PEFT's files of LLaMA-Adapter, both ways."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfn.core.plan import Entry
from peftfn.formats import peft_extra
from peftfn.formats.binding import exactly, planned
from peftfn.formats.files import Loaded, mismatch
from peftfn.formats.peft_prompt_common import ALWAYS, HEAD, used
from peftfn.formats.tensor_files import Tensors as File
from peftfn.methods.modules.llama_adapter import LlamaAdapter
from peftfn.model.model import Model
from peftfn.net.net import Adapted

TYPE = "ADAPTION_PROMPT"


def load(config: dict[str, Any], file: File, model: Model, where: Path, strict: bool) -> Loaded:
    """The adapter of such a file. ValueError for what would not mean here what it means to PEFT."""
    try:
        method = LlamaAdapter(n=config["adapter_len"])
    except (KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{where}: adapter_len is {config.get('adapter_len')!r}; it must be a positive integer") from e
    used(config, {*ALWAYS.split(), "adapter_len", "adapter_layers", "target_modules", "bias"}, where)
    found: dict[str, dict[str, str]] = {}
    stray = []
    for key in file.meta:
        path, _, last = key.removeprefix(f"{HEAD}model.").rpartition(".")
        if path in model.places and last in ("adaption_prompt", "adaption_gate"):
            found.setdefault(path, {})[last.removeprefix("adaption_")] = key
        else:
            stray.append(key)
    missing = [f"{HEAD}model.{p}.adaption_{k}" for p, ks in found.items() for k in ("prompt", "gate") if k not in ks]
    if not found or missing or (stray and strict):
        raise mismatch(file.where, missing or ["…adaption_prompt"], stray)
    _check_said(config, found, where)
    net = Adapted(model.root, planned(model, {exactly(*found): method}, where))
    adapter: dict[str, Any] = {}
    for name, entry in net.plan.items():
        prompt, gate = found[name]["prompt"], found[name]["gate"]
        file.check(prompt, (1, *entry.spec["prompt"]))
        file.check(gate, (1,))
        adapter[name] = {"prompt": file.tensor(prompt)[0].clone(), "gate": file.tensor(gate)}
    return Loaded(net, adapter, unexpected=tuple(stray), extra=peft_extra.told(config, where))


def _check_said(config: Mapping[str, Any], found: Mapping[str, Any], where: Path) -> None:
    """ValueError where the configuration says other modules than the file has tensors of."""
    layers, name, here = config.get("adapter_layers"), config.get("target_modules"), next(iter(found))
    if layers is not None and (isinstance(layers, bool) or layers != len(found)):
        raise ValueError(f"{where}: adapter_layers is {layers!r}, and the file has tensors of {len(found)} modules")
    if name is not None and name != here.rpartition(".")[2]:
        raise ValueError(f"{where}: target_modules is {name!r}, and the file has tensors of {here}")


def document(
    net: Adapted, mine: Mapping[str, Entry], adapter: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT adapts the attention of the last layers."""
    parent = {n.rpartition(".")[2] for n in mine}
    if len(parent) != 1:
        raise ValueError(
            f"{next(iter(mine))}: PEFT's ADAPTION_PROMPT has modules of one name, and this net {sorted(parent)}"
        )
    (name,) = parent
    every = [n for n in Model.of(net.model).places if n.rpartition(".")[2] == name]
    if every[-len(mine) :] != list(mine):
        raise ValueError(
            f"{next(iter(mine))}: PEFT's ADAPTION_PROMPT adapts the last layers, and this net leaves out one of them: "
            "save it in the native format"
        )
    method: Any = next(iter(mine.values())).method
    tensors: dict[str, Tensor] = {}
    for site in mine:
        tensors[f"{HEAD}model.{site}.adaption_prompt"] = adapter[site]["prompt"][None]
        tensors[f"{HEAD}model.{site}.adaption_gate"] = adapter[site]["gate"]
    config = {"peft_type": TYPE, "adapter_len": method.n, "adapter_layers": len(mine), "target_modules": name}
    return config, tensors
