"""The numbers in kohya's and diffusers' files: alpha as a tensor, in a configuration, or in the header."""

import json
import math
from collections.abc import Mapping
from typing import Any

from peftfn.formats import peft_config as configs
from peftfn.formats.tensor_files import Tensors
from peftfn.methods.parts.lowrank import Ranked
from peftfn.methods.weights.loha import LoHa
from peftfn.methods.weights.lokr import LoKr
from peftfn.model.site import Site

FLAT_CONFIG = frozenset({"r", "lora_alpha", "peft_type"})
"""Keys of diffusers' configuration where the file is of one model, so that no part's name stands before them."""
ALPHAS = ("ss_network_alpha", "lora_alpha", "network_alpha", "alpha")
RANKS = ("ss_network_dim", "lora_rank", "network_dim", "rank", "r", "dim")
"""What tools call alpha and rank in a file's header."""


class Scales:
    """What a file says of its layers' scales. called: module → its name in the file."""

    def __init__(self, file: Tensors, called: Mapping[str, str]):
        self.file, self.where, self.called = file, file.where, called
        self.configs = self.metadata()

    def metadata(self) -> dict[str, Any]:
        """diffusers' configuration, `<part>.<PEFT's key>` → value."""
        text = self.file.metadata.get("lora_adapter_metadata", "{}")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{self.where}: lora_adapter_metadata is not valid JSON: {e}") from e
        if not isinstance(found, dict):
            raise ValueError(f"{self.where}: lora_adapter_metadata is {text[:80]}; it must be an object")
        return found

    def number(self, key: str, least: float) -> float:
        """The one number in a tensor. ValueError for another shape, and for a value below `least` or not finite."""
        if self.file.meta[key].numel() != 1:
            raise ValueError(f"{self.where}: {key} has shape {list(self.file.meta[key].shape)}; it must be one number")
        value = float(self.file.tensor(key))
        if not least <= value < math.inf:
            bound = "above 0" if least else "from 0 on"
            raise ValueError(f"{self.where}: {key} is {value}; it must be a finite number {bound}")
        return value

    def alpha(self, site: Site, keys: Mapping[str, str], rank: int) -> float | None:
        """The numerator of the scale; None where it is the rank."""
        if (key := keys.get("alpha")) is not None:
            value = self.number(key, math.ulp(0.0))
        elif self.configs:
            part, _, path = self.called[site.module].partition(".")
            mine = {k.removeprefix(f"{part}."): v for k, v in self.configs.items() if k.startswith(f"{part}.")}
            if not mine and FLAT_CONFIG & self.configs.keys():  # of one model alone
                mine, path = self.configs, self.called[site.module]
            if not mine:
                return None
            config = configs.checked({"peft_type": "LORA", **mine}, self.where)
            method = configs.method(config, path, site.kind, self.where)
            if not isinstance(method, Ranked | LoHa | LoKr):
                raise ValueError(f"{self.where}: lora_adapter_metadata is of {method}, and the tensors are not")
            value = method.scale * rank
        elif (header := self.header()) is not None:
            value = header * rank
        else:
            return None
        return None if value == rank else value

    def header(self) -> float | None:
        """The scale of all layers in the file's header: alpha over the rank."""
        said = {k: self.file.metadata[k] for k in (*ALPHAS, *RANKS) if k in self.file.metadata}
        try:
            numbers = {k: float(v) for k, v in said.items()}
        except ValueError as e:
            raise ValueError(f"{self.where}: the header's {said} must be numbers") from e
        alpha = next((numbers[k] for k in ALPHAS if k in numbers), None)
        rank = next((numbers[k] for k in RANKS if k in numbers), None)
        if alpha is None:
            return None
        if rank is None or not (0 < alpha < math.inf and 0 < rank < math.inf):
            raise ValueError(f"{self.where}: the header's {said} must be an alpha and a rank above 0")
        return alpha / rank
