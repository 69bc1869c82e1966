"""Readers of a few lines for kohya's and ms-swift's files, as oracles: they check nothing, and give dense weights."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Weights = dict[str, Tensor]


def kohya(path: Path, model: nn.Module) -> Weights:
    """{parameter: its value} of what the file adapts. KeyError for a tensor that no module of the model has."""
    modules = {f"lora_unet_{n.replace('.', '_')}": n for n in dict(model.named_modules())}
    found: dict[str, dict[str, Tensor]] = {}
    for key, t in load_file(path).items():
        name, _, end = key.partition(".")
        found.setdefault(modules[name], {})[end] = t
    return {f"{m}.weight": changed(model.get_parameter(f"{m}.weight").detach(), t) for m, t in found.items()}


def changed(w: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The adapted value of a linear layer's weight, by LyCORIS' formulas."""
    t = {k: v.float() for k, v in given.items()}
    alpha, m = t.pop("alpha", None), t.pop("dora_scale", None)

    def scale(rank: int) -> Tensor | float:
        return 1.0 if alpha is None else float(alpha) / rank

    if "diff" in t:
        return w + t.pop("diff")
    if "on_input" in t:
        scale_of = t["weight"].flatten()  # [n] or [n, 1]: one number for each channel
        return w * (1 + (scale_of if t["on_input"] else scale_of[:, None]))
    if "oft_blocks" in t:
        q = t["oft_blocks"] - t["oft_blocks"].mT
        bound = float(alpha) * len(w) if alpha is not None else 0.0
        q = q * bound / (q.norm() + 1e-8) if 0 < bound < q.norm() + 1e-8 else q
        eye = torch.eye(q.shape[-1])
        r = (eye + q) @ torch.linalg.inv(eye - q)
        return torch.einsum("knm,kni->kmi", r, w.view(*q.shape[:2], -1)).reshape(w.shape)
    if "a1.weight" in t:
        a1, a2, b1, b2 = (t[f"{k}.weight"].flatten(1) for k in ("a1", "a2", "b1", "b2"))
        return w + scale(len(a2)) * (w @ a1 @ a2 + b1 @ b2)
    if "lora_up.weight" in t:
        up, down = (t[f"lora_{k}.weight"].flatten(1) for k in ("up", "down"))
        d = scale(len(down)) * up @ down
    elif "hada_w1_a" in t:
        d = scale(len(t["hada_w1_b"])) * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
    else:
        low = [i for i in "21" if f"lokr_w{i}_b" in t]
        one, two = (t[f"lokr_w{i}_a"] @ t[f"lokr_w{i}_b"] if i in low else t[f"lokr_w{i}"] for i in "12")
        d = (scale(len(t[f"lokr_w{low[0]}_b"])) if low else 1.0) * torch.kron(one, two)
    if m is None:
        return w + d
    rows = len(m) == len(w)
    return m.reshape((-1, 1) if rows else (1, -1)) * (w + d) / (w + d).norm(dim=1 if rows else 0, keepdim=True)


def gguf(path: Path, model: Any) -> Weights | None:
    """As `kohya`, of a file for llama.cpp, by the gguf package; None where that cannot read it."""
    from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map

    try:
        read = GGUFReader(path)
        alpha = float(read.fields["adapter.lora.alpha"].contents()) if "adapter.lora.alpha" in read.fields else 0.0
        tensors = {t.name: torch.from_numpy(t.data.copy()).float() for t in read.tensors}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError):
        return None
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    out = {}
    for name, w in model.named_parameters():
        key = names.get_name(name, try_suffixes=(".weight",))
        if f"{key}.lora_b" not in tensors:
            continue
        a, b = tensors[f"{key}.lora_a"], tensors[f"{key}.lora_b"]
        scale = alpha / b.shape[1] if alpha else 1.0
        if key == "token_embd.weight":
            out[name] = w.detach() + scale * a @ b.T
            continue
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(key.split(".")[2])
        if heads:  # neighbours in each head, of its two halves
            n = getattr(model.config, heads)
            b = torch.cat([half for head in b.chunk(n) for half in (head[0::2], head[1::2])])
        out[name] = w.detach() + scale * b @ a
    return out


def mlx(folder: Path, model: nn.Module) -> Weights:
    """As `kohya`, of a folder of MLX-LM: W + s (a b)ᵀ, with a magnitude m of each row where there is one."""
    s, found = json.loads((folder / "adapter_config.json").read_text())["lora_parameters"]["scale"], dict[str, Any]()
    s = float(s)  # an integer may be too large for torch
    for key, t in load_file(folder / "adapters.safetensors").items():
        name, _, end = key.rpartition(".")
        found.setdefault(name, {})[end] = t.float()
    out = {}
    for name, t in found.items():
        w = model.get_parameter(f"{name}.weight").detach() + s * (t["lora_a"] @ t["lora_b"]).T
        out[f"{name}.weight"] = t["m"][:, None] * w / w.norm(dim=1, keepdim=True) if "m" in t else w
    return out


def swift(folder: Path, model: nn.Module) -> Weights | None:
    """The same of an adapter's folder; None where its configuration says more than this reader knows."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = {k: t.float() for k, t in load_file(folder / "adapter_model.safetensors").items()}
    if config["swift_type"] == "part":
        return {k.removeprefix("base_model.model."): t for k, t in tensors.items()}
    if config.get("rank_pattern") or config.get("alpha_pattern") or config.get("modules_to_save"):
        return None
    found: dict[str, dict[str, Tensor]] = {}
    out: Weights = {}
    for key, t in tensors.items():
        module, *end = re.split(r"\.(?=lora_)", key.removeprefix("base_model.model."))
        if end:
            found.setdefault(module, {})[end[0].split(".")[0]] = t
        elif not torch.equal(t, model.get_parameter(module)):
            out[module] = t
    return out | {
        f"{m}.weight": _lora(model.get_parameter(f"{m}.weight").detach(), t, config) for m, t in found.items()
    }


def _lora(w: Tensor, t: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    r = config.get("r", 8)
    new = w + config.get("lora_alpha", 8) / (r**0.5 if config.get("use_rslora") else r) * t["lora_B"] @ t["lora_A"]
    if "lora_magnitude_vector" in t:
        new = t["lora_magnitude_vector"][:, None] * new / new.norm(dim=1, keepdim=True)
    return new
