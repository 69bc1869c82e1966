"""kohya's, ComfyUI's and diffusers' LoRA files: one safetensors file without a configuration, both ways.

kohya writes `lora_unet_down_blocks_0_proj.lora_up.weight`: a prefix for the part of the pipeline, and the module's path
with underscores for dots; diffusers `unet.down_blocks.0.proj.lora_A.weight`. Methods, ranks and sizes follow from
names and shapes, the scale from `….alpha` (a file without it means alpha = rank). Methods: LoRA (`lora_up`, …), LoHa
(`hada_w1_a`, …), LoKr (`lokr_w1`, …), each with or without `dora_scale`; LyCORIS' GLoRA (`a1`, …), Diag-OFT
(`oft_blocks`) and IA3 (`weight` with `on_input`); and `Full` (`diff`, `diff_b`, `w_norm`, `b_norm`), in lycoris-lora's
sense. A LoRA's Tucker core (`lora_mid`) is multiplied into its down factor.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.core.combine import is_expression
from peftfn.core.method import Leaf
from peftfn.core.plan import Entry
from peftfn.formats.files import Loaded, Options, as_stored, write
from peftfn.formats.kohya_keys import DOTTED, FLAT, Names
from peftfn.formats.kohya_read import KohyaReader
from peftfn.formats.tensor_files import Tensors, opened, unpickled
from peftfn.methods.parts.lowrank import Ranked
from peftfn.methods.weights.diag_oft import DiagOFT
from peftfn.methods.weights.dora import DoRA
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.glora_lycoris import GLoRALycoris
from peftfn.methods.weights.ia3 import IA3
from peftfn.methods.weights.input_dora import InputDoRA
from peftfn.methods.weights.loha import LoHa
from peftfn.methods.weights.lokr import LoKr
from peftfn.methods.weights.lora import LoRA
from peftfn.model.model import Model
from peftfn.net.net import Adapted

FILE = "pytorch_lora_weights.safetensors"
"""Its name in a folder, as diffusers has it."""
_FORMS = (LoRA, DoRA, LoHa, LoKr, InputDoRA, GLoRALycoris, DiagOFT, IA3)
_OTHERS = frozenset({"adapter_model.safetensors", "adapter.safetensors", "adapter_model.bin"})
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def is_mine(path: Path) -> bool:
    if path.is_file():
        return path.suffix in (".safetensors", *_PICKLES) and path.name not in _OTHERS
    return (path / FILE).is_file()


def save(
    path: Path,
    net: Adapted,
    adapter: Mapping[str, Any],
    *,
    layout: str = "kohya",
    prefix: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write one file: `path` itself if it ends in .safetensors, else pytorch_lora_weights.safetensors in it.

    Args:
        layout: "kohya", or "diffusers" (LoRA and DoRA alone; the scale is multiplied into lora_B, as diffusers
            reads no alpha there).
        prefix: of every name. Without it, that of the part of the pipeline (a model with children `unet`,
            `text_encoder`, …); for a model without such parts "lora_unet", and "unet" with diffusers' layout.
        dtype: of the file's tensors; without it, what the adapter has.
    """
    known = {"kohya": tuple(FLAT), "diffusers": DOTTED}
    if layout not in known:
        raise ValueError(f"save: {layout!r} is not a layout; choose one of {sorted(known)}")
    if prefix is not None and prefix not in known[layout]:
        raise ValueError(f"save: prefix is {prefix!r}; {layout} has {', '.join(known[layout])}")
    names, out = Names(Model.of(net.model)), dict[str, Tensor]()
    for site, entry in net.plan.items():
        name = names.written(entry.site.module, layout, prefix)
        if (found := names.find(name, f"save: {site}")) != entry.site.module:
            raise ValueError(f"{site}: its name in the file, {name}, would be read as {found}")
        out |= {f"{name}.{k}": t for k, t in _written(entry, adapter[site], names, layout).items()}
    if dtype is not None:
        out = {k: t if k.endswith(".alpha") else t.to(dtype) for k, t in out.items()}
    write(path if path.suffix == ".safetensors" else path / FILE, out)


def load(path: Path, model: Model, options: Options) -> Loaded:
    options.only(path, "key_mapping", "stored")
    if path.suffix in _PICKLES and path.is_file():
        if not options.pickled:
            raise ValueError(f"{path} is a pickle: load(…, pickled=True) reads only its tensors")
        return _read(unpickled(path), model, options)
    with opened(path / FILE if path.is_dir() else path) as file:
        return _read(file, model, options)


def _read(file: Tensors, model: Model, options: Options) -> Loaded:
    loaded = KohyaReader(file, model, options.key_mapping or {}).load(options.strict)
    return as_stored(loaded, file) if options.stored else loaded


def _ia3(entry: Entry, scale: Tensor, ones: tuple[int, ...], biased: bool) -> Leaf:
    """LyCORIS' IA3: what is added to one, and to which side's channels."""
    method, site = entry.method, entry.site
    assert isinstance(method, IA3)
    if method.feedforward and ones:
        columns = scale.reshape(site.shape[1], -1)
        if not scale.is_meta and not torch.equal(columns, columns[:, :1].expand_as(columns)):
            raise ValueError(
                f"{site.name}: these files scale whole input channels, and here the window's columns differ"
            )
        scale = columns[:, 0]
    elif not method.feedforward and method.scales_bias and biased:
        raise ValueError(f"{site.name}: these files' IA3 leaves the bias alone: use IA3(scales_bias=False) for them")
    return {
        "weight": (scale - 1).reshape(1, -1, *ones) if ones else scale - 1,
        "on_input": torch.tensor(int(method.feedforward)),
    }


def _written(entry: Entry, leaf: Mapping[str, Any], names: Names, layout: str) -> Leaf:
    """{end of the key: tensor} of a site's leaf. ValueError for what these files have no form for."""
    site, method = entry.site, entry.method
    if is_expression(leaf) or leaf.keys() != entry.spec.keys():
        raise ValueError(
            f"{site.name}: these files cannot express sums, scalings or prepared adapters; save their origin"
        )
    attr = site.name.rpartition(".")[2]
    if type(method) is Full and attr in ("weight", "bias") and layout == "kohya":
        weight = names.sites.get((site.module, "weight"))
        norm = weight is not None and weight.kind == "other"
        end = {"weight": "w_norm" if norm else "diff", "bias": "b_norm" if norm else "diff_b"}[attr]
        return {end: site.original(leaf["diff"])}
    forms = (LoRA, DoRA) if layout == "diffusers" else _FORMS
    if type(method) not in forms:
        raise ValueError(
            f"{site.name}: {layout}'s files have no {type(method).__name__}; peftfn.to_lora(net, adapter, rank=…) "
            "returns the nearest LoRA (convert --rank on the command line)"
        )
    if site.kind not in ("linear", "conv") or attr != "weight":
        raise ValueError(
            f"{site.name}: these files support only nn.Linear and convolutions, not {site.kind}: use the native format"
        )
    ones = (1,) * (len(site.shape) - 2)
    p: Leaf = dict(leaf)
    if isinstance(method, DiagOFT):
        ends = {"b": "oft_blocks", "s": "rescale"}
        p |= {"s": p["s"].reshape(-1, 1, *ones)} if "s" in p else {}
        return {"alpha": torch.tensor(float(method.constraint or 0))} | {ends[k]: t for k, t in p.items()}
    if isinstance(method, IA3):
        return _ia3(entry, p["l"], ones, (site.module, "bias") in names.sites)
    if isinstance(method, GLoRALycoris):
        p = {
            k: t.reshape(t.shape[0], *site.shape[1:]) if k == "b2" else t.reshape(*t.shape, *ones) for k, t in p.items()
        }
        alpha = method.scale * method.rank
        return {"alpha": torch.tensor(alpha)} | {f"{k}.weight": t for k, t in p.items()}
    on_input = isinstance(method, InputDoRA)
    method = method.of if isinstance(method, InputDoRA) else method
    assert isinstance(method, Ranked | LoHa | LoKr)
    if isinstance(method, Ranked):
        p |= {"a": p["a"].reshape(method.rank, *site.shape[1:]), "b": p["b"].reshape(*p["b"].shape, *ones)}
        ends = {"a": "lora_A.weight", "b": "lora_B.weight"}
        if layout == "diffusers":
            p |= {k: method.scale * p[k] for k in ("b", "beta") if k in p}
            p |= {"m": p["m"].reshape(1, -1, *ones) if ones else p["m"]} if "m" in p else {}
            return {(ends | {"beta": "lora_B.bias", "m": "lora_magnitude_vector"})[k]: t for k, t in p.items()}
        if "beta" in p:
            raise ValueError(f"{site.name}: kohya's LoRA has no bias; use diffusers' layout")
        ends = {"a": "lora_down.weight", "b": "lora_up.weight"}
    else:
        ends = dict(method.peft.keys)
    alpha = method.scale * method.rank
    if {"w1", "w2"} <= p.keys():  # lycoris and ComfyUI take no scale where both factors are full
        p["w1"], alpha = method.scale * p["w1"], float(method.rank)
    if "m" in p:
        p["m"] = p["m"].reshape(1, -1, *ones) if on_input else p["m"].reshape(-1, 1, *ones)
    return {"alpha": torch.tensor(alpha)} | {(ends | {"m": "dora_scale"})[k]: t for k, t in p.items()}
