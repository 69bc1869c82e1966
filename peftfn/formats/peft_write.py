"""A plan as one PEFT configuration and its tensors. ValueError, naming the sites, for what PEFT cannot express."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from peftfn.core.combine import is_expression
from peftfn.core.method import Leaf
from peftfn.core.plan import Entry, Plan
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_table as table
from peftfn.formats.beyond import Beyond
from peftfn.formats.buffers import statistics
from peftfn.formats.peft_common import chosen_targets, common, same, two_targets
from peftfn.formats.peft_keys import PREFIX, TOKENS, PeftNames, described, rows, tensors, ties
from peftfn.formats.peft_limits import layer_of, not_experts, not_renamed, some, supported
from peftfn.formats.peft_whole import copies_alone, copies_beside, with_buffers, with_grown
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.tiedtokens import TiedTokens
from peftfn.methods.weights.trainabletokens import TrainableTokens
from peftfn.model.model import Model
from peftfn.net.net import Adapted


def documents(
    net: Adapted,
    adapter: Mapping[str, Any],
    *,
    split: bool = False,
    task: str | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    beyond: Beyond | None = None,
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """{folder below: (configuration, tensors)}: one, or with `split` one for each of PEFT's types in the plan.

    task: PEFT's task_type, with some of which it looks for the model's head in the file. buffers: the model's that
    belong to the adapter. beyond: what the model holds beyond its base.
    """
    statistics(net, buffers)
    net, adapter = _untied(net, adapter)
    types: dict[str, dict[str, Entry]] = {}
    for name, entry in net.plan.items():
        kind = entry.method.peft.type if entry.method.peft and not isinstance(entry.method, Full) else ""
        types.setdefault(kind, {})[name] = entry
    if not split or len(types.keys() - {""}) < 2:
        config, tensors = document(net, adapter, task, beyond)
        return {"": (config, with_buffers(tensors, buffers or {}))}
    first = next(kind for kind in types if kind)
    types[first] |= types.pop("", {})
    out = {}
    for kind, entries in types.items():
        banks = {b: spec for b, spec in net.plan.banks.items() if b in {e.bank for e in entries.values()}}
        part = Adapted(net.model, Plan(entries, net.plan.rules, banks))
        config, tensors = document(part, {n: adapter[n] for n in (*entries, *banks)}, task)
        out[kind.lower()] = config, with_buffers(tensors, buffers or {} if kind == first else {})
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
    net: Adapted, adapter: Mapping[str, Any], task: str | None = None, beyond: Beyond | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(configuration, tensors) of an adapter. beyond: what the model holds beyond its base, to be in the file."""
    beyond = beyond or Beyond()
    model = PeftNames(Model.of(net.model))
    for name, entry in net.plan.items():
        leaf = adapter[name]
        if is_expression(leaf) or leaf.keys() != entry.spec.keys():
            raise ValueError(
                f"{name}: PEFT has no sums, scalings or prepared adapters; save the adapter they were made from, or "
                "a LoRA of them, peftfn.to_lora(net, adapter, rank)"
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
        return with_grown(copies_alone(net, adapter, model, beyond), beyond, {}, model)
    odd = [n for n, e in main.items() if not configs.declared(type(e.method))]
    if odd:
        cure = ": peftfn.to_lora(net, adapter) converts it" if main[odd[0]].method.mergeable else ""
        raise ValueError(f"PEFT has no {main[odd[0]].method}, the method at {some(odd)}{cure}")
    config, out = _adapted(main, adapter, model)
    for name, entry in tokens.items():
        place = model.written(entry.site, ())
        given = {f"{TOKENS}.{k}": t for k, t in tensors(place, entry.method, {**entry.frozen, **adapter[name]}).items()}
        out |= {f"{PREFIX}{place.path}.{k}": t for k, t in given.items()}
        indices = described(entry.method).written(entry.method)["token_indices"]
        config["trainable_token_indices"] = (config.get("trainable_token_indices") or {}) | {place.module: indices}
    paths = {p.module: p.path for p in (model.written(e.site, ()) for e in main.values())}
    copies_beside(full, adapter, model, config, out, paths, table.CLASSIFIERS.get(task or "", ()), beyond)
    paths |= {m: f"{m}.{TOKENS}" for m in (e.site.module for e in tokens.values())}
    return with_grown((config, out), beyond, paths, model)


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
            + ", ".join(f"{t} at {some(n)}" for t, n in types.items())
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
    parameters = [n for n, e in main.items() if layer_of(e, model) in ("stack", "stack_t", "parameter")]
    places = {n: model.written(e.site, parameters) for n, e in main.items()}
    supported(kind, main, each, model)
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
    config |= common(kind, each, {n: p.module for n, p in places.items()}, model)
    modules = list(dict.fromkeys(model.owner(places[n].module) for n in main if n not in parameters))
    not_experts(kind, modules, model)
    not_renamed(kind, modules, model)
    ahead = {places[n].module for n in main if each[n].get("feedforward_modules")}
    if "feedforward_modules" in config:
        config["target_modules"], config["feedforward_modules"] = two_targets(modules, ahead, model)
    else:
        config["target_modules"] = chosen_targets(kind, main, {n: p.module for n, p in places.items()}, modules, model)
    if "save_indices" in table.DEFAULTS.get(kind, {}):
        config["save_indices"] = True
    if parameters:
        config["target_parameters"] = parameters
    if any(e.site.kind == "linear_t" for e in main.values()):
        config["fan_in_fan_out"] = True
    same(config, main, places, adapter, model)
    return config, out
