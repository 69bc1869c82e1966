"""LoRAs of experts in layouts of other releases, brought into the one that PEFT writes for stacked experts.

Transformers 4 had a linear layer for each expert (`experts.3.up_proj`, Mixtral's `experts.3.w1`); since 5 they are one
parameter [e, out, in], and gate and up one parameter of twice the rows. As PEFT converts such files: the factors of all
experts are stacked, and those of gate and up become one LoRA whose rank is the sum, with B block by block.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.formats import peft_config as configs
from peftfn.formats.peft_keys import BASE, PREFIX, PeftNames
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.weights.lora import LoRA
from peftfn.model.site import Site

_EXPERT = re.compile(r"(?P<head>(?:.*\.)?experts)\.(?P<i>\d+)\.(?P<part>[^.]+)\.(?P<factor>lora_[AB])\.weight")
PARTS = {"gate_up_proj": (("gate_proj", "w1"), ("up_proj", "w3")), "down_proj": (("down_proj", "w2"),)}
"""A stacked parameter → what its rows were, in order; each with the names it had."""
Read = Callable[[], Tensor]


def stacked(config: dict[str, Any], file: Tensors, model: PeftNames, where: Path) -> None:
    """Put LoRAs of single experts, where the model has them stacked, into the form for the stacked parameter: the
    tensors into `file`, and the parameter's name, rank and alpha into the configuration."""
    found: dict[tuple[str, str], dict[tuple[int, str, str], str]] = {}
    for key in file.meta:
        m = _EXPERT.fullmatch(key.removeprefix(PREFIX))
        name = m and next((n for n, parts in PARTS.items() if any(m["part"] in names for names in parts)), None)
        if m and name and (site := model.sites.get(f"{m['head']}.{name}")) and site.kind == "stack":
            found.setdefault((m["head"], name), {})[int(m["i"]), m["part"], m["factor"]] = key
    if found and (config["peft_type"] != "LORA" or config.get("use_dora")):
        raise ValueError(f"{where}: experts are one parameter in this model, and only LoRA has a form for it")
    for head in dict.fromkeys(head for head, _ in found):
        if model.direct(head, configs.listed(config.get("target_parameters"))):
            raise ValueError(
                f"{where}: target_parameters names parameters of {head}, and the file has its single experts"
            )
        names = [n for n, _ in model.own(head) if (head, n) in found]
        for i, name in enumerate(names):
            path = f"{PREFIX}{head}{f'.{BASE}' * (len(names) - 1 - i)}"
            called = f"{model.called.get(head, head)}.{name}"
            _stack(config, file, where, model.sites[f"{head}.{name}"], found[head, name], path, called)


def _stack(
    config: dict[str, Any],
    file: Tensors,
    where: Path,
    site: Site,
    tensors: dict[tuple[int, str, str], str],
    path: str,
    called: str,
) -> None:
    """One stacked parameter, whose tensors then are under `path`, and which the configuration knows as `called`."""
    head, _, name = site.name.rpartition(".")
    count, out, in_ = site.shape
    sides = [next((p for _, p, _ in tensors if p in names), None) for names in PARTS[name]]
    rows = out // len(sides)
    parts = [p for p in sides if p is not None]
    wanted = [(i, p, f) for p in parts for i in range(count) for f in ("lora_A", "lora_B")]
    lacks = [t for t in wanted if t not in tensors]
    if lacks or len(wanted) != len(tensors):
        i, part, factor = min(lacks or tensors.keys() - set(wanted))
        raise ValueError(
            f"{file.where}: {head}.{i}.{part}.{factor} is {'missing' if lacks else 'one too many'}: the model has "
            f"{count} experts, and a LoRA of stacked experts is for all of them"
        )
    names = {re.sub(r"\.lora_A\b.*$", "", file.names[tensors[i, p, "lora_A"]]) for i, p, _ in wanted}
    methods = {configs.method(config, n.removeprefix(PREFIX), "linear", where) for n in names}
    ranks = {p: file.meta[tensors[0, p, "lora_A"]].shape[0] for p in parts}
    scales = {m.scale for m in methods if isinstance(m, LoRA)}
    if len(scales) != 1 or len({m.rank for m in methods if isinstance(m, LoRA)} | set(ranks.values())) != 1:
        raise ValueError(f"{where}: experts of {head} have several ranks or alphas, and stacked experts have one")
    for (_, p, factor), key in tensors.items():
        file.check(key, (ranks[p], in_) if factor == "lora_A" else (rows, ranks[p]))
    total = sum(ranks.values())
    read = {f: [[file.sources[tensors[i, p, f]] for i in range(count)] for p in parts] for f in ("lora_A", "lora_B")}
    places = [j * rows for j, p in enumerate(sides) if p is not None]
    for factor, shape, join in (
        ("lora_A", (count * total, in_), _downs),
        ("lora_B", (out, count * total), partial(_ups, out=out, places=places)),
    ):
        gone = [key for (_, _, f), key in tensors.items() if f == factor]
        file.replaced(gone, f"{path}.{factor}.weight", partial(join, read[factor]), shape)
    (scale,) = scales
    alpha = scale * (total**0.5 if config.get("use_rslora") else total)
    key = f"^{re.escape(called)}"
    config["rank_pattern"] = {key: total, **(config.get("rank_pattern") or {})}
    config["alpha_pattern"] = {key: alpha, **(config.get("alpha_pattern") or {})}
    config["target_parameters"] = [*configs.listed(config.get("target_parameters")), called]


def _downs(read: list[list[Read]]) -> Tensor:
    """A of [part][expert], each [r, in] → [e·r, in], of each expert its parts' ranks."""
    return torch.stack([torch.cat([part[i]() for part in read]) for i in range(len(read[0]))]).flatten(0, 1)


def _ups(read: list[list[Read]], out: int, places: list[int]) -> Tensor:
    """B of [part][expert], each [rows, r] → [out, r·e] with the experts side by side for each rank; a part has its own
    rows and ranks."""
    experts = []
    for i in range(len(read[0])):
        bs = [part[i]() for part in read]
        b = bs[0].new_zeros(out, sum(t.shape[1] for t in bs))
        at = 0
        for t, place in zip(bs, places, strict=True):
            b[place : place + len(t), at : at + t.shape[1]] = t
            at += t.shape[1]
        experts.append(b)
    return torch.stack(experts, -1).flatten(1)


def ranked(config: dict[str, Any], file: Tensors, model: PeftNames) -> None:
    """Unsloth's lora_B of stacked experts, whose columns go expert by expert → PEFT's, rank by rank."""
    for key in list(file.meta):
        path = key.removeprefix(PREFIX).removesuffix(".lora_B.weight")
        module, _ = model.plain(path)
        if not key.endswith(".lora_B.weight") or module not in model.modules:
            continue
        sites = [model.sites[n] for n in model.direct(module, configs.listed(config.get("target_parameters")))]
        counts = {s.shape[0] for s in sites if s.stacked}
        if len(counts) == 1 and len(file.meta[key].shape) == 2:
            (count,) = counts
            out, columns = file.meta[key].shape
            if columns % count == 0:
                file.replaced([key], key, partial(_by_rank, file.sources[key], count), (out, columns))


def _by_rank(read: Read, count: int) -> Tensor:
    t = read()
    return t.reshape(len(t), count, -1).mT.flatten(1)
