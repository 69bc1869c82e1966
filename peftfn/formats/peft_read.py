"""PEFT's tensors and configuration → a plan and its adapter, all of it checked before a value is read."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from peftfn.core.chain import chain
from peftfn.core.make import make
from peftfn.core.method import Weight
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_keys as keys
from peftfn.formats.files import Loaded, Options, mismatch
from peftfn.formats.indices import check_indices
from peftfn.formats.peft_fill import Filling
from peftfn.formats.peft_keys import PREFIX, PeftNames, Place
from peftfn.formats.peft_names import cure
from peftfn.formats.peft_sort import Sorted
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.tiedtokens import TiedTokens
from peftfn.methods.weights.trainabletokens import TrainableTokens
from peftfn.model.names import near
from peftfn.tensors.precision import wide


class PeftReader:
    """One load: each of the sorted places with its method, and the tensors in it."""

    def __init__(self, where: Path, config: dict[str, Any], file: Tensors, model: PeftNames, options: Options):
        self.where, self.config, self.file, self.model, self.strict = where, config, file, model, options.strict
        self.at = at = Sorted(where, config, file, model, options)
        self.places, self.found, self.whole, self.shared, self.copies = (
            at.places,
            at.found,
            at.whole,
            at.shared,
            at.copies,
        )
        self.missing, self.unexpected, self.token_keys = at.missing, at.unexpected, at.token_keys
        self.unused = at.unused

    def load(self) -> Loaded:
        if not (self.places or self.whole):
            known = self.unexpected or self.missing
            raise self.error() if known else ValueError(f"{self.file.where}: it has no adapter")
        methods = {name: self.method(place, self.found[name]) for name, place in self.places.items()}
        self.tie(methods)
        both = {n: chain(Full(), m) for n, m in methods.items() if n in self.whole}  # saved whole, and adapted
        chosen: dict[str, Weight] = {**methods, **{n: Full() for n in self.whole}, **both}
        order = [s.name for s in dict.fromkeys(self.model.sites.values()) if s.name in chosen]
        groups: dict[tuple[Weight, Any], list[str]] = {}
        for name in order:
            groups.setdefault((chosen[name], self.sharing(name, methods)), []).append(name)
        rules = {pattern(names, self.model.names): method for (method, _), names in groups.items()}
        taken = {n: rule for rule, names in zip(rules, groups.values(), strict=True) for n in names}
        try:
            plan = make(self.model.read, rules, 0, taken=taken, constants=False)
        except (ValueError, TypeError, AttributeError, RuntimeError, MemoryError, ArithmeticError) as e:
            raise ValueError(f"{self.where}: its method does not fit the model: {e}") from e
        values = Filling(self.at, plan, methods)
        for name in order:
            if name in self.places:
                values.zeros[name] = self.fits(name, values, methods[name])
        if self.strict and (self.missing or self.unexpected):
            raise self.error()
        if self.strict and self.unused:
            raise ValueError(f"{self.where}: {self.unused[0]}. load(…, strict=False) reads the file without it")
        for key, mine in self.copies:
            if not torch.equal(self.file.tensor(key), self.file.tensor(self.shared[mine])):
                raise ValueError(f"{self.file.where}: {key} differs from base_model.{mine}, which all layers share")
        net, adapter = values.filled()
        check_indices(net.plan, self.file.where)
        if self.missing:
            adapter = {n: {**leaf, **adapter.get(n, {})} for n, leaf in net.init().items()}
        net.plan.check(adapter)
        missing = tuple(dict.fromkeys(self.missing))
        return Loaded(
            net, adapter, missing, tuple(self.unexpected), buffers=self.at.buffers, mismatched=self.at.mismatched
        )

    def sharing(self, name: str, methods: Mapping[str, Weight]) -> Any:
        """Which sites have one rule, besides being of one method."""
        method, place = methods.get(name), self.places.get(name)
        if method is None or place is None or method.peft is None or not method.peft.per_target:
            return None
        return configs.family(self.config.get("target_modules"), place.called), place.site.shape

    def method(self, place: Place, found: Mapping[str, str]) -> Weight:
        config, module = self.config, place.called
        if config["peft_type"] != "TRAINABLE_TOKENS" and not self.token_keys.isdisjoint(found):
            given = config.get("trainable_token_indices") or []
            if isinstance(given, dict):
                given = next((v for k, v in given.items() if f".{module}".endswith(f".{k}")), [])
            tied = {"peft_type": "TRAINABLE_TOKENS", "token_indices": given}
            return configs.method(tied, module, place.site.kind, self.where)
        return configs.method(config, module, place.site.kind, self.where)

    def tie(self, methods: dict[str, Weight]) -> None:
        """Where a transformers model ties its head to the embedding, PEFT replaces the rows of both, unless the head
        has other tokens of its own."""
        if not keys.ties(self.model.model):
            return
        for name, method in list(methods.items()):
            site = self.places[name].site
            if type(method) is not TrainableTokens or site.kind != "embedding" or not site.tied:
                continue
            if any(type(own := methods.get(other)) is TrainableTokens and own != method for other in site.tied):
                continue
            apart = any(n in self.whole for n in (name, *site.tied))  # a chain has no tensors that sites share
            for other in (name, *site.tied):
                methods[other] = method if apart else TiedTokens(method.tokens)
                self.places.setdefault(other, Place(self.model.sites[other], other.rpartition(".")[0], "", ""))
                self.found.setdefault(other, dict(self.found[name]) if apart else {})

    def fits(self, name: str, values: Filling, method: Weight) -> set[str]:
        """Note what is missing and unexpected at a site; ValueError for other shapes. Returns our names of tensors of
        a part that PEFT leaves out at this layer, and marks with a tensor of zeros."""
        plan = values.plan
        entry, place, found, before = plan[name], self.places[name], self.found[name], self.at.inside(name)
        assert method.peft is not None
        if method.peft.leaf_from is not None:
            self.meant(name, values, method)
            return set()
        constants = {k.removeprefix(before): t for k, t in entry.frozen.items()}
        bank = {k: torch.empty(s, device="meta") for k, s in plan.banks[entry.bank].items()} if entry.bank else {}
        leaf = {k.removeprefix(before): torch.empty(s, device="meta") for k, s in entry.spec.items() if before in k}
        try:
            want = keys.tensors(place, method, {**constants, **bank, **leaf})
            seeded = keys.tensors(place, method, constants) if self.seeded else {}
        except RuntimeError as e:
            raise ValueError(f"{self.where}: {method} does not fit {name} in PEFT's shape: {e}") from e
        off = tuple(k.removesuffix("zeros") for k in found if k.endswith(".zeros") and k not in want)
        for part in off:
            del found[f"{part}zeros"]
        self.across_groups(place, found)
        for k, t in want.items():
            if k in found and not self.at.fitting(found[k], t.shape, t.is_floating_point()):
                del found[k]
            if k in found:
                continue
            if k not in seeded and not k.startswith(off or ("\0",)) and (found or not isinstance(method, TiedTokens)):
                self.missing.append(f"{PREFIX}{place.path}.{k}")
        for k in found.keys() - want.keys():
            self.unexpected.append(found.pop(k))
        for k, key in method.peft.shared.items():
            if (one := {**constants, **bank}.get(k)) is None:
                continue
            for r in keys.rows(key, one.shape):
                if r in self.shared:
                    shape = one.shape[1:] if key.endswith("*") else one.shape
                    self.file.check(self.shared[r], shape, one.is_floating_point())
                elif k in bank or not self.seeded:
                    self.missing.append(f"base_model.{r}")
        return {k for k, key in method.peft.keys.items() if off and place.key(key).startswith(off)}

    def across_groups(self, place: Place, found: Mapping[str, str]) -> None:
        """ValueError for what reads all channels of a grouped convolution.

        PEFT's LoRA does so, by a change that no weight has, and its IA3 ahead of the layer.
        """
        groups = getattr(self.model.modules[place.site.module], "groups", 1)
        if groups == 1:
            return
        a, scale = (self.file.meta[found[k]] if k in found else None for k in ("lora_A.weight", "ia3_l"))
        channels = groups * place.site.shape[1]
        if scale is not None and scale.dim() > 2 and list(scale.shape[:2]) == [1, channels]:
            raise ValueError(
                f"{self.where}: {place.site.name}: PEFT's feed-forward IA3 scales each of the {channels} channels that "
                f"enter this convolution of {groups} groups, and peftfn's has one number for the same channel of all "
                "groups: merge it with PEFT, or train without feedforward there"
            )
        if a is not None and a.dim() > 2 and a.shape[1] == channels:
            raise ValueError(
                f"{self.where}: {place.site.name}: PEFT's LoRA at a convolution of {groups} groups mixes the groups, "
                "which no weight of this layer does (PEFT cannot merge it either): train with LoHa or LoKr there"
            )

    def meant(self, name: str, values: Filling, method: Weight) -> None:
        """Let the method say what the file's tensors at a site mean, and check that it fits the plan."""
        entry, place, found, file = values.plan[name], self.places[name], self.found[name], self.file
        w, bias = self.model.weights[name], self.model.weights.get(entry.site.bias or "")
        assert method.peft is not None and method.peft.leaf_from is not None
        if w.is_meta:
            raise ValueError(f"{file.where}: {name} has no values yet, and {method} needs them to read its tensors")
        t = {k: file.tensor(key, w.device) for k, key in found.items()}
        for k, key in method.peft.shared.items():
            named = keys.rows(key, torch.Size(), method.peft.group(place.called))
            if self.shared.keys() >= {*named}:
                t[key] = values.common(key, named, w.device)
            elif self.seeded:
                t[key] = values.drawn()[name].frozen[k]
        try:
            made = method.peft.leaf_from(method, t, wide(entry.site.canonical(w)), None if bias is None else wide(bias))
            again = method.peft.tensors(method, made)
        except KeyError as e:
            (key,), group = e.args, method.peft.group(place.called)
            common = key in method.peft.shared.values()
            self.missing += keys.rows(f"base_model.{key}" if common else place.full(key), torch.Size(), group)
            return
        except (ValueError, RuntimeError, IndexError, TypeError) as e:
            raise ValueError(f"{file.where}: {method} does not fit {name}: {e}") from e
        made = {self.at.inside(name) + k: v for k, v in made.items()}
        for k, like in (*entry.spec.items(), *((k, c.shape) for k, c in entry.frozen.items())):
            integer = k in entry.frozen and not entry.frozen[k].is_floating_point()
            if k in made and (made[k].shape != like or made[k].is_floating_point() == integer):
                raise ValueError(
                    f"{file.where}: {name}: {k} is {made[k].dtype} {list(made[k].shape)}; {method} needs {list(like)}"
                )
        for k in found.keys() & again.keys():
            file.check(found[k], file.meta[found[k]].shape, again[k].is_floating_point())
        self.unexpected += [found[k] for k in found.keys() - again.keys()]
        values.made[name] = made

    @property
    def seeded(self) -> bool:
        """Whether the file leaves out what a seed, or the base, determines."""
        return any(self.config.get(k) is False for k in ("save_projection", "save_indices", "save_precomputed_indices"))

    def error(self) -> ValueError:
        odd = next(iter(self.unexpected), None)
        more = "" if odd is None else cure(self.model, odd) or near(keys.clean(odd), list(self.model.sites))
        return mismatch(self.file.where, set(self.missing), self.unexpected, more)


def pattern(names: Iterable[str], known: Iterable[str]) -> str:
    """A rule for exactly these sites: one for all layers' numbers where that finds no other site."""
    wanted, safe, parts = set(names), dict[str, bool](), dict[str, None]()
    for name in names:
        general = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
        if general not in safe:
            safe[general] = all(n in wanted for n in known if re.fullmatch(general, n))
        parts[general if safe[general] else re.escape(name)] = None
    return f"^({'|'.join(parts)})$"
