"""What readers share that find their sites by themselves, without PEFT's tables: the plan, and what is saved whole."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from peftfn.core.make import make
from peftfn.core.method import Method
from peftfn.core.plan import Plan
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.modules.bottleneck import Activation
from peftfn.model.model import Model
from peftfn.tensors.precision import wide

ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""What most packages call an activation → our name."""


def exactly(*names: str) -> str:
    """The pattern of these sites alone."""
    return f"^({'|'.join(map(re.escape, names))})$" if len(names) > 1 else f"^{re.escape(*names)}$"


def planned(model: Model, rules: Mapping[str, Method], where: Path) -> Plan:
    """The plan of the rules. ValueError, naming the file, where a method does not fit its site."""
    try:
        return make(model, rules, 0)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{where}: its method does not fit the model: {e}") from e


def whole(file: Tensors, keys: Mapping[str, str], model: Model) -> dict[str, dict[str, Tensor]]:
    """The leaves of `Full` of what the file saves whole, as differences to the base. keys: parameter → key."""
    out = {}
    for name, key in keys.items():
        w, site = model.weights[name], model.sites[name]
        file.check(key, w.shape)
        out[name] = {"diff": site.canonical(file.tensor(key, w.device)) - wide(site.canonical(w))}
    return out
