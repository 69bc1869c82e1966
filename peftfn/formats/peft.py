"""Hugging Face PEFT's format: adapter_config.json and adapter_model.safetensors, both ways.

Reading: the file's keys say which layers are adapted, the configuration says how; whatever differs from layer to layer
becomes a rule of its own. Writing: one method for all layers (ranks, alphas and what else has a pattern may differ),
and `Full` wherever PEFT has `modules_to_save`, trained biases or LN-tuning.

Bit-exact are the tensors of every method. A tensor that PEFT saves whole (modules_to_save, biases) is read as its
difference to the base in fp32, so that base + difference may differ from it in the last bit.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peftfn.apply import Adapted, adapt
from peftfn.combine import chain
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_keys as keys
from peftfn.formats.peft_keys import TOKENS, Model, Place
from peftfn.formats.peft_write import document
from peftfn.method import Leaf, Method
from peftfn.methods.full import Full
from peftfn.plan import Adapter, Plan, wide
from peftfn.rng import Rng
from peftfn.targets import matched

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def save(folder: Path, net: Adapted, adapter: Mapping[str, Any]) -> None:
    """Both files are written beside their final names and renamed: an interrupted save leaves the old ones."""
    config, tensors = document(net, adapter)
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / f".{TENSORS}.{os.getpid()}", folder / f".{CONFIG}.{os.getpid()}"
    save_file({k: t.detach().contiguous().clone() for k, t in tensors.items()}, written[0], metadata={"format": "pt"})
    written[1].write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False))
    os.replace(written[0], folder / TENSORS)
    os.replace(written[1], folder / CONFIG)


def load(folder: Path, model: nn.Module) -> tuple[Adapted, Adapter]:
    config, where = configs.read(folder / CONFIG), folder / TENSORS
    if not where.is_file():
        pickled = "; its adapter_model.bin is a pickle, which can run code: convert it to safetensors"
        raise FileNotFoundError(f"{where} is missing{pickled if (folder / 'adapter_model.bin').exists() else ''}")
    with opened(where) as file:
        return _File(folder, config, file, Model(model)).load()


class Header:
    """The tensors of a file, by name, without their values."""

    def __init__(self, file: Any, where: Path):
        self.file, self.where = file, where
        slices = {k: file.get_slice(k) for k in file.keys()}  # noqa: SIM118 - safe_open is no mapping
        self.shapes = {k: torch.Size(s.get_shape()) for k, s in slices.items()}
        self.dtypes = {k: str(s.get_dtype()) for k, s in slices.items()}

    def check(self, key: str, shape: torch.Size, floating: bool = True) -> None:
        if self.shapes[key] != shape:
            raise ValueError(
                f"{self.where}: {key} has shape {list(self.shapes[key])}, and the model wants {list(shape)}"
            )
        if self.dtypes[key].startswith(("F", "BF")) != floating:
            raise ValueError(
                f"{self.where}: {key} is {self.dtypes[key]}; it must be {'floating' if floating else 'integer'}"
            )

    def tensor(self, key: str) -> Tensor:
        t: Tensor = self.file.get_tensor(key)
        if t.is_floating_point():
            t = t.float() if t.element_size() < 4 else t
            if t.isnan().any():
                raise ValueError(f"{self.where}: {key} has {int(t.isnan().sum())} values that are no numbers (NaN)")
        return t


@contextmanager
def opened(where: Path) -> Iterator[Header]:
    try:
        with safe_open(where, framework="pt") as file:
            yield Header(file, where)
    except SafetensorError as e:
        raise ValueError(f"{where}: no valid safetensors file: {e}") from e


class _File:
    """One load: the file's keys sorted into places, each with its method."""

    def __init__(self, folder: Path, config: dict[str, Any], header: Header, model: Model):
        self.where, self.config, self.header, self.model = folder / CONFIG, config, header, model
        self.methods: dict[str, Method] = {}  # by site
        self.places: dict[str, Place] = {}
        self.found: dict[str, dict[str, str]] = {}  # site → {method's key: file's key}
        self.whole: dict[str, str] = {}  # site → the file's key of its full value
        self.shared: dict[str, str] = {}  # the key behind base_model. → the file's key
        self.copies: list[tuple[str, str]] = []  # shared tensors that are in the file once more for each site

    def load(self) -> tuple[Adapted, Adapter]:
        self.sort()
        for name, place in self.places.items():
            self.methods[name] = self.method(place, self.found[name])
        self.fits()
        both = {n: m for n, m in self.methods.items() if n in self.whole}
        self.methods |= {n: Full() for n in self.whole}
        self.methods |= {n: chain(Full(), m) for n, m in both.items()}  # an embedding that was saved with its adapter
        sites = {s.name: s for s in self.model.sites.values()}
        ordered = {n: self.methods[n] for n in sites if n in self.methods}
        for key, mine in self.copies:
            if not torch.equal(self.header.tensor(key), self.header.tensor(self.shared[mine])):
                raise ValueError(f"{self.header.where}: {key} differs from base_model.{mine}, which all layers share")
        if not ordered:
            raise ValueError(f"{self.header.where}: there is no adapter in it")
        rules: dict[Method, list[str]] = {}
        for name, method in ordered.items():
            rules.setdefault(method, []).append(name)
        net = adapt(self.model.model, {pattern(names, sites): method for method, names in rules.items()})
        return self.fill(net)

    def sort(self) -> None:
        """Where each of the file's tensors belongs. ValueError for one that belongs nowhere."""
        config, model = self.config, self.model
        classes = configs.candidates(config["peft_type"])
        tokens = configs.candidates("TRAINABLE_TOKENS")
        parameter = "ln_tuning_layers" if config["peft_type"] == "LN_TUNING" else ""
        if not classes and not parameter:
            raise ValueError(f"{self.where}: PEFT's {config['peft_type']} is no method this release has")
        written = {k for c in (*classes, *tokens) if c.peft for k in c.peft.keys.values()}
        shared = {k for c in classes if c.peft for k in c.peft.shared.values()}
        variants = {v for k in written for v in keys.variants(k)}
        suffixes = sorted(written | variants | shared, key=len, reverse=True)
        strays = []
        for key in self.header.shapes:
            bare = keys.clean(key, parameter)
            if (mine := key.removeprefix("base_model.")) in shared or re.sub(r"\d+$", "*", mine) in shared:
                self.shared[mine] = key
                continue
            parts = keys.split(bare, suffixes)
            if parts and parts[1] in shared:
                self.copies.append((key, parts[1]))
                continue
            place = parts and model.place(parts[0].removesuffix(f".{TOKENS}"), config, (*classes, *tokens))
            if parts and place:
                self.places[place.site.name] = place
                _once(self.found.setdefault(place.site.name, {}), parts[1], key, self.header.where)
                continue
            name = model.plain(bare.rpartition(".")[0])[0] + "." + bare.rpartition(".")[2]
            if (bare if bare in model.sites else name) in model.sites:
                site = model.sites[bare if bare in model.sites else name]
                self.header.check(key, site.shape)
                if self.trained(site.name, key):
                    _once(self.whole, site.name, key, self.header.where)
            elif bare in model.buffers:
                self.same(key, model.buffers[bare])
            else:
                strays.append(key)
        paths = {p.path: n for n, p in self.places.items()}
        for key in list(strays):  # what belongs to an adapted layer is for its method to know
            bare = keys.clean(key)
            path = next((h for h in _heads(bare) if h in paths), None)
            if path is not None:
                _once(self.found[paths[path]], bare.removeprefix(f"{path}."), key, self.header.where)
                strays.remove(key)
        for key, mine in self.copies:
            if mine not in self.shared or self.header.shapes[key] != self.header.shapes[self.shared[mine]]:
                strays.append(key)
        if self.shared and not self.places:  # nothing but shared tensors: the configuration alone says where
            for name in self.targets():
                place = model.place(name, config, classes)
                if place:
                    self.places[place.site.name], self.found[place.site.name] = place, {}
        if strays:
            raise keys.unexpected(strays, list(model.sites), self.header.where)

    def targets(self) -> list[str]:
        names = self.config.get("target_modules")
        if isinstance(names, str) and names != "all-linear":
            configs.bounded(names, self.where)
        if not names or not all(isinstance(n, str) for n in configs.listed(names)):
            raise ValueError(f"{self.where}: target_modules is {str(names)[:80]}, and no other key names the layers")
        rest = (self.config.get(k) for k in ("exclude_modules", "layers_to_transform", "layers_pattern"))
        return matched(self.model.model, names, *rest)

    def trained(self, name: str, key: str) -> bool:
        """Whether a tensor saved whole is part of the adapter, or only a copy of the base's (an embedding's)."""
        saved = configs.listed(self.config.get("modules_to_save"))
        module = name.rpartition(".")[0]
        if self.config["peft_type"] == "LN_TUNING" or any(module.endswith(m) or f"{m}." in module for m in saved):
            return True
        if name.endswith("bias") and self.config.get("bias", "none") != "none":
            return True
        return not torch.equal(wide(self.model.weights[name]).cpu(), self.header.tensor(key))

    def same(self, key: str, buffer: Tensor) -> None:
        """modules_to_save holds buffers too; an adapter has none."""
        self.header.check(key, buffer.shape, buffer.is_floating_point())
        if not torch.equal(wide(buffer).cpu(), self.header.tensor(key)):
            raise ValueError(
                f"{self.header.where}: {key} is a buffer that differs from the model's (BatchNorm's statistics, say); "
                "an adapter has no buffers: put the file's value into the model first"
            )

    def method(self, place: Place, found: Mapping[str, str]) -> Method:
        config, module = self.config, place.module
        tokens = {k for c in configs.candidates("TRAINABLE_TOKENS") if c.peft for k in c.peft.keys.values()}
        if config["peft_type"] != "TRAINABLE_TOKENS" and not tokens.isdisjoint(found):
            given = config.get("trainable_token_indices") or []
            if isinstance(given, dict):
                given = next((v for k, v in given.items() if f".{module}".endswith(f".{k}")), [])
            tied = {"peft_type": "TRAINABLE_TOKENS", "token_indices": given}
            return configs.method(tied, module, place.site.kind, self.where)
        return configs.method(config, module, place.site.kind, self.where)

    def fits(self) -> None:
        """ValueError unless the file has what the methods have, in the same shapes; nothing is allocated before."""
        together: dict[Method, list[str]] = {}
        for name, method in self.methods.items():
            together.setdefault(method, []).append(name)
        for method, names in together.items():
            assert method.peft is not None
            weights = {n: self.model.empty(self.places[n].site) for n in names}
            largest = max(max(w.shape) for w in weights.values())
            if isinstance(r := self.config.get("r"), int) and r > 8 * largest:
                raise ValueError(f"{self.where}: r is {r}, and the largest side of an adapted weight is {largest}")
            rng, name = Rng(0, "", device="meta"), names[0]
            try:
                bank = method.bank(rng, weights)
                self.fits_shared(method, bank, required=True)
                leaves = {name: keys.drawn(self.places[name].site, method, w) for name, w in weights.items()}
                shared = method.shared(rng, weights)
            except (TypeError, RuntimeError, OverflowError, MemoryError, ArithmeticError) as e:
                raise ValueError(f"{self.where}: {method} does not fit {name}: {e}") from e
            self.fits_shared(method, {k: t for p in shared.values() for k, t in p.items()}, required=not self.left_out)
            for name in names:
                own, (leaf, frozen) = shared.get(name, {}), leaves[name]
                self.fits_site(name, method, {**bank, **leaf}, {**own, **frozen})

    def fits_site(self, name: str, method: Method, leaf: Leaf, constants: Leaf) -> None:
        place, found, where = self.places[name], self.found[name], self.header.where
        try:
            want = keys.tensors(place, method, {**constants, **leaf})
            may = keys.tensors(place, method, constants) if self.left_out else {}
        except RuntimeError as e:
            raise ValueError(f"{self.where}: {method} does not fit {name} in PEFT's shape: {e}") from e
        off = tuple(k.removesuffix("zeros") for k in found if k.endswith(".zeros") and k not in want)
        for part in off:  # a part that PEFT leaves out at this layer, and marks with a tensor of zeros
            may |= {k: t for k, t in want.items() if k.startswith(part)}
            del found[f"{part}zeros"]
        lacks, more = sorted(want.keys() - found.keys() - may.keys()), sorted(found.keys() - want.keys())
        if lacks or more:
            raise ValueError(
                f"{where}: {place.path} has {sorted(found)}"
                + (f", lacks {lacks}" if lacks else "")
                + (f", and {more} is nothing that {method} has here" if more else "")
            )
        for k, t in want.items():
            if k in found:
                self.header.check(found[k], t.shape, t.is_floating_point())

    def fits_shared(self, method: Method, tensors: Leaf, *, required: bool) -> None:
        assert method.peft is not None
        for k, key in method.peft.shared.items():
            if k not in tensors:
                continue
            for r in keys.rows(key, tensors[k].shape):
                if r in self.shared:
                    shape = tensors[k].shape[1:] if key.endswith("*") else tensors[k].shape
                    self.header.check(self.shared[r], shape, tensors[k].is_floating_point())
                elif required:
                    raise ValueError(f"{self.header.where}: base_model.{r} is missing")

    @property
    def left_out(self) -> bool:
        """Whether the file leaves out what a seed gives."""
        return any(self.config.get(k) is False for k in ("save_projection", "save_indices"))

    def fill(self, net: Adapted) -> tuple[Adapted, Adapter]:
        """The net's adapter and constants from the file, each tensor moved once to its site's device."""
        adapter: Adapter = {}
        entries = dict(net.plan.items())
        once: dict[tuple[str, torch.device], Tensor] = {}

        def at(key: str, like: torch.Size, device: torch.device) -> Tensor:
            if (key, device) not in once:
                rows = [self.header.tensor(self.shared[r]) for r in keys.rows(key, like)]
                once[key, device] = (torch.stack(rows) if key.endswith("*") else rows[0]).to(device)
            return once[key, device]

        for name, entry in net.plan.items():
            w = self.model.weights[name]
            leaf: Leaf = {}
            frozen = dict(entry.frozen)
            before = "1." if name in self.whole and name in self.places else ""
            if name in self.whole:
                value = self.header.tensor(self.whole[name]).to(w.device)
                diff = entry.site.canonical(value) - wide(entry.site.canonical(w))
                leaf["0.diff" if before else "diff"] = diff
            if name in self.places:
                place, method = self.places[name], self.methods[name]
                method = method.methods[1] if before else method  # type: ignore[attr-defined]
                assert method.peft is not None
                for k, key in method.peft.keys.items():
                    if (source := self.found[name].get(place.key(key))) is None:
                        continue
                    k = before + k
                    if entry.bank and k in net.plan.banks[entry.bank]:  # every layer has a copy
                        t = place.read(key, self.header.tensor(source).to(w.device), net.plan.banks[entry.bank][k])
                        mine = adapter.setdefault(entry.bank, {})
                        if k in mine and not torch.equal(mine[k].to(w.device), t):
                            raise ValueError(f"{self.header.where}: {source} differs from other layers' copies")
                        mine.setdefault(k, t)
                        continue
                    if k not in entry.spec and k not in frozen:
                        continue  # the same key under another name of ours, at other layers
                    mine, shape = (leaf, entry.spec[k]) if k in entry.spec else (frozen, frozen[k].shape)
                    t = place.read(key, self.header.tensor(source).to(w.device), shape)
                    mine[k] = t if mine is leaf else t.to(frozen[k].dtype)
                for k, key in method.peft.shared.items():
                    if k in frozen and self.shared.keys() >= set(keys.rows(key, frozen[k].shape)):
                        frozen[k] = at(key, frozen[k].shape, w.device)
                if entry.bank:
                    spec = {k: s for k, s in net.plan.banks[entry.bank].items() if k in method.peft.shared}
                    into = adapter.setdefault(entry.bank, {})
                    into |= {k: at(method.peft.shared[k], shape, w.device) for k, shape in spec.items()}
            adapter[name] = {
                k: leaf[k] if k in leaf else torch.zeros(s, device=w.device) for k, s in entry.spec.items()
            }
            entries[name] = dataclasses.replace(entry, frozen=frozen)
        net = Adapted(net.model, Plan(entries, net.plan.rules, net.plan.banks))
        net.plan.check(adapter)
        return net, adapter


def _heads(key: str) -> Iterator[str]:
    """The key without its last component, without its last two, …"""
    while "." in key:
        key = key.rpartition(".")[0]
        yield key


def pattern(names: Iterable[str], known: Iterable[str]) -> str:
    """A rule for exactly these sites: one for all layers' numbers where that finds no other site."""
    wanted, safe, parts = set(names), dict[str, bool](), dict[str, None]()
    for name in names:
        general = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
        if general not in safe:
            safe[general] = all(n in wanted for n in known if re.fullmatch(general, n))
        parts[general if safe[general] else re.escape(name)] = None
    return f"^({'|'.join(parts)})$"


def _once(into: dict[str, str], name: str, key: str, where: Path) -> None:
    if name in into:
        raise ValueError(f"{where}: {into[name]!r} and {key!r} are the same tensor")
    into[name] = key
