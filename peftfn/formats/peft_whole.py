"""What PEFT saves whole beside a method, or alone: modules_to_save, trained biases, buffers, and LN-tuning's copies."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from peftfn.core.method import Leaf
from peftfn.core.plan import Entry
from peftfn.formats import peft_table as table
from peftfn.formats.beyond import Beyond
from peftfn.formats.peft_common import targets
from peftfn.formats.peft_keys import BASE, PREFIX, PeftNames
from peftfn.formats.peft_limits import some
from peftfn.net.net import Adapted
from peftfn.tensors.precision import wide


def copies_beside(
    full: Mapping[str, Entry],
    adapter: Mapping[str, Any],
    model: PeftNames,
    config: dict[str, Any],
    out: Leaf,
    adapted: Mapping[str, str],
    heads: Iterable[str],
    beyond: Beyond,
) -> None:
    """Trained copies: biases of adapted layers under `bias`, all others as modules_to_save.

    adapted: module → PEFT's path of it. heads: names of modules that PEFT saves in any case. beyond: what the model
    holds beyond its base.
    """
    values = {n: wide(model.weights[n]) + wide(e.site.original(adapter[n]["diff"])) for n, e in full.items()}
    biases = {n for n in full if n.endswith("bias") and n.rpartition(".")[0] in adapted}
    if biases:
        every = {s.name for s in model.sites.values() if s.name.endswith("bias")}
        own = {n for n in every if n.endswith(".bias") and n.rpartition(".")[0] in adapted}
        only = table.BIAS.get(config["peft_type"])
        if only is None:
            raise ValueError(
                f"PEFT's {config['peft_type']} cannot train biases; this plan trains {some(sorted(biases))}"
            )
        if every <= full.keys():
            config["bias"], biases = "all", every
        elif biases == own:
            config["bias"] = only
        else:
            raise ValueError(f"PEFT trains all adapted layers' biases or none; {some(sorted(own - biases))} is not")
        for n in biases:
            module, _, attr = n.rpartition(".")
            path = f"{adapted[module]}.{BASE}" if module in adapted else module
            out[f"{PREFIX}{path}.{attr}"] = values[n]
    fresh = [m for m in _owners(beyond) if m not in adapted]
    modules = _saved(
        [*(e.site.module for n, e in full.items() if n not in biases), *fresh], full, model, adapted, heads
    )
    if not modules:
        return
    _nameable(modules)
    caught = [m for m in model.modules if any(m.endswith(n) for n in modules)]
    clash = [m for m in caught if any(a == m or a.startswith(f"{m}.") for a in adapted)]
    if clash:
        raise ValueError(f"PEFT saves whole modules, and {some(clash)} also have another method")
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


def copies_alone(
    net: Adapted, adapter: Mapping[str, Any], model: PeftNames, beyond: Beyond
) -> tuple[dict[str, Any], Leaf]:
    """A plan of trained parameters alone: what PEFT calls LN-tuning, for any kind of module."""
    modules = list(dict.fromkeys([*(e.site.module for e in net.plan.values()), *_owners(beyond)]))
    _nameable(modules)
    out: Leaf = {}
    for m in modules:
        for attr, p in model.modules[m].named_parameters():
            n = f"{m}.{attr}"
            diff = net.plan[n].site.original(adapter[n]["diff"]) if n in net.plan else 0
            out[f"{PREFIX}{m}.ln_tuning_layers.{attr}"] = wide(p.detach()) + diff
    config = {"peft_type": "LN_TUNING", "peft_version": table.VERSION, "task_type": None, "inference_mode": True}
    return config | {"target_modules": targets(modules, model.modules), "modules_to_save": None}, out


def _owners(beyond: Beyond) -> list[str]:
    """The modules of the parameters that the base does not have."""
    return list(dict.fromkeys(n.rpartition(".")[0] for n in beyond.fresh))


def with_grown(
    document: tuple[dict[str, Any], Leaf], beyond: Beyond, adapted: Mapping[str, str], model: PeftNames
) -> tuple[dict[str, Any], Leaf]:
    """The document with the base's values of grown embeddings, and of adapted layers that the base does not have.

    adapted: module → PEFT's path of it, of those with a method.
    """
    config, out = document
    for name in (*beyond.grown, *beyond.fresh):
        module, _, attr = name.rpartition(".")
        path = f"{adapted[module]}.{BASE}" if module in adapted else module
        inside = (f"{PREFIX}{module}.{attr}", f"{PREFIX}{module}.ln_tuning_layers.{attr}", f"{PREFIX}{path}.{attr}")
        if not any(key in out for key in inside):  # else it is trained as a whole
            out[inside[2]] = model.weights[name].detach()
    return config, out


def _nameable(modules: list[str]) -> None:
    if "" in modules:
        raise ValueError("PEFT saves whole modules by name, and this parameter belongs to the model itself")


def with_buffers(tensors: dict[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with these values of buffers. ValueError for one whose module is not saved whole."""
    keys = {f"{PREFIX}{name}": t for name, t in buffers.items()}
    if odd := sorted(keys.keys() - tensors.keys()):
        name = odd[0].removeprefix(PREFIX)
        raise ValueError(
            f"{name}: PEFT saves buffers of modules that are trained whole, and {name.rpartition('.')[0]} is not: "
            "give it a rule, Full(), or save in the native format"
        )
    return tensors | keys
