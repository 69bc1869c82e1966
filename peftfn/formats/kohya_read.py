"""Reading kohya's and diffusers' files: which module a key belongs to, which method its tensors are, what fits."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Size, Tensor

from peftfn.core.make import make
from peftfn.core.method import Weight
from peftfn.core.plan import Adapter, Entry, Plan
from peftfn.formats import peft_config as configs
from peftfn.formats.files import Loaded, Tensors, mismatch
from peftfn.formats.kohya_keys import ENDS, Key, Names, nameless
from peftfn.formats.peft_read import pattern
from peftfn.methods.parts.lowrank import Ranked
from peftfn.methods.parts.lycoris import spread
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
from peftfn.model.names import near
from peftfn.model.site import Site
from peftfn.net.net import Adapted

FLAT_CONFIG = frozenset({"r", "lora_alpha", "peft_type"})
"""Keys of diffusers' configuration where the file is of one model, so that no part's name stands before them."""
ALPHAS = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha")
RANKS = ("ss_network_dim", "lora_rank", "network_dim", "rank", "r", "dim")
"""What tools call alpha and rank in a file's header."""


class KohyaReader:
    """One load: the file's keys sorted by module, then by method."""

    def __init__(self, file: Tensors, model: Model, key_mapping: Mapping[str, str]):
        self.file, self.where, self.model, self.names = file, file.where, model, Names(model)
        try:
            self.mapping = {re.compile(k): v for k, v in key_mapping.items()}
        except re.error as e:
            raise ValueError(f"load: key_mapping has {e.pattern!r}, which is not a regular expression: {e}") from e
        self.found: dict[str, dict[Key, str]] = {}  # module → {(method, tensor): the file's key}
        self.called: dict[str, str] = {}  # module → its name in the file
        self.stray: list[str] = []
        self.missing: list[str] = []
        self.configs = self.metadata()

    def load(self, strict: bool) -> Loaded:
        self.sort()
        methods: dict[str, Weight] = {}  # by site
        keys: dict[str, dict[str, str]] = {}  # site → {tensor: the file's key}
        for module in self.found:
            for site, method, mine in self.layer(module):
                methods[site.name], keys[site.name] = method, mine
        if any(key.startswith("base_model.model.") for key in self.stray):
            raise ValueError(
                f"{self.where}: it has PEFT's keys, and adapter_config.json says what they mean (method, alpha). Load "
                "the folder of that file, with this one in it as adapter_model.safetensors, or say what they are: "
                "load(…, method=pf.LoRA(alpha=16)) for one"
            )
        if strict and (self.missing or self.stray):
            hint = near(self.stray[0].partition(".lora")[0], [m for m, _ in self.names.sites]) if self.stray else ""
            raise mismatch(self.where, self.missing, self.stray, hint)
        if not methods:
            raise ValueError(f"{self.where}: it has no adapter tensors that fit this model")
        known = list(self.model.sites)
        groups: dict[Weight, list[str]] = {}
        for name in known:
            if name in methods:
                groups.setdefault(methods[name], []).append(name)
        rules = {pattern(names, known): method for method, names in groups.items()}
        taken = {n: rule for rule, names in zip(rules, groups.values(), strict=True) for n in names}
        try:
            plan = make(self.model, rules, 0, taken=taken, constants=False)
        except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError, ArithmeticError) as e:
            raise ValueError(f"{self.where}: does not fit the model: {e}") from e
        for name, entry in plan.items():
            self.check(entry, keys[name])
        return self.fill(plan, keys)

    def metadata(self) -> dict[str, Any]:
        """diffusers' configuration, `<part>.<PEFT's key>` → value."""
        text = self.file.metadata.get("lora_adapter_metadata", "{}")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{self.where}: lora_adapter_metadata is not valid JSON: {e}") from e
        if not isinstance(found, dict):
            raise ValueError(f"{self.where}: lora_adapter_metadata is {text[:80]}; it must be an object")
        return found

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

    def layer(self, module: str) -> Iterator[tuple[Site, Weight, dict[str, str]]]:
        """The sites of a module that the file adapts, with their methods and keys."""
        found = self.found[module]
        for attr in ("weight", "bias"):
            if (key := found.get((Full, attr))) is not None:
                site = self.names.sites.get((module, attr))
                if site is None:
                    self.stray.append(key)
                else:
                    yield site, Full(), {"diff": key}
        classes = {cls for cls, _ in found if cls not in (Full, None)}
        common = {k: key for (cls, k), key in found.items() if cls is None}
        if len(classes) + ((Full, "weight") in found) > 1 or (common and not classes):
            raise ValueError(f"{self.where}: {sorted(found.values())} are not the tensors of one method")
        for cls in classes:
            own = {k: key for (c, k), key in found.items() if c is cls}
            site = self.names.sites.get((module, "weight"))
            if site is None or site.kind not in ("linear", "conv") or own.keys() == {"l"}:  # a model's own weight
                self.stray += (own | common).values()
            elif lacks := _lacks(cls, own.keys()):
                self.missing += [f"{self.called[module]}.{k}" for k in lacks]
                self.stray += (own | common).values()
            else:
                method = self.method(cls, site, own | common)
                yield site, method, {k: key for k, key in (own | common).items() if k not in ("alpha", "on_input")}

    def method(self, cls: type[Weight] | None, site: Site, keys: Mapping[str, str]) -> Weight:
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
            inner = self.method(cls, site, {k: key for k, key in keys.items() if k != "m"})
            return InputDoRA(inner)  # [1, in]: a magnitude of each input
        if cls is LoRA:
            rank = shape["a"][0]
            alpha = self.alpha(site, keys, rank)
            return DoRA(rank, alpha, attached=True) if wd else LoRA(rank, alpha, lora_bias="beta" in keys)
        if cls is GLoRALycoris:
            rank = shape["a2"][0]
            return GLoRALycoris(rank, self.alpha(site, keys, rank))
        if cls is DiagOFT:
            if len(shape["b"]) != 3:
                raise ValueError(f"{self.where}: {keys['b']} is {list(shape['b'])}; it must be [n, b, b]")
            bound = self.number(keys["alpha"], 0.0) if "alpha" in keys else 0.0
            return DiagOFT(shape["b"][-1], bound or None, rescale="s" in keys)
        if cls is LoHa:
            rank = shape["b1"][0]
            return LoHa(rank, self.alpha(site, keys, rank), tucker="t1" in keys, weight_decompose=wd)
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
            self.alpha(site, keys, rank) if low else None,  # both full: lycoris and ComfyUI take no scale
            tucker="t2" in keys,
            weight_decompose=wd,
            decompose_factor=_factor((h, k), (m, n)),
            decompose_both="1" in low,
        )

    def ia3(self, site: Site, keys: Mapping[str, str]) -> Weight:
        on_input = self.number(keys["on_input"], 0.0)
        if on_input not in (0, 1):
            raise ValueError(f"{self.where}: {keys['on_input']} is {on_input}; it must be 0 or 1")
        return IA3(bool(on_input), scales_bias=bool(on_input) or site.bias not in self.model.weights)

    def number(self, key: str, least: float) -> float:
        """The one number in a tensor. ValueError for another shape, and for a value below `least` or not finite."""
        if self.file.meta[key].numel() != 1:
            raise ValueError(f"{self.where}: {key} has shape {list(self.file.meta[key].shape)}; it must be one number")
        value = float(self.file.tensor(key))
        if not least <= value < math.inf:
            bound = "above 0" if least else "from 0 on"
            raise ValueError(f"{self.where}: {key} is {value}; it must be a finite number {bound}")
        return value

    def alpha(self, site: Site, keys: Mapping[str, str], rank: int) -> float | None:
        """The numerator of the scale; None where it is the rank."""
        if (key := keys.get("alpha")) is not None:
            value = self.number(key, math.ulp(0.0))
        elif self.configs:
            part, _, path = self.called[site.module].partition(".")
            mine = {k.removeprefix(f"{part}."): v for k, v in self.configs.items() if k.startswith(f"{part}.")}
            if not mine and FLAT_CONFIG & self.configs.keys():  # of one model alone
                mine, path = self.configs, self.called[site.module]
            if not mine:
                return None
            config = configs.checked({"peft_type": "LORA", **mine}, self.where)
            method = configs.method(config, path, site.kind, self.where)
            if not isinstance(method, Ranked | LoHa | LoKr):
                raise ValueError(f"{self.where}: lora_adapter_metadata is of {method}, and the tensors are not")
            value = method.scale * rank
        elif (header := self.header()) is not None:
            value = header * rank
        else:
            return None
        return None if value == rank else value

    def header(self) -> float | None:
        """The scale of all layers in the file's header: alpha over the rank."""
        said = {k: self.file.metadata[k] for k in (*ALPHAS, *RANKS) if k in self.file.metadata}
        try:
            numbers = {k: float(v) for k, v in said.items()}
        except ValueError as e:
            raise ValueError(f"{self.where}: the header's {said} must be numbers") from e
        alpha = next((numbers[k] for k in ALPHAS if k in numbers), None)
        rank = next((numbers[k] for k in RANKS if k in numbers), None)
        if alpha is None:
            return None
        if rank is None or not (0 < alpha < math.inf and 0 < rank < math.inf):
            raise ValueError(f"{self.where}: the header's {said} must be an alpha and a rank above 0")
        return alpha / rank

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

    def fill(self, plan: Plan, keys: Mapping[str, Mapping[str, str]]) -> Loaded:
        devices = {n: p.device for n, p in self.model.weights.items()}
        adapter: Adapter = {}
        for name, entry in plan.items():
            p = {k: self.file.tensor(key, devices[name]) for k, key in keys[name].items()}
            if "mid" in p:
                p["a"] = spread(p.pop("mid"), p["a"].flatten(1))
            if "l" in p:
                p["l"] = (1 + p["l"].flatten()).repeat_interleave(entry.spec["l"].numel() // p["l"].numel())
            if "diff" in p:
                p["diff"] = entry.site.canonical(p["diff"]).contiguous()
            adapter[name] = {k: p[k].reshape(shape) for k, shape in entry.spec.items()}
        net = Adapted(self.model.root, plan)
        net.plan.check(adapter)
        return Loaded(net, adapter, tuple(sorted(self.missing)), tuple(sorted(self.stray)))


def _lacks(cls: type[Weight] | None, have: Collection[str]) -> list[str]:
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


def _rows(read: Callable[[], Tensor], start: int, count: int) -> Tensor:
    return read()[start : start + count]


def _squeezed(shape: Iterable[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _factor(out: tuple[int, int], in_: tuple[int, int]) -> int | tuple[int, int]:
    """LoKr's decompose_factor under which out and in are split like this; where it can, what PEFT has too."""
    for f in (-1, out[0]):
        one = LoKr(decompose_factor=f)
        if one._split(math.prod(out), 0) == out and one._split(math.prod(in_), 1) == in_:
            return f
    return out[0], in_[0]
