"""Reading kohya's and diffusers' files: the sites that a file adapts, and the adapter in it."""

from collections.abc import Iterator, Mapping

from peftfn.core.make import make
from peftfn.core.method import Weight
from peftfn.core.plan import Adapter, Plan
from peftfn.formats.files import Loaded, mismatch
from peftfn.formats.kohya_methods import Methods, lacks
from peftfn.formats.kohya_sort import Sorted
from peftfn.formats.peft_read import pattern
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.parts.lycoris import spread
from peftfn.methods.weights.full import Full
from peftfn.model.model import Model
from peftfn.model.names import near
from peftfn.model.site import Site
from peftfn.net.net import Adapted


class KohyaReader:
    """One load."""

    def __init__(self, file: Tensors, model: Model, key_mapping: Mapping[str, str]):
        self.file, self.where, self.model = file, file.where, model
        keys = Sorted(file, model, key_mapping)
        self.names, self.found, self.called, self.stray = keys.names, keys.found, keys.called, keys.stray
        self.missing: list[str] = []
        self.methods = Methods(file, model, keys.called)

    def load(self, strict: bool) -> Loaded:
        chosen: dict[str, Weight] = {}  # by site
        keys: dict[str, dict[str, str]] = {}  # site → {tensor: the file's key}
        for module in self.found:
            for site, method, mine in self.layer(module):
                chosen[site.name], keys[site.name] = method, mine
        if any(key.startswith("base_model.model.") for key in self.stray):
            raise ValueError(
                f"{self.where}: it has PEFT's keys, and adapter_config.json says what they mean (method, alpha). Load "
                "the folder of that file, with this one in it as adapter_model.safetensors, or say what they are: "
                "load(…, method=pf.LoRA(alpha=16)) for one"
            )
        if strict and (self.missing or self.stray):
            hint = near(self.stray[0].partition(".lora")[0], [m for m, _ in self.names.sites]) if self.stray else ""
            raise mismatch(self.where, self.missing, self.stray, hint)
        if not chosen:
            raise ValueError(f"{self.where}: it has no adapter tensors that fit this model")
        known = list(self.model.sites)
        groups: dict[Weight, list[str]] = {}
        for name in known:
            if name in chosen:
                groups.setdefault(chosen[name], []).append(name)
        rules = {pattern(names, known): method for method, names in groups.items()}
        taken = {n: rule for rule, names in zip(rules, groups.values(), strict=True) for n in names}
        try:
            plan = make(self.model, rules, 0, taken=taken, constants=False)
        except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError, ArithmeticError) as e:
            raise ValueError(f"{self.where}: does not fit the model: {e}") from e
        for name, entry in plan.items():
            self.methods.check(entry, keys[name])
        return self.fill(plan, keys)

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
            elif lacking := lacks(cls, own.keys()):
                self.missing += [f"{self.called[module]}.{k}" for k in lacking]
                self.stray += (own | common).values()
            else:
                method = self.methods.of(cls, site, own | common)
                yield site, method, {k: key for k, key in (own | common).items() if k not in ("alpha", "on_input")}

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
