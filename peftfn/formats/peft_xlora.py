"""PEFT's X-LoRA: a folder with the classifier, whose configuration names the folders of its experts."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfn.core.fields import MOST_ROUNDS
from peftfn.core.plan import Plan
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_extra, peft_table
from peftfn.formats.card import write_card
from peftfn.formats.files import mismatch, write
from peftfn.formats.peft import CONFIG, TENSORS
from peftfn.formats.tensor_files import opened
from peftfn.methods.weights.lora import LoRA
from peftfn.net.net import Adapted

TYPE = "XLORA"
HEAD = "base_model.internal_xlora_classifier.layers"
_KEY = re.compile(r"(?:.*\.)?internal_xlora_classifier\.layers\.(\d+)\.(weight|bias)")
FIELDS: dict[str, tuple[str, Any]] = {
    "depth": ("xlora_depth", 1),
    "size": ("xlora_size", 2048),
    "hidden": ("hidden_size", 4096),
    "layerwise": ("layerwise_scalings", False),
    "k": ("top_k_lora", None),
    "softmax": ("enable_softmax", True),
    "softmax_top_k": ("enable_softmax_topk", False),
    "temperature": ("softmax_temperature", 1.0),
    "weight": ("global_scaling_weight", 1.0),
    "dropout": ("xlora_dropout_p", 0.2),
}
"""Our word → (PEFT's, its default)."""
_IDLE = peft_extra.EVERY | {
    peft_extra.REPLICATION,
    "adapters",
    "use_trainable_adapters",
    "inference_mode",
    "peft_type",
    "peft_version",
}
KINDS = frozenset({"linear", "linear_t", "embedding", "conv"})
"""Sites whose LoRA PEFT weighs; another kind of layer it would leave as it is."""


@dataclass(frozen=True)
class Saved:
    """What a folder has: the mixture's fields, the folders of its experts in the order of the classifier's outputs,
    and the classifier's tensors, "0.weight", "0.bias", "1.weight", …, its linear layers counted.
    """

    fields: dict[str, Any]
    experts: list[str]
    classifier: dict[str, Tensor]


def read(folder: Path, experts: Sequence[str] | None) -> Saved:
    """The configuration and classifier of a folder. experts: folders in place of those that the configuration names."""
    where = folder / CONFIG
    config = configs.read(where)
    if config["peft_type"] != TYPE:
        raise ValueError(f"{where}: peft_type is {config['peft_type']!r}, not {TYPE}: read it with peftfn.load")
    known = {theirs for theirs, _ in FIELDS.values()}
    for key, value in config.items():
        if key == "scaling_pass_value" and value not in (0, 0.0):
            raise ValueError(
                f"{where}: {key} is {value!r}: PEFT's classifier sees a model whose experts all act by as much, and "
                "here it sees the base"
            )
        if key not in known | _IDLE and value not in (None, False, 0, "", [], {}):
            raise ValueError(f"{where}: {key} is {value!r}, which X-LoRA does not have: the outputs may differ")
    fields = {ours: config.get(theirs, default) for ours, (theirs, default) in FIELDS.items()}
    depth = fields["depth"]
    if type(depth) is not int or not 1 <= depth <= MOST_ROUNDS:
        raise ValueError(f"{where}: xlora_depth is {depth!r}; it must be from 1 to {MOST_ROUNDS}")
    paths = list(experts) if experts is not None else _experts(config, where, folder)
    with opened(folder / TENSORS) as file:
        found = {k: m for k in file.meta if (m := _KEY.fullmatch(k))}
        numbers = sorted({int(m[1]) for m in found.values()})
        named = {f"{numbers.index(int(m[1]))}.{m[2]}": k for k, m in found.items()}
        want = {f"{i}.{k}" for i in range(depth) for k in ("weight", "bias")}
        if stray := file.meta.keys() - found.keys():
            raise mismatch(file.where, (), stray)
        if named.keys() != want or len(named) != len(found):
            raise ValueError(
                f"{file.where}: it has {len(found)} tensors, and a classifier of xlora_depth {depth} has "
                f"{len(want)}. PEFT {peft_table.VERSION} leaves out those with an expert's name in their keys: "
                "write them yourself, safetensors.torch.save_file({k: t for k, t in model.state_dict().items() if "
                f"'internal_xlora_classifier' in k}}, {TENSORS!r})"
            )
        return Saved(fields, paths, {name: file.tensor(key) for name, key in sorted(named.items())})


def _experts(config: Mapping[str, Any], where: Path, folder: Path) -> list[str]:
    """The experts' folders in the order of the classifier's outputs. PEFT gives the i-th of `adapters` the name i, and
    its outputs the order of the names in `adapters`."""
    named = config.get("adapters")
    if not isinstance(named, dict) or not named or not all(map(_is_path, named.values())):
        raise ValueError(f"{where}: adapters is {str(named)[:80]}; it must have the path of each expert")
    if sorted(named) != sorted(map(str, range(len(named)))):
        raise ValueError(
            f"{where}: adapters are called {', '.join(map(repr, named))[:80]}, and PEFT {peft_table.VERSION} reads "
            f"none but '0' to '{len(named) - 1}': give their folders in the order of the classifier's outputs, "
            "experts=[…]"
        )
    paths = list(named.values())
    found = []
    for name in named:
        path = paths[int(name)]
        beside = folder / Path(path).name  # where `save` puts them, which a moved folder has with it
        found.append(str(beside) if (beside / CONFIG).is_file() else path)
    return found


def _is_path(value: Any) -> bool:
    """Whether a value may be a path: a system refuses others in ways of its own."""
    if not isinstance(value, str):
        return False
    parts = value.split("/")
    return bool(value) and "\0" not in value and len(value) < 4096 and all(len(p.encode()) < 256 for p in parts)


def check_expert(plan: Plan, where: object) -> None:
    """ValueError for what PEFT's X-LoRA does not weigh."""
    for name, e in plan.items():
        if type(e.method) is not LoRA or e.method.lora_bias or e.site.kind not in KINDS or len(e.site.shape) == 3:
            raise ValueError(
                f"{where}: {name}: X-LoRA's experts are LoRAs without a bias, at linear layers, embeddings and "
                f"nn.Conv2d, and this is {e.method} at a {e.site.kind} {list(e.site.shape)}"
            )


def check_extra(extra: Mapping[str, Any]) -> None:
    """ValueError for keys that X-LoRA, or a LoRA as its expert, does not have."""
    if odd := sorted(extra.keys() - peft_extra.EVERY - {peft_extra.REPLICATION}):
        raise ValueError(f"save: extra has {odd[0]!r}, which X-LoRA does not have")


def save(
    folder: Path,
    net: Adapted,
    fields: Mapping[str, Any],
    experts: Sequence[str],
    classifier: Mapping[str, Tensor],
    extra: Mapping[str, Any] | None,
) -> None:
    """Write the two files, and a card."""
    check_expert(net.plan, "save")
    stride = 3 if fields["dropout"] else 2  # Linear, ReLU and, where there is one, Dropout
    tensors = {
        f"{HEAD}.{int(name.partition('.')[0]) * stride}.{name.partition('.')[2]}": t for name, t in classifier.items()
    }
    config: dict[str, Any] = {theirs: fields[ours] for ours, (theirs, _) in FIELDS.items()}
    config |= {"peft_type": TYPE, "peft_version": peft_table.VERSION, "inference_mode": True, "task_type": None}
    config |= {"scaling_pass_value": 0.0, "use_trainable_adapters": False}
    config |= {**peft_extra.about(net.model), **peft_extra.given(extra, net)}
    config["adapters"] = {str(j): path for j, path in enumerate(experts)}  # unsorted: "10" is not after "1"
    write(folder / TENSORS, tensors)
    write(folder / CONFIG, json.dumps(config, indent=2, ensure_ascii=False))
    write_card(folder, config, tensors, net.plan)
