"""PEFT's tensors sorted: which site of the model each belongs to, what is missing, and what has no place."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.formats import peft_config as configs
from peftfn.formats import peft_keys as keys
from peftfn.formats import peft_table as table
from peftfn.formats.buffers import BUFFER, differs
from peftfn.formats.files import Options
from peftfn.formats.peft_keys import PREFIX, TOKENS, PeftNames, Place
from peftfn.formats.tensor_files import Tensors
from peftfn.model.choice import matched
from peftfn.model.names import near
from peftfn.model.site import Site
from peftfn.tensors.precision import wide

_INNER = re.compile(r"\.(modules_to_save|original_module)\.")
HEADS = frozenset(name for names in table.CLASSIFIERS.values() for name in names)
"""What PEFT adds to modules_to_save where task_type asks for a head, whether the model has them or not."""
LEAST = 4096
"""A rank that is read whatever the sizes of the layers: PEFT's defaults are up to 256, also at small ones."""


class Sorted:
    """The keys of a file, by what they are in the model. ValueError for tensors that cannot be what they seem.

    places: site → where PEFT has it, found: site → {method's key: file's key}, whole: site → the file's key of its full
    value, shared: key behind `base_model.` → the file's key, copies: (file's key, shared key) of shared tensors that
    are there once more for a site, missing and unexpected: keys, buffers: name → the file's value of one that differs.
    """

    def __init__(self, where: Path, config: dict[str, Any], file: Tensors, model: PeftNames, options: Options):
        self.where, self.config, self.file, self.model, self.wanted = where, config, file, model, options.buffers
        self.strict = options.strict
        self.classes, self.tokens = configs.candidates(config["peft_type"]), configs.candidates("TRAINABLE_TOKENS")
        self.places: dict[str, Place] = {}
        self.found: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        self.shared: dict[str, str] = {}
        self.copies: list[tuple[str, str]] = []
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.buffers: dict[str, Tensor] = {}
        self.mismatched: dict[str, tuple[torch.Size, torch.Size]] = {}
        self.sort()
        self.unused = self.idle_patterns()
        if self.places or self.whole or self.shared:
            self.expect()
            self.bounds()

    def sort(self) -> None:
        """Where each of the file's tensors belongs."""
        config, model, copies, strays = self.config, self.model, list[tuple[str, str]](), list[str]()
        idle: dict[str, list[str]] = {}
        parameter = "ln_tuning_layers" if config["peft_type"] == "LN_TUNING" else ""
        if not self.classes and not parameter:
            raise ValueError(f"{self.where}: this release has no method for PEFT's {config['peft_type']}")
        written = {k for c in (*self.classes, *self.tokens) if c.peft for k in c.peft.keys.values()}
        shared = {k for c in self.classes if c.peft for k in c.peft.shared.values()}
        variants = {v for k in written for v in keys.variants(k)}
        suffixes = sorted(written | variants | shared, key=len, reverse=True)
        all_keys = {keys.clean(k, parameter) for k in self.file.meta}
        marked = (re.escape(k).replace(r"\*", r"\d+").replace(r"\{\}", r"[^.]+") for k in shared)
        patterns = [re.compile(rf"(?P<inner>.+\.)?(?P<key>{k})") for k in marked]
        for key in self.file.meta:
            bare = keys.clean(key, parameter)
            mine = key.removeprefix("base_model.")
            in_common = next((m for p in patterns if (m := p.fullmatch(mine))), None)
            if mine in shared or (in_common and not in_common["inner"]):
                self.shared[mine] = key
                continue
            if in_common and key.startswith(PREFIX) and f"base_model.{in_common['key']}" in self.file.meta:
                copies.append((key, in_common["key"]))  # a raw state has it at each layer too
                continue
            parts = keys.split(bare, suffixes)
            if parts and parts[1] in shared:
                copies.append((key, parts[1]))
            elif parts and (place := self.place(parts[0])) and self.inert(place):
                idle.setdefault(place.module, []).append(key)
            elif parts and place:
                self.places[place.site.name] = place
                self.once(self.found.setdefault(place.site.name, {}), parts[1], key)
            elif (outer := _INNER.sub(".", bare)) != bare and outer in all_keys:
                continue  # bias="all" has PEFT save a head's biases inside its wrapper too, which it does not read
            elif site := model.whole_site(bare):
                if self.sized(key, site) and self.trained(site.name, key):
                    self.once(self.whole, site.name, key)
            elif bare in model.buffers:
                self.same(bare, key)
            else:
                strays.append(key)
        for name, key in list(self.whole.items()):  # what is read into a parameter, its tied ones have too
            if not self.copied(name):
                self.whole |= {n: key for n in model.sites[name].tied if n not in self.whole}
        for idle_keys in idle.values():  # as PEFT leaves them: B has no gradient, and is zero
            if any(k.endswith("lora_B.weight") and self.file.tensor(k).any() for k in idle_keys):
                self.unexpected += idle_keys
        paths = {p.path: n for n, p in self.places.items()}
        for key in strays:  # what belongs to an adapted layer is for its method to know
            bare = keys.clean(key)
            if (path := next((h for h in keys.heads(bare) if h in paths), None)) is None:
                self.unexpected.append(key)
            else:
                self.once(self.found[paths[path]], bare.removeprefix(f"{path}."), key)
        for key, mine in copies:
            if mine not in self.shared or self.file.meta[key].shape != self.file.meta[self.shared[mine]].shape:
                self.unexpected.append(key)
        self.copies = [(key, mine) for key, mine in copies if key not in self.unexpected]

    def fitting(self, key: str, shape: Iterable[int], floating: bool = True) -> bool:
        """Whether a tensor has this shape; one that does not is noted, or a ValueError if the load is strict."""
        have, want = self.file.meta[key].shape, torch.Size(shape)
        if have != want and not self.strict:
            self.mismatched[self.file.names[key]] = (have, want)
            return False
        self.file.check(key, want, floating)
        return True

    def sized(self, key: str, site: Site) -> bool:
        """Whether a tensor is of the site's shape. ValueError where it must be, with the cure if tokens were added."""
        have, model = self.file.meta[key].shape, self.model.model
        if not self.strict:
            return self.fitting(key, site.shape)
        if have[:1] > site.shape[:1] and have[1:] == site.shape[1:] and hasattr(model, "resize_token_embeddings"):
            embedding = model.get_input_embeddings()  # type: ignore[operator]
            if site.shape[0] == getattr(embedding, "num_embeddings", None):
                raise ValueError(
                    f"{self.file.where}: {self.file.names[key]} is {list(have)}, and the model has {list(site.shape)}: "
                    f"tokens were added before training. Do so first: model.resize_token_embeddings({have[0]})"
                )
        return self.fitting(key, site.shape)

    def place(self, path: str) -> Place | None:
        return self.model.place(path.removesuffix(f".{TOKENS}"), self.config, (*self.classes, *self.tokens))

    def inert(self, place: Place) -> bool:
        """Whether PEFT's tensors have no effect there: a LoRA inside of nn.MultiheadAttention, which reads its
        out-projection's weight and never calls the layer. ("all-linear" finds it, in SigLIP for one.)"""
        return place.twice and place.path == place.module and self.config["peft_type"] == "LORA"

    def once(self, into: dict[str, str], name: str, key: str) -> None:
        if name in into:
            raise ValueError(f"{self.file.where}: {into[name]!r} and {key!r} are the same tensor")
        into[name] = key

    def expect(self) -> None:
        """What the configuration names and the file has no tensor of is missing, or made of shared tensors alone; what
        the file has tensors of and a configuration that names anything of this model does not name is unexpected."""
        config, model = self.config, self.model
        saved = configs.listed(config.get("modules_to_save"))
        whole = {model.sites[n].module for n in self.whole}
        for m in (m for m, name in model.called.items() if any(f".{name}".endswith(f".{s}") for s in saved)):
            if not any(f"{w}.".startswith(f"{m}.") for w in whole) and any(
                n.startswith(f"{m}.") for n in model.weights
            ):
                self.missing.append(f"{PREFIX}{m}")
        if not whole and not any(f".{name}".endswith(f".{s}") for name in model.called.values() for s in saved):
            self.missing += [f"{PREFIX}{s}" for s in saved if s not in HEADS]
        self.missing += self.lacking_tokens()
        wanted, exclude, layers = configs.chosen(config, self.where)
        if wanted is None:
            if self.shared and not self.places:
                raise ValueError(f"{self.where}: target_modules is missing, which says which layers share")
            return
        adapted = {m for p in self.places.values() for m in (p.site.module, model.owner(p.site.module))}
        named = matched(model.read, wanted, exclude, *layers, called=model.called)
        if config.get("ensure_weight_tying"):  # PEFT adapts what is tied to a layer along with it
            tied = (n for s in model.sites.values() if s.module in {*named} for n in s.tied)
            named = [*dict.fromkeys([*named, *(n.rpartition(".")[0] for n in tied)])]
        parameters, tokens = configs.listed(config.get("target_parameters")), self.token_keys
        for site, place in list(self.places.items()):
            ours = not named or {model.owner(place.module), place.module} & {*named}
            if not ours and not model.direct(place.site.module, parameters) and tokens.isdisjoint(self.found[site]):
                self.unexpected += self.found.pop(site).values()
                del self.places[site]
        for name in named:
            inside = model.in_attention(name) or any(f".{s}." in f".{model.called.get(name, name)}." for s in saved)
            new = None if name in adapted or inside else model.place(name, config, self.classes)
            if new and new.site.name not in self.whole:
                self.places[new.site.name], self.found[new.site.name] = new, {}

    def lacking_tokens(self) -> list[str]:
        """Keys of trained tokens that the configuration names next to another method, and that the file lacks."""
        given, model = self.config.get("trainable_token_indices"), self.model
        if not given or self.config["peft_type"] == "TRAINABLE_TOKENS":
            return []
        found = [self.places[n] for n, k in self.found.items() if not self.token_keys.isdisjoint(k)]
        there = [p.called for p in found]
        if isinstance(given, dict) and len({str(v) for v in given.values()}) == 1 and keys.ties(model.model):
            tied = (n.rpartition(".")[0] for p in found for n in p.site.tied)  # PEFT writes the embedding's alone
            there += [model.called.get(m, m) for m in tied]
        names = [n for n in given if not any(f".{m}".endswith(f".{n}") for m in there)]
        if isinstance(given, list):  # of the embedding's tokens
            names = [] if there else ["embed_tokens"]
        return [f"{PREFIX}{n}.{TOKENS}.{key}" for n in names for key in sorted(self.token_keys)]

    def idle_patterns(self) -> list[str]:
        """Sentences about keys of patterns that match no module, and would be ignored."""
        kind, out = self.config["peft_type"], list[str]()
        if kind in table.UNPATTERNED:
            return out
        names = [*self.model.called.values()]
        names += [f"{name}.{n}" for m, name in self.model.called.items() for n, _ in self.model.own(m)]
        for pattern in table.PATTERNS:
            for key in self.config.get(pattern) or {}:
                if not any(map(configs.finder(key, kind, self.where), names)):
                    out.append(f"{pattern} has {key!r}, and no module of this model is called so{near(key, names)}")
        return out

    def bounds(self) -> None:
        """PEFT's methods have no rank beyond the layers' sizes: a number that would allocate without end is refused."""
        largest = max((max(p.site.shape, default=1) for p in self.places.values()), default=1)
        if isinstance(r := self.config.get("r"), int) and r > max(8 * largest, LEAST):
            raise ValueError(f"{self.where}: r is {r}, above the largest dimension of an adapted weight, {largest}")

    def trained(self, name: str, key: str) -> bool:
        """Whether a tensor saved whole is part of the adapter, or only a copy of the base's (an embedding's)."""
        if self.copied(name):
            return True
        if name.endswith("bias") and self.config.get("bias", "none") != "none":
            return True
        return not torch.equal(wide(self.model.weights[name]).cpu(), self.file.tensor(key))

    def copied(self, name: str) -> bool:
        """Whether PEFT trains a copy of a site's module, so that what is tied to it does not change."""
        saved = configs.listed(self.config.get("modules_to_save"))
        module = self.model.called.get(name.rpartition(".")[0], "")
        return self.config["peft_type"] == "LN_TUNING" or any(module.endswith(m) or f"{m}." in module for m in saved)

    def same(self, name: str, key: str) -> None:
        """modules_to_save holds buffers too; an adapter has none."""
        if (value := differs(self.file, key, self.model.buffers[name], self.wanted, BUFFER)) is not None:
            self.buffers[name] = value

    def inside(self, name: str) -> str:
        """What stands before the method's names: it is the second of a chain where the site is saved whole too."""
        return "1." if name in self.whole and name in self.places else ""

    @property
    def token_keys(self) -> set[str]:
        return {k for c in self.tokens if c.peft for k in c.peft.keys.values()}
