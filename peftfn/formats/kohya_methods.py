"""Which method the tensors of a layer are, in kohya's and diffusers' files, and what tensors it must have."""

import math
from collections.abc import Collection, Iterable, Mapping

from torch import Size

from peftfn.core.method import Weight
from peftfn.core.plan import Entry
from peftfn.formats.kohya_scale import Scales
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.parts.lowrank import Ranked
from peftfn.methods.weights.diag_oft import DiagOFT
from peftfn.methods.weights.dora import DoRA
from peftfn.methods.weights.glora_lycoris import GLoRALycoris
from peftfn.methods.weights.ia3 import IA3
from peftfn.methods.weights.input_dora import InputDoRA
from peftfn.methods.weights.loha import LoHa
from peftfn.methods.weights.lokr import LoKr
from peftfn.methods.weights.lora import LoRA
from peftfn.model.model import Model
from peftfn.model.site import Site


class Methods:
    """The methods of a file's layers. called: module → its name in the file."""

    def __init__(self, file: Tensors, model: Model, called: Mapping[str, str]):
        self.file, self.where, self.model, self.called = file, file.where, model, called
        self.scales = Scales(file, called)

    def of(self, cls: type[Weight] | None, site: Site, keys: Mapping[str, str]) -> Weight:
        shape = {k: self.file.meta[key].shape for k, key in keys.items()}
        if cls is IA3:
            return self.ia3(site, keys)
        for part in shape.keys() - {"alpha", "m", "beta", "s"}:
            if len(shape[part]) < 2 or 0 in shape[part]:
                raise ValueError(
                    f"{self.where}: {keys[part]} has shape {list(shape[part])}; it must be a matrix, not empty"
                )
        wd = "m" in keys
        if wd and keys["m"].endswith("dora_scale") and shape["m"][:1] != site.shape[:1]:
            inner = self.of(cls, site, {k: key for k, key in keys.items() if k != "m"})
            return InputDoRA(inner)  # [1, in]: a magnitude of each input
        if cls is LoRA:
            rank = shape["a"][0]
            alpha = self.scales.alpha(site, keys, rank)
            return DoRA(rank, alpha, attached=True) if wd else LoRA(rank, alpha, lora_bias="beta" in keys)
        if cls is GLoRALycoris:
            rank = shape["a2"][0]
            return GLoRALycoris(rank, self.scales.alpha(site, keys, rank))
        if cls is DiagOFT:
            if len(shape["b"]) != 3:
                raise ValueError(f"{self.where}: {keys['b']} is {list(shape['b'])}; it must be [n, b, b]")
            bound = self.scales.number(keys["alpha"], 0.0) if "alpha" in keys else 0.0
            return DiagOFT(shape["b"][-1], bound or None, rescale="s" in keys)
        if cls is LoHa:
            rank = shape["b1"][0]
            return LoHa(rank, self.scales.alpha(site, keys, rank), tucker="t1" in keys, weight_decompose=wd)
        low = [i for i in "21" if f"w{i}" not in keys]
        h, m = shape["w1"][:2] if "w1" in keys else (shape["a1"][0], shape["b1"][1])
        k, n = shape["w2"][:2] if "w2" in keys else (shape["a2"][1 if "t2" in keys else 0], shape["b2"][1])
        if low[:1] == ["2"] and "t2" not in keys:
            n //= math.prod(site.shape[2:])
        if (h * k, m * n) != site.shape[:2]:
            raise ValueError(
                f"{self.where}: {self.called[site.module]}: {[h, m]} ⊗ {[k, n]} has not the size of {site.name}, "
                f"{list(site.shape)}"
            )
        rank = shape[f"b{low[0]}"][0] if low else (max(k, n) + 1) // 2
        return LoKr(
            rank,
            self.scales.alpha(site, keys, rank) if low else None,  # both full: lycoris and ComfyUI take no scale
            tucker="t2" in keys,
            weight_decompose=wd,
            decompose_factor=_factor((h, k), (m, n)),
            decompose_both="1" in low,
        )

    def ia3(self, site: Site, keys: Mapping[str, str]) -> Weight:
        on_input = self.scales.number(keys["on_input"], 0.0)
        if on_input not in (0, 1):
            raise ValueError(f"{self.where}: {keys['on_input']} is {on_input}; it must be 0 or 1")
        return IA3(bool(on_input), scales_bias=bool(on_input) or site.bias not in self.model.weights)

    def check(self, entry: Entry, keys: Mapping[str, str]) -> None:
        """ValueError unless the file has what the method has, in shapes that mean the same."""
        spec, site = dict(entry.spec), entry.site
        if "mid" in keys:
            core, down = (self.file.meta[keys[k]].shape for k in ("mid", "a"))
            r = spec["a"][0]
            if len(site.shape) < 3 or core != (r, r, *site.shape[2:]) or down[:2] != (r, site.shape[1]):
                raise ValueError(f"{self.where}: {keys['mid']} is {list(core)}, and {site.name} {list(site.shape)}")
            spec |= {"mid": core, "a": Size(down[:2])}
        if odd := spec.keys() ^ keys.keys():
            raise ValueError(
                f"{self.where}: {sorted(keys.values())} are not what {entry.method} has at {site.name}: {sorted(odd)} "
                "differ"
            )
        method = entry.method.of if isinstance(entry.method, InputDoRA) else entry.method
        before = isinstance(method, IA3) and method.feedforward
        for k, key in keys.items():
            have, want = self.file.meta[key].shape, site.shape if k == "diff" else spec[k]
            if k == "m":
                alike = _squeezed(have) == _squeezed(want)
            elif k in ("l", "s"):  # one number for each channel
                alike = _squeezed(have) == _squeezed([site.shape[1] if before else want[0]])
            elif k in ("a", "b", "a1", "a2", "b1", "b2") and isinstance(method, Ranked | GLoRALycoris):
                # a convolution's kernel, or a linear layer that was one of 1 × 1
                alike = have == (want[0], *site.shape[1:]) or have == (*want, *(1,) * (len(have) - len(want)))
            else:
                alike = have == want
            if not alike:
                raise ValueError(
                    f"{self.where}: {key} has shape {list(have)}, and {entry.method} at {site.name} needs {list(want)}"
                )
            if not self.file.meta[key].is_floating_point():
                raise ValueError(
                    f"{self.where}: {key} is {self.file.meta[key].dtype}; it must have a floating-point dtype"
                )


def lacks(cls: type[Weight] | None, have: Collection[str]) -> list[str]:
    """The ends of the keys without which a method's tensors are not whole."""
    if cls is LoRA:
        need = {"a": "lora_down.weight", "b": "lora_up.weight"}
    elif cls is GLoRALycoris:
        need = {k: f"{k}.weight" for k in ("a1", "a2", "b1", "b2")}
    elif cls is DiagOFT:
        need = {"b": "oft_blocks"}
    elif cls is IA3:
        need = {"l": "weight", "on_input": "on_input"}
    elif cls is LoHa:
        need = {k: key for k, key in LoHa.peft.keys.items() if k[0] != "t" or {"t1", "t2"} & {*have}}
    else:
        low = [i for i in "12" if f"w{i}" not in have]
        need = {f"{k}{i}": LoKr.peft.keys[f"{k}{i}"] for i in low for k in "ab"}
    return [key for k, key in need.items() if k not in have]


def _squeezed(shape: Iterable[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _factor(out: tuple[int, int], in_: tuple[int, int]) -> int | tuple[int, int]:
    """LoKr's decompose_factor under which out and in are split like this; where it can, what PEFT has too."""
    for f in (-1, out[0]):
        one = LoKr(decompose_factor=f)
        if one._split(math.prod(out), 0) == out and one._split(math.prod(in_), 1) == in_:
            return f
    return out[0], in_[0]
