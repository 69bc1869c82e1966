"""A plan as one PEFT configuration and its tensors. ValueError, naming the sites, for what PEFT cannot express."""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftfn.core.combine import is_expression
from peftfn.core.method import Leaf, Method
from peftfn.core.plan import Entry, Plan
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_table as table
from peftfn.formats.peft_keys import BASE, PREFIX, TOKENS, PeftNames, Place, described, rows, tensors, ties
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.tiedtokens import TiedTokens
from peftfn.methods.weights.trainabletokens import TrainableTokens
from peftfn.model.model import Model
from peftfn.net.net import Adapted
from peftfn.tensors.precision import wide


def documents(
    net: Adapted, adapter: Mapping[str, Any], *, split: bool = False, task: str | None = None
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """{folder below: (configuration, tensors)}: one, or with `split` one for each of PEFT's types in the plan.

    task: PEFT's task_type, with some of which it looks for the model's head in the file.
    """
    net, adapter = _untied(net, adapter)
    types: dict[str, dict[str, Entry]] = {}
    for name, entry in net.plan.items():
        kind = entry.method.peft.type if entry.method.peft and not isinstance(entry.method, Full) else ""
        types.setdefault(kind, {})[name] = entry
    if not split or len(types.keys() - {""}) < 2:
        return {"": document(net, adapter, task)}
    first = next(kind for kind in types if kind)
    types[first] |= types.pop("", {})
    out = {}
    for kind, entries in types.items():
        banks = {b: spec for b, spec in net.plan.banks.items() if b in {e.bank for e in entries.values()}}
        part = Adapted(net.model, Plan(entries, net.plan.rules, banks))
        out[kind.lower()] = document(part, {n: adapter[n] for n in (*entries, *banks)}, task)
    return out


def _untied(net: Adapted, adapter: Mapping[str, Any]) -> tuple[Adapted, Mapping[str, Any]]:
    """TiedTokens as PEFT has them: trained tokens of the embedding, which its model's head follows by itself."""
    for name, e in net.plan.items() if ties(net.model) else ():
        if type(e.method) is TrainableTokens and e.site.kind == "embedding" and e.site.tied:
            heads = [net.plan[n].method for n in e.site.tied if n in net.plan]
            if not any(type(m) is TrainableTokens and m.tokens != e.method.tokens for m in heads):
                raise ValueError(
                    f"{name}: PEFT trains these tokens of {e.site.tied[0]}, which is tied to it, as one with the "
                    "embedding's: use TiedTokens for both, or save in the native format"
                )
    tied = {n: e for n, e in net.plan.items() if isinstance(e.method, TiedTokens)}
    if not tied:
        return net, adapter
    entries, out = dict(net.plan.items()), dict(adapter)
    for name, e in tied.items():
        together = {n for n, other in tied.items() if other.bank == e.bank}
        if e.site.kind != "embedding":
            if not any(tied[n].site.kind == "embedding" for n in together):
                raise ValueError(f"{name}: PEFT trains tokens of a head along with its embedding only; adapt both")
            del entries[name], out[name]
            continue
        if together != {name, *e.site.tied} or not ties(net.model):
            raise ValueError(f"{name}: PEFT ties {[name, *e.site.tied]}, and the rule has {sorted(together)}")
        assert e.bank is not None
        leaf = adapter[e.bank]
        spec = {k: t.shape for k, t in leaf.items()}
        method = TrainableTokens(e.method.tokens)  # type: ignore[attr-defined]
        entries[name] = replace(e, method=method, spec=spec, prepared=spec, bank=None)
        out[name] = leaf
    names = {e.bank for e in tied.values()}
    banks = {b: spec for b, spec in net.plan.banks.items() if b not in names}
    return Adapted(net.model, Plan(entries, net.plan.rules, banks)), {n: t for n, t in out.items() if n not in names}


def document(
    net: Adapted, adapter: Mapping[str, Any], task: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of an adapter."""
    model = PeftNames(Model.of(net.model))
    for name, entry in net.plan.items():
        leaf = adapter[name]
        if is_expression(leaf) or leaf.keys() != entry.spec.keys():
            raise ValueError(
                f"{name}: PEFT has no sums, scalings or prepared adapters; save the adapter they were made from"
            )
    full = {n: e for n, e in net.plan.items() if isinstance(e.method, Full)}
    tokens = {n: e for n, e in net.plan.items() if e.method.peft and e.method.peft.type == "TRAINABLE_TOKENS"}
    main = {
        n: e
        for n, e in net.plan.items()
        if n not in full and (n not in tokens or len(tokens) + len(full) == len(net.plan))
    }
    tokens = {n: e for n, e in tokens.items() if n not in main}
    if not main:
        return _copies(net, adapter, model)
    odd = [n for n, e in main.items() if not configs.declared(type(e.method))]
    if odd:
        cure = ": peftfn.to_lora(net, adapter) converts it" if main[odd[0]].method.mergeable else ""
        raise ValueError(f"PEFT has no {main[odd[0]].method}, the method at {_some(odd)}{cure}")
    config, out = _adapted(main, adapter, model)
    for name, entry in tokens.items():
        place = model.written(entry.site, ())
        given = {f"{TOKENS}.{k}": t for k, t in tensors(place, entry.method, {**entry.frozen, **adapter[name]}).items()}
        out |= {f"{PREFIX}{place.path}.{k}": t for k, t in given.items()}
        indices = described(entry.method).written(entry.method)["token_indices"]
        config["trainable_token_indices"] = (config.get("trainable_token_indices") or {}) | {place.module: indices}
    paths = {p.module: p.path for p in (model.written(e.site, ()) for e in main.values())}
    _whole(full, adapter, model, config, out, paths, table.CLASSIFIERS.get(task or "", ()))
    return config, out


def _adapted(main: Mapping[str, Entry], adapter: Mapping[str, Any], model: PeftNames) -> tuple[dict[str, Any], Leaf]:
    """Configuration and tensors of the sites with a method of PEFT's."""
    each = {
        n: {k: v for k, v in described(e.method).written(e.method).items() if v is not ...} for n, e in main.items()
    }
    types: dict[str, list[str]] = {}
    for n, e in main.items():
        assert e.method.peft is not None
        types.setdefault(e.method.peft.type, []).append(n)
    if len(types) > 1:
        raise ValueError(
            "PEFT saves one method in a folder, and this plan has "
            + ", ".join(f"{t} at {_some(n)}" for t, n in types.items())
            + ": save them as several adapters, or in the native format"
        )
    (kind,) = types
    config: dict[str, Any] = {
        "peft_type": kind,
        "peft_version": table.VERSION,
        "task_type": None,
        "inference_mode": True,
        "base_model_name_or_path": getattr(model.model, "name_or_path", None) or None,
        "modules_to_save": None,
    }
    parameters = [n for n, e in main.items() if _layer(e, model) in ("stack", "stack_t", "parameter")]
    places = {n: model.written(e.site, parameters) for n, e in main.items()}
    _supported(kind, main, each, model)
    out, makers = Leaf(), dict[str, str]()
    for n, e in main.items():
        assert e.method.peft is not None
        if not set(adapter[n]) <= set(e.method.peft.keys):
            raise ValueError(f"{n}: PEFT's {kind} has no place for {sorted(set(adapter[n]) - set(e.method.peft.keys))}")
        bank = adapter[e.bank] if e.bank else {}
        p = {**e.frozen, **bank, **adapter[n]}
        out |= {f"{PREFIX}{places[n].path}.{k}": t for k, t in tensors(places[n], e.method, p).items()}
        for k, key in e.method.peft.shared.items():
            if k in p:
                t = p[k]
                named = rows(key, t.shape, e.method.peft.group(places[n].module))
                out |= {f"base_model.{r}": t[i] if key.endswith("*") else t for i, r in enumerate(named)}
                if "{}" in key and makers.setdefault(named[0], e.rule) != e.rule:
                    raise ValueError(
                        f"{n}: PEFT's {kind} has one {named[0]}, and here several rules have one each: use one rule"
                    )
    banks = {e.bank for e in main.values() if e.method.peft and e.method.peft.shared}
    if banks and len({e.rule for e in main.values()}) > 1:
        raise ValueError(
            f"PEFT's {kind} shares its tensors among all layers, and here several rules have separate ones"
        )
    config |= _common(kind, each, {n: p.module for n, p in places.items()}, model)
    modules = list(dict.fromkeys(model.owner(places[n].module) for n in main if n not in parameters))
    _not_experts(kind, modules, model)
    ahead = {places[n].module for n in main if each[n].get("feedforward_modules")}
    if "feedforward_modules" in config:
        config["target_modules"], config["feedforward_modules"] = _two(modules, ahead, model)
    else:
        config["target_modules"] = _targets(kind, main, {n: p.module for n, p in places.items()}, modules, model)
    if "save_indices" in table.DEFAULTS.get(kind, {}):
        config["save_indices"] = True
    if parameters:
        config["target_parameters"] = parameters
    if any(e.site.kind == "linear_t" for e in main.values()):
        config["fan_in_fan_out"] = True
    _same(config, main, places, adapter, model)
    return config, out


def _not_experts(kind: str, modules: Iterable[str], model: PeftNames) -> None:
    """ValueError for layers next to stacked experts that PEFT takes for the experts, by their last names."""
    model_type = getattr(getattr(model.model, "config", None), "model_type", None)
    if kind != "LORA" or not isinstance(model_type, str) or "transformers" not in sys.modules:
        return
    try:
        from transformers import conversion_mapping
    except ImportError:  # an older release, whose experts are layers
        return
    known = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {}) | {"mixtral": "mixtral"}
    base = known.get(model_type, "")
    if odd := [m for m in modules if m.rpartition(".")[2] in table.RENAMED.get(base, ())]:
        raise ValueError(
            f"{_some(odd)}: PEFT takes this name, in a {base} model, for experts in the layout of transformers 4, and "
            "would adapt the stacked experts: use the native format"
        )


def _targets(
    kind: str, main: Mapping[str, Entry], names: Mapping[str, str], modules: list[str], model: PeftNames
) -> list[str] | str:
    """`target_modules`: where PEFT shares tensors by what is in it, so that those of a rule share."""
    plain = targets(modules, model.modules)
    if not all(e.method.peft and e.method.peft.per_target for e in main.values()):
        return plain
    for given in (plain, modules, "|".join(map(re.escape, modules))):
        if isinstance(given, list) and len(given) >= table.MANY:
            continue
        pairs = {(configs.family(given, names[n]), e.site.shape, e.rule) for n, e in main.items()}
        if len(pairs) == len({pair[:2] for pair in pairs}) == len({rule for *_, rule in pairs}):
            return given
    raise ValueError(
        f"PEFT's {kind} shares among the layers of one shape that one name in target_modules matches, and no "
        f"target_modules says what the rules {sorted({e.rule for e in main.values()})} do: use one rule for each such "
        "name and shape, or save in the native format"
    )


def _layer(entry: Entry, model: PeftNames) -> str:
    """The kind of a site as `table.MORE` names it."""
    site = entry.site
    module = model.modules[site.module]
    if isinstance(module, nn.MultiheadAttention) or model.in_attention(site.module):
        return "attention"
    if site.kind == "conv":
        return f"conv{len(site.shape) - 2}"
    if site.kind == "linear" and not isinstance(module, nn.Linear) and not site.quantised:
        return "parameter"
    if site.kind == "other" and site.name.endswith("bias") and isinstance(module, nn.Linear):
        return "linear"
    return site.kind


def _supported(kind: str, main: Mapping[str, Entry], each: Mapping[str, dict[str, Any]], model: PeftNames) -> None:
    """ValueError for a layer that PEFT does not adapt with this method, or not as we do."""
    for n, e in main.items():
        layer, module = _layer(e, model), model.modules[e.site.module]
        less = next((k for k, v in table.LESS.items() if layer in v.split() and each[n].get(k)), None)
        less = None if less == "init_lora_weights" and not isinstance(each[n][less], str) else less
        if layer not in f"linear {table.MORE.get(kind, '')}".split() or less:
            raise ValueError(f"{n}: PEFT's {kind} {f'with {less} ' if less else ''}does not take this layer ({layer})")
        if layer.startswith("conv"):
            d, g, ahead = module.dilation, module.groups, each[n].get("feedforward_modules")
            if (g != 1 and ahead) or (kind not in table.WINDOWS and (g != 1 or any(x != 1 for x in d))):  # type: ignore[union-attr]
                raise ValueError(f"{n}: PEFT leaves out groups={g} and dilation={d} in its {kind}")
        if kind == "LOKR" and layer == "conv1" and "w2" in e.spec:
            raise ValueError(
                f"{n}: PEFT pairs the wrong axes of LoKr's factors at nn.Conv1d if the second factor is not "
                "split; give a rank below half of its smaller side, or use the native format"
            )
        if layer == "attention":
            pair = [k for k in main if model.owner(main[k].site.module) == model.owner(e.site.module)]
            if len(pair) != 2 or any(each[k] != each[n] for k in pair):
                raise ValueError(
                    f"{n}: PEFT adapts in_proj_weight and out_proj.weight of an attention alike, or neither"
                )


def _common(
    kind: str, each: Mapping[str, dict[str, Any]], modules: Mapping[str, str], model: PeftNames
) -> dict[str, Any]:
    """One configuration for all sites: where they differ, patterns for those that have one."""
    out: dict[str, Any] = {}
    patterns = {} if kind in table.UNPATTERNED else table.PATTERNS
    fields = {key: pattern for pattern, names in patterns.items() for key in names}
    for key in dict.fromkeys(k for c in each.values() for k in c):
        values = {n: c.get(key) for n, c in each.items()}
        out[key] = Counter(map(repr, values.values())).most_common(1)[0][0]
        out[key] = next(v for v in values.values() if repr(v) == out[key])
        others = {n: v for n, v in values.items() if v != out[key]}
        if others and key == "feedforward_modules":
            continue
        if others and key == "use_bdlora" and (both := _sides(values, modules)):
            out[key] = both
            continue
        if others and key not in fields:
            raise ValueError(
                f"PEFT's {kind} has one {key} for all layers; here it is {out[key]!r}, and "
                f"{next(iter(others.values()))!r} at {_some(list(others))}"
            )
        if others:
            legacy = kind in table.LEGACY
            out[fields[key]] = {modules[n] if legacy else f"^{re.escape(modules[n])}": v for n, v in others.items()}
    return out


def _sides(values: Mapping[str, Any], modules: Mapping[str, str]) -> dict[str, Any] | None:
    """BD-LoRA on both sides, which PEFT distinguishes by parts of the layers' last names; None where it cannot."""
    values = {n: v if v and v["nblocks"] > 1 else None for n, v in values.items()}  # one block is a plain LoRA
    blocks = {v["nblocks"] for v in values.values() if v}
    if len(blocks) != 1:
        return None
    out: dict[str, Any] = {"nblocks": min(blocks), "match_strict": None not in values.values()}
    last = {n: m.rpartition(".")[2] for n, m in modules.items()}
    for side in ("target_modules_bd_a", "target_modules_bd_b"):
        mine = {n for n, v in values.items() if v and v[side]}
        out[side] = sorted({last[n] for n in mine})
        if any(any(part in name for part in out[side]) != (n in mine) for n, name in last.items()):
            return None
    return out


def _same(
    config: dict[str, Any],
    main: Mapping[str, Entry],
    places: Mapping[str, Place],
    adapter: Mapping[str, Any],
    model: PeftNames,
) -> None:
    """ValueError unless what was written means, read again, the same change of the weight."""
    seen: set[tuple[Method, str]] = set()
    for n, e in main.items():
        if (e.method, e.site.kind) in seen or not e.method.mergeable:
            continue
        seen.add((e.method, e.site.kind))
        again = configs.method(
            {**table.DEFAULTS.get(config["peft_type"], {}), **config},
            places[n].module,
            e.site.kind,
            Path("(written)"),
        )
        again, mine, w = again.eval(), e.method.eval(), e.site.canonical(model.weights[n])
        if w.is_meta or again == mine:
            continue
        p = {k: wide(t) for k, t in {**e.frozen, **(adapter[e.bank] if e.bank else {}), **adapter[n]}.items()}
        if e.site.stacked:
            p, w = {k: t if k in e.common else t[0] for k, t in p.items()}, w[0]
        w = wide(w)
        a, b = (m.delta(m.prepare(p, w), w) for m in (mine, again))
        if not torch.equal(a, b):
            raise ValueError(f"{n}: PEFT cannot express {e.method}; the nearest it has is {again}")


def _whole(
    full: Mapping[str, Entry],
    adapter: Mapping[str, Any],
    model: PeftNames,
    config: dict[str, Any],
    out: Leaf,
    adapted: Mapping[str, str],
    heads: Iterable[str],
) -> None:
    """Trained copies: biases of adapted layers under `bias`, all others as modules_to_save.

    adapted: module → PEFT's path of it. heads: names of modules that PEFT saves in any case.
    """
    values = {n: wide(model.weights[n]) + wide(e.site.original(adapter[n]["diff"])) for n, e in full.items()}
    biases = {n for n in full if n.endswith("bias") and n.rpartition(".")[0] in adapted}
    if biases:
        every = {s.name for s in model.sites.values() if s.name.endswith("bias")}
        own = {n for n in every if n.endswith(".bias") and n.rpartition(".")[0] in adapted}
        only = table.BIAS.get(config["peft_type"])
        if only is None:
            raise ValueError(
                f"PEFT's {config['peft_type']} cannot train biases; this plan trains {_some(sorted(biases))}"
            )
        if every <= full.keys():
            config["bias"], biases = "all", every
        elif biases == own:
            config["bias"] = only
        else:
            raise ValueError(f"PEFT trains all adapted layers' biases or none; {_some(sorted(own - biases))} is not")
        for n in biases:
            module, _, attr = n.rpartition(".")
            path = f"{adapted[module]}.{BASE}" if module in adapted else module
            out[f"{PREFIX}{path}.{attr}"] = values[n]
    modules = _saved([e.site.module for n, e in full.items() if n not in biases], full, model, adapted, heads)
    if not modules:
        return
    _nameable(modules)
    caught = [m for m in model.modules if any(m.endswith(n) for n in modules)]
    clash = [m for m in caught if any(a == m or a.startswith(f"{m}.") for a in adapted)]
    if clash:
        raise ValueError(f"PEFT saves whole modules, and {_some(clash)} also have another method")
    config["modules_to_save"] = modules
    dense = {n: t for n, t in model.weights.items() if isinstance(t, Tensor)}  # not what stands for a quantised one
    state = {**model.buffers, **dense, **values}
    saved = model.model.state_dict()
    for m in caught:
        out |= {f"{PREFIX}{k}": state.get(k, saved[k]) for k in saved if k.startswith(f"{m}.")}


def _saved(
    modules: Iterable[str], full: Mapping[str, Entry], model: PeftNames, adapted: Iterable[str], heads: Iterable[str]
) -> list[str]:
    """The modules to name as trained whole: for parts of one that is trained as a whole (a head of two layers), and
    for parts of the head that PEFT names itself, that one."""
    names = {n for names in table.CLASSIFIERS.values() for n in names}
    every = [m for m in model.modules if m.rpartition(".")[2] in names]
    every = [m for m in every if not any(f"{a}.".startswith(f"{m}.") for a in adapted)]

    def outer(module: str) -> str:
        if (head := next((m for m in every if f"{module}.".startswith(f"{m}.")), None)) is not None:
            return head
        above = module.rpartition(".")[0]
        inside = {n for n in model.weights if n.startswith(f"{above}.")}
        return outer(above) if above and inside <= full.keys() else module

    wanted = [m for m in every if m.rpartition(".")[2] in heads]
    return list(dict.fromkeys([*map(outer, modules), *wanted]))


def _copies(net: Adapted, adapter: Mapping[str, Any], model: PeftNames) -> tuple[dict[str, Any], Leaf]:
    """A plan of trained parameters alone: what PEFT calls LN-tuning, for any kind of module."""
    modules = list(dict.fromkeys(e.site.module for e in net.plan.values()))
    _nameable(modules)
    out: Leaf = {}
    for m in modules:
        for attr, p in model.modules[m].named_parameters():
            n = f"{m}.{attr}"
            diff = net.plan[n].site.original(adapter[n]["diff"]) if n in net.plan else 0
            out[f"{PREFIX}{m}.ln_tuning_layers.{attr}"] = wide(p.detach()) + diff
    config = {"peft_type": "LN_TUNING", "peft_version": table.VERSION, "task_type": None, "inference_mode": True}
    return config | {"target_modules": targets(modules, model.modules), "modules_to_save": None}, out


def _nameable(modules: list[str]) -> None:
    if "" in modules:
        raise ValueError("PEFT saves whole modules by name, and this parameter belongs to the model itself")


def targets(modules: Iterable[str], known: Iterable[str]) -> list[str] | str:
    """`target_modules` for exactly these modules: last names if these match no other, else full names, else a regex."""
    wanted = set(modules)
    for names in (dict.fromkeys(m.rpartition(".")[2] for m in wanted), dict.fromkeys(modules)):
        if {k for k in known if any(k == n or k.endswith(f".{n}") for n in names)} == wanted:
            return sorted(names)
    return "|".join(re.escape(m) for m in sorted(wanted))


def _two(modules: list[str], ahead: set[str], model: PeftNames) -> tuple[list[str] | str, list[str] | str]:
    """(target_modules, feedforward_modules), the second a part of the first."""
    first, second = targets(modules, model.modules), targets([m for m in modules if m in ahead], model.modules)
    caught = {m for m in modules if isinstance(second, list) and any(m.endswith(n) for n in second)}
    if isinstance(first, list) and isinstance(second, list) and caught == ahead and set(second) <= set(first):
        return first, second
    return "|".join(re.escape(m) for m in sorted(modules)), "|".join(re.escape(m) for m in sorted(ahead))


def _some(names: list[str]) -> str:
    return f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
