"""PEFT's tensors and configuration → a plan and its adapter, all of it checked before a value is read."""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftfn.core.combine import chain
from peftfn.core.make import make
from peftfn.core.method import Leaf, Weight
from peftfn.core.plan import Adapter, Plan
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_keys as keys
from peftfn.formats.files import Loaded, Options, Tensors, mismatch
from peftfn.formats.peft_keys import PREFIX, PeftNames, Place
from peftfn.formats.peft_names import cure
from peftfn.formats.peft_sort import Sorted
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.tiedtokens import TiedTokens
from peftfn.methods.weights.trainabletokens import TrainableTokens
from peftfn.model.names import near
from peftfn.net.net import Adapted
from peftfn.tensors.precision import wide


class PeftReader:
    """One load: each of the sorted places with its method, and the tensors in it."""

    def __init__(self, where: Path, config: dict[str, Any], file: Tensors, model: PeftNames, options: Options):
        self.where, self.config, self.file, self.model, self.strict = where, config, file, model, options.strict
        at = Sorted(where, config, file, model, options.buffers)
        self.buffers = at.buffers
        self.places, self.found, self.whole, self.shared, self.copies = (
            at.places,
            at.found,
            at.whole,
            at.shared,
            at.copies,
        )
        self.missing, self.unexpected, self.token_keys = at.missing, at.unexpected, at.token_keys
        self.unused = at.unused
        self.moved: dict[tuple[str, torch.device], Tensor] = {}  # shared tensors, once for each device
        self.made: dict[str, Leaf] = {}  # site → what its method's `leaf_from` returns
        self.fresh: Plan | None = None

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
        zeros = {name: self.fits(name, plan, methods[name]) for name in order if name in self.places}
        if self.strict and (self.missing or self.unexpected):
            raise self.error()
        if self.strict and self.unused:
            raise ValueError(f"{self.where}: {self.unused[0]}. load(…, strict=False) reads the file without it")
        for key, mine in self.copies:
            if not torch.equal(self.file.tensor(key), self.file.tensor(self.shared[mine])):
                raise ValueError(f"{self.file.where}: {key} differs from base_model.{mine}, which all layers share")
        return self.fill(plan, methods, zeros)

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

    def fits(self, name: str, plan: Plan, method: Weight) -> set[str]:
        """Note what is missing and unexpected at a site; ValueError for other shapes. Returns our names of tensors of
        a part that PEFT leaves out at this layer, and marks with a tensor of zeros."""
        entry, place, found, before = plan[name], self.places[name], self.found[name], self.inside(name)
        assert method.peft is not None
        if method.peft.leaf_from is not None:
            self.meant(name, plan, method)
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
            if k in found:
                self.file.check(found[k], t.shape, t.is_floating_point())
            elif k not in seeded and not k.startswith(off or ("\0",)) and (found or not isinstance(method, TiedTokens)):
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
        """ValueError for PEFT's LoRA at a grouped convolution: its A reads all channels, so no weight is its change."""
        groups = getattr(self.model.modules[place.site.module], "groups", 1)
        a = self.file.meta[found["lora_A.weight"]] if "lora_A.weight" in found else None
        if groups != 1 and a is not None and a.dim() > 2 and a.shape[1] == groups * place.site.shape[1]:
            raise ValueError(
                f"{self.where}: {place.site.name}: PEFT's LoRA at a convolution of {groups} groups mixes the groups, "
                "which no weight of this layer does (PEFT cannot merge it either): train with LoHa or LoKr there"
            )

    def meant(self, name: str, plan: Plan, method: Weight) -> None:
        """Let the method say what the file's tensors at a site mean, and check that it fits the plan."""
        entry, place, found, file = plan[name], self.places[name], self.found[name], self.file
        w, bias = self.model.weights[name], self.model.weights.get(entry.site.bias or "")
        assert method.peft is not None and method.peft.leaf_from is not None
        if w.is_meta:
            raise ValueError(f"{file.where}: {name} has no values yet, and {method} needs them to read its tensors")
        t = {k: file.tensor(key, w.device) for k, key in found.items()}
        for k, key in method.peft.shared.items():
            named = keys.rows(key, torch.Size(), method.peft.group(place.called))
            if self.shared.keys() >= {*named}:
                t[key] = self.common(key, named, w.device)
            elif self.seeded:
                t[key] = self.drawn(plan)[name].frozen[k]
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
        made = {self.inside(name) + k: v for k, v in made.items()}
        for k, like in (*entry.spec.items(), *((k, c.shape) for k, c in entry.frozen.items())):
            integer = k in entry.frozen and not entry.frozen[k].is_floating_point()
            if k in made and (made[k].shape != like or made[k].is_floating_point() == integer):
                raise ValueError(
                    f"{file.where}: {name}: {k} is {made[k].dtype} {list(made[k].shape)}; {method} needs {list(like)}"
                )
        for k in found.keys() & again.keys():
            file.check(found[k], file.meta[found[k]].shape, again[k].is_floating_point())
        self.unexpected += [found[k] for k in found.keys() - again.keys()]
        self.made[name] = made

    def common(self, key: str, named: list[str], device: torch.device) -> Tensor:
        """A shared tensor, moved once to each device."""
        if (named[0], device) not in self.moved:
            parts = [self.file.tensor(self.shared[r], device) for r in named]
            self.moved[named[0], device] = torch.stack(parts) if key.endswith("*") else parts[0]
        return self.moved[named[0], device]

    def drawn(self, plan: Plan) -> Plan:
        """The plan with the constants that the methods themselves make."""
        if self.fresh is None:
            taken = {n: e.rule for n, e in plan.items()}
            self.fresh = make(self.model.read, plan.rules, 0, taken=taken)
        return self.fresh

    @property
    def seeded(self) -> bool:
        """Whether the file leaves out what a seed determines."""
        return any(self.config.get(k) is False for k in ("save_projection", "save_indices"))

    def inside(self, name: str) -> str:
        """What stands before the method's names: it is the second of a chain where the site is saved whole too."""
        return "1." if name in self.whole and name in self.places else ""

    def error(self) -> ValueError:
        odd = next(iter(self.unexpected), None)
        more = "" if odd is None else cure(self.model, odd) or near(keys.clean(odd), list(self.model.sites))
        return mismatch(self.file.where, set(self.missing), self.unexpected, more)

    def fill(self, plan: Plan, methods: Mapping[str, Weight], zeros: Mapping[str, set[str]]) -> Loaded:
        """The net and adapter with the file's tensors, each moved once to its site's device."""
        file, model = self.file, self.model
        adapter: Adapter = {}
        entries, copied = dict(plan.items()), set[tuple[str | None, str, int | None]]()
        for name, entry in plan.items():
            w, before = model.weights[name], self.inside(name)
            leaf, frozen = Leaf(), dict(entry.frozen)
            if name in self.whole:
                value = file.tensor(self.whole[name], w.device)
                diff = entry.site.canonical(value) - wide(entry.site.canonical(w))
                leaf["0.diff" if before else "diff"] = diff
            if name in self.made:
                leaf |= {k: t for k, t in self.made[name].items() if k in entry.spec}
                frozen |= {k: t for k, t in self.made[name].items() if k in frozen}
            elif name in self.places:
                place, peft = self.places[name], methods[name].peft
                assert peft is not None
                bank = plan.banks[entry.bank] if entry.bank else {}
                mine = adapter.setdefault(entry.bank, {}) if entry.bank else {}
                for k, key in peft.keys.items():
                    into = leaf if before + k in entry.spec else frozen if before + k in frozen else None
                    if (source := self.found[name].get(place.key(key))) is None or (into is None and k not in bank):
                        continue  # the same key under another name of ours, at other layers
                    if into is None and w.is_meta:  # shapes are all there is
                        mine.setdefault(k, torch.empty(bank[k], device=w.device))
                    elif into is None:  # every layer has a copy, or one of a row
                        row = int(self.drawn(plan)[name].frozen[peft.rows[k]]) if k in peft.rows else None
                        t = place.read(key, file.tensor(source, w.device), bank[k] if row is None else bank[k][1:])
                        whole = mine.setdefault(k, t if row is None else t.new_zeros(bank[k]))
                        part = whole if row is None else whole[row]
                        if (entry.bank, k, row) in copied and not torch.equal(part.to(w.device), t):
                            raise ValueError(f"{file.where}: {source} differs from other layers' copies")
                        if row is not None:
                            part.copy_(t)
                        copied.add((entry.bank, k, row))
                    else:
                        shape = entry.spec[before + k] if into is leaf else frozen[before + k].shape
                        t = place.read(key, file.tensor(source, w.device), shape)
                        into[before + k] = t if into is leaf else t.to(frozen[before + k].dtype)
                for k, key in peft.shared.items():
                    like = frozen[k].shape if k in frozen else bank.get(k)
                    if like is not None and self.shared.keys() >= set(named := keys.rows(key, like)):
                        (frozen if k in frozen else mine)[k] = self.common(key, named, w.device)
            for k, s in entry.spec.items():
                if k not in leaf and (k in zeros.get(name, ()) or name not in self.places):
                    leaf[k] = torch.zeros(s, device=w.device)
            adapter[name], entries[name] = leaf, dataclasses.replace(entry, frozen=frozen)
        if any(t.is_meta != model.weights[n].is_meta for n, e in entries.items() for t in e.frozen.values()):
            drawn = self.drawn(plan)
            for n, e in entries.items():
                kept = {k: t for k, t in e.frozen.items() if not t.is_meta}
                entries[n] = dataclasses.replace(e, frozen={**drawn[n].frozen, **kept})
        net = Adapted(model.model, Plan(entries, plan.rules, plan.banks))
        if self.missing:
            adapter = {n: {**leaf, **adapter.get(n, {})} for n, leaf in net.init().items()}
        net.plan.check(adapter)
        missing = tuple(dict.fromkeys(self.missing))
        return Loaded(net, adapter, missing, tuple(self.unexpected), buffers=self.buffers)


def pattern(names: Iterable[str], known: Iterable[str]) -> str:
    """A rule for exactly these sites: one for all layers' numbers where that finds no other site."""
    wanted, safe, parts = set(names), dict[str, bool](), dict[str, None]()
    for name in names:
        general = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(name))
        if general not in safe:
            safe[general] = all(n in wanted for n in known if re.fullmatch(general, n))
        parts[general if safe[general] else re.escape(name)] = None
    return f"^({'|'.join(parts)})$"
