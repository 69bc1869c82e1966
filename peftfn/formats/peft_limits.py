"""What PEFT does not take, though it has the method: ValueError, naming the sites, before anything is written."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from peftfn.core.plan import Entry
from peftfn.formats import peft_table as table
from peftfn.formats.peft_keys import PeftNames
from peftfn.formats.peft_names import table as old_names


def supported(kind: str, main: Mapping[str, Entry], each: Mapping[str, dict[str, Any]], model: PeftNames) -> None:
    """ValueError for a layer that PEFT does not adapt with this method, or not as we do."""
    for n, e in main.items():
        layer, module = layer_of(e, model), model.modules[e.site.module]
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


def layer_of(entry: Entry, model: PeftNames) -> str:
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


def not_experts(kind: str, modules: Iterable[str], model: PeftNames) -> None:
    """ValueError for layers next to stacked experts that PEFT takes for the experts, by their last names."""
    if kind != "LORA" or (found := _conversions(model)) is None:
        return
    model_type, mapping = found
    known = getattr(mapping, "_MODEL_TO_CONVERSION_PATTERN", {}) | {"mixtral": "mixtral"}
    base = known.get(model_type, "")
    if odd := [m for m in modules if m.rpartition(".")[2] in table.RENAMED.get(base, ())]:
        raise ValueError(
            f"{some(odd)}: PEFT takes this name, in a {base} model, for experts in the layout of transformers 4, and "
            "would adapt the stacked experts: use the native format"
        )


def not_renamed(kind: str, modules: Iterable[str], model: PeftNames) -> None:
    """ValueError for layers whose names are old names of others to transformers, as `shared_experts` is where an older
    `shared_expert` was: PEFT changes them when it loads the file, and leaves their LoRAs as they start."""
    if kind != "LORA" or (found := _conversions(model)) is None:
        return
    model_type, mapping = found
    rename = old_names(model.model)
    if rename is None or mapping.get_checkpoint_conversion_mapping(model_type) is None:
        return
    new = {m: rename(f"{m}.weight").removesuffix(".weight") for m in modules}
    prefix = f"{getattr(model.model, 'base_model_prefix', '')}."  # PEFT takes it away again
    if odd := [m for m, name in new.items() if name.removeprefix(prefix) != m.removeprefix(prefix)]:
        raise ValueError(
            f"{some(odd)}: PEFT renames this layer to {new[odd[0]]} when it loads a file, by transformers' table of "
            "old names, and loses its LoRA: use the native format"
        )


def _conversions(model: PeftNames) -> tuple[str, Any] | None:
    """(the model's type, transformers' module of conversions) of a model that PEFT converts files for."""
    model_type = getattr(getattr(model.model, "config", None), "model_type", None)
    if not isinstance(model_type, str) or "transformers" not in sys.modules:
        return None
    try:
        from transformers import conversion_mapping
    except ImportError:  # an older release, whose experts are layers
        return None
    return model_type, conversion_mapping


def some(names: list[str]) -> str:
    return f"{names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
