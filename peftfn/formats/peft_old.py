"""PEFT files in another layout than the one that is written now: tensors in a shorter form, and configurations that
leave a number to be counted."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.core.indices import Index
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_keys as keys
from peftfn.formats.tensor_files import Tensors
from peftfn.tensors.precision import wide


def named_today(config: dict[str, Any], file: Tensors) -> Tensors:
    """The tensors under the names that PEFT gives them now."""
    if config["peft_type"] != "MISS":
        return file
    return file.renamed(lambda k: re.sub(r"(?<=\.)bone_block(?=$|\.[^.]+$)", "miss_block", k))


def modernised(config: dict[str, Any], file: Tensors, where: Path) -> None:
    """Puts tensors that the file has in a shorter form into `file` in the full one, and into the configuration what
    PEFT counts from the model."""
    kind = config["peft_type"]
    if kind == "WAVEFT" and config.get("proportional_parameters") is True:
        counts = {keys.clean(k): t.numel() for k, t in file.meta.items() if k.endswith(".waveft_spectrum")}
        config["n_frequency_pattern"] = {f"^{re.escape(k.rpartition('.')[0])}": n for k, n in counts.items()}
        config["proportional_parameters"] = False
    if kind == "BOFT" and {len(file.meta[k]) for k in file.meta if k.endswith(".boft_R")} == {1}:
        config["boft_n_butterfly_factor"] = 1  # PEFT without its CUDA extension has one, whatever it was asked for
    if kind == "SHIRA":
        _places(config, file)
    if kind == "VBLORA" and config.get("save_only_topk_weights"):
        _logits(config, file)
    if kind == "ADALORA":
        for key in [k for k in file.meta if re.search(r"\.ranknum(\.[^.]+)?$", k)]:  # in a raw state
            if file.meta[key].numel() != 1 or float(file.tensor(key)) != config.get("init_r"):
                raise ValueError(f"{file.where}: {key} is not init_r, {config.get('init_r')}, by which PEFT divides")
            file.dropped(key)
    if kind == "ADALORA" and isinstance(masks := config.get("rank_pattern"), dict):
        for name, mask in masks.items():
            if not (isinstance(mask, list) and mask and all(isinstance(m, bool) for m in mask)):
                raise ValueError(f"{where}: rank_pattern: {name} is {str(mask)[:80]}; it must be truth values")
            _unpruned(name.removesuffix(".lora_E"), mask, config.get("init_r"), file, where)


def flattened(config: dict[str, Any], file: Tensors, model: keys.PeftNames, where: Path) -> None:
    """LoKr at nn.Conv1d with a whole second factor, as whole weights: PEFT pairs the first factor's two axes with the
    last two of the second one's three, and reshapes: a change of the weight that no two factors have."""
    for key in [k for k in file.meta if k.endswith(".lokr_w2") and len(file.meta[k].shape) == 3]:
        head = key.removesuffix(".lokr_w2")
        site = model.sites.get(f"{keys.clean(head)}.weight")
        if config["peft_type"] != "LOKR" or site is None or len(site.shape) != 3:
            continue
        names = [k for k in (f"{head}.lokr_{n}" for n in ("w1", "w1_a", "w1_b")) if k in file.meta]
        if len(names) != (1 if names and names[0].endswith("w1") else 2):
            continue  # missing, and reported with all others
        method = configs.method(config, model.called.get(site.module, site.module), "conv", where)
        first, second = [file.sources[k] for k in names], file.sources[key]
        scale: float = method.scale  # type: ignore[attr-defined]
        value = partial(_pefts_kron, first, second, model.weights[site.name], scale, f"{file.where}: {key}")
        file.replaced([*names, key], f"{head}.weight", value, site.shape)


def _pefts_kron(
    first: list[Callable[[], Tensor]], second: Callable[[], Tensor], w: Tensor, s: float, key: str
) -> Tensor:
    w1 = first[0]() if len(first) == 1 else first[0]() @ first[1]()
    change = s * torch.kron(wide(w1), wide(second()))
    if change.numel() != w.numel():
        raise ValueError(f"{key}: its factors make {list(change.shape)}, and the model wants {list(w.shape)}")
    return wide(w).cpu() + change.reshape(w.shape)


def _places(config: dict[str, Any], file: Tensors) -> None:
    """SHiRA's: those of a mask of one's own are in the file; a raw state has none, and a seed says where they are."""
    indices = [k for k in file.meta if k.endswith(".shira_indices")]
    if config.get("mask_type") != "random":
        config |= {"mask_type": "random", "random_seed": None}
    elif not indices and config.get("random_seed") is not None:
        config["save_indices"] = False
    for key in indices:
        if file.meta[key].is_floating_point():  # as PEFT writes them on Windows
            source = file.sources[key]
            file.meta[key] = torch.empty(file.meta[key].shape, dtype=torch.int32, device="meta")
            file.sources[key] = partial(_whole_numbers, source, f"{file.where}: {key}")


def _whole_numbers(source: Callable[[], Tensor], key: str) -> Tensor:
    t = source()
    if not torch.equal(t, t.round()):
        raise ValueError(f"{key} has values that are not whole numbers, so they are no indices")
    return t.int()


def _logits(config: dict[str, Any], file: Tensors) -> None:
    """VB-LoRA's top-k indices and weights [rows, pieces, k−1] → logits [rows, pieces, vectors], −∞ for all others."""
    vectors = config["num_vectors"]
    for index in [k for k in file.meta if k.endswith("_topk_indices")]:
        key, weights = index.removesuffix("_topk_indices"), index.removesuffix("indices") + "weights"
        if weights not in file.meta:
            raise ValueError(f"{file.where}: {index} is there, and {weights} is not")
        *rows, k = file.meta[weights].shape
        if len(rows) != 2 or not 0 <= k < vectors < 1 << 24:
            raise ValueError(f"{file.where}: {weights} has shape {[*rows, k]} for {vectors} vectors")
        file.check(index, (*rows, k + 1), floating=False)
        sources = file.sources[index], file.sources[weights]
        read = partial(_scattered, *sources, vectors, f"{file.where}: {index} or {weights}")
        file.replaced([index, weights], key, read, (*rows, vectors))


def _scattered(indices: Callable[[], Tensor], weights: Callable[[], Tensor], vectors: int, names: str) -> Tensor:
    at, w = indices().long(), weights().float()
    w = torch.cat([w, 1 - w.sum(-1, keepdim=True)], -1)
    if (why := Index(vectors, distinct=True).wrong(at)) or not bool((w >= 0).all()):
        raise ValueError(f"{names} {why or 'has a weight below zero'}: the bank has {vectors} vectors")
    return torch.full((*w.shape[:-1], vectors), -torch.inf).scatter(-1, at, w.log())


def _unpruned(path: str, mask: list[bool], rank: Any, file: Tensors, where: Path) -> None:
    """AdaLoRA's tensors of the triplets that are left → of all `init_r`, which PEFT's scale is about."""
    if len(mask) != rank:
        raise ValueError(f"{where}: rank_pattern: {path} has {len(mask)} truth values, and init_r is {rank}")
    for name, axis in (("lora_A", 0), ("lora_E", 0), ("lora_B", 1)):
        key = next((k for k in file.meta if keys.clean(k) == f"{path}.{name}"), None)
        if key is None:
            continue  # missing, and reported with all others
        shape = list(file.meta[key].shape)
        if len(shape) != 2 or shape[axis] not in (sum(mask), len(mask)):
            raise ValueError(f"{file.where}: {key} has shape {shape}, and rank_pattern keeps {sum(mask)} triplets")
        if shape[axis] != len(mask):
            shape[axis] = len(mask)
            file.replaced([key], key, partial(_padded, file.sources[key], mask, axis), shape)


def _padded(read: Callable[[], Tensor], mask: list[bool], axis: int) -> Tensor:
    t = read()
    shape = [len(mask) if i == axis else n for i, n in enumerate(t.shape)]
    return t.new_zeros(shape).index_copy(axis, torch.tensor(mask).nonzero()[:, 0], t)
