"""What the readers of AdapterHub's keys share: the configuration, the model's modules, and what was read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftfn.core.method import Method
from peftfn.formats.binding import ACTIVATIONS
from peftfn.methods.modules.bottleneck import Activation
from peftfn.model.model import Model

_ACTIVATIONS: dict[str, Activation] = {
    **ACTIVATIONS,
    "gelu_orig": "gelu",
    "gelu_new": "gelu_tanh",
    "leakyrelu": "leaky_relu",
}


class Read:
    """What a file says, found at the places of a model: `methods` and `leaves`, by site, and `banks`, by bank."""

    def __init__(self, where: Path, config: Mapping[str, Any], model: Model):
        self.where, self.config, self.model = where, config, model
        self.methods: dict[str, Method] = {}
        self.leaves: dict[str, dict[str, Any]] = {}
        self.bank: dict[str, Any] = {}

    def one(self, option: str, value: Any) -> None:
        """ValueError where an option of the configuration is there, and is not this."""
        if (have := self.config.get(option, value)) != value:
            raise ValueError(f"{self.where}: {option} is {have!r}; this release reads {value!r}")

    def module(self, path: str) -> str:
        """The model's module at a path of theirs, where the base model may have a prefix, or none."""
        found = {n for n in self.model.modules if n == path or n.endswith(f".{path}")} if path else set()
        found = found or ({path.partition(".")[2]} & self.model.modules.keys())
        if len(found) != 1:
            raise ValueError(f"{self.where}: the model has {len(found)} modules at {path}")
        return found.pop()

    def activation(self) -> Activation:
        name = self.config.get("non_linearity")
        if name is None:
            return "none"
        if (ours := _ACTIVATIONS.get(str(name).lower())) is None:
            raise ValueError(f"{self.where}: non_linearity is {name!r}; this release reads {', '.join(_ACTIVATIONS)}")
        return ours

    def put(self, site: str, method: Method, leaf: dict[str, Any]) -> None:
        if site in self.methods:
            raise ValueError(f"{self.where}: two adapters of the file come to one place, {site}")
        self.methods[site], self.leaves[site] = method, leaf
