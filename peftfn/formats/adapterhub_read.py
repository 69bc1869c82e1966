"""What the keys of AdapterHub's files mean at the places of a model: the groups of keys, LoRA and ReFT."""

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfn.core.method import Method
from peftfn.formats import adapterhub_bottleneck, adapterhub_prefix
from peftfn.formats.adapterhub_place import Read
from peftfn.formats.orthogonal import orthogonal
from peftfn.formats.tensor_files import Tensors as File
from peftfn.methods.modules.direft import DiReFT
from peftfn.methods.modules.loreft import LoReFT
from peftfn.methods.modules.noreft import NoReFT
from peftfn.methods.weights.lora import LoRA
from peftfn.model.model import Model

_LEGACY = re.compile(r"\b(?:attention|layer)_text_(?:task|lang)_adapters\b")
_KEY = re.compile(
    r"(?P<at>.*?)\.?\b(?P<kind>adapters|loras|refts|prefix_tunings|shared_parameters|prefix_gates|prompt_tunings)"
    r"\.(?P<name>[^.]+)\.(?P<rest>.+)"
)
_ARCHITECTURE = {"adapters": None, "loras": "lora", "refts": "reft", "prefix_tunings": "prefix_tuning"}
"""Kind of keys → the `architecture` of its configuration."""
_NO_FORM = {
    "prefix_gates": "gates of a prefix have no form here",
    "prompt_tunings": "its prompts stand behind an embedding's positions and norms, and pf.PromptTuning before them",
}


class Reader(Read):
    """All of one file."""

    def __init__(self, where: Path, whole: Mapping[str, Any], config: Mapping[str, Any], model: Model, method: Any):
        super().__init__(where, config, model)
        self.whole, self.method = whole, method
        self.stray: list[str] = []

    def all(self, file: File) -> None:
        groups: dict[tuple[str, str], dict[str, str]] = {}
        name = self.whole.get("name")
        for key in file.meta:
            m = _KEY.fullmatch(_LEGACY.sub("adapters", key))
            if m is None or (name is not None and m["name"] != name):
                self.stray.append(key)
                continue
            groups.setdefault((m["kind"], m["at"]), {})[m["rest"]] = key
        kinds = {kind for kind, _ in groups} - {"shared_parameters"}
        if any("invertible" in key for key in self.stray):
            raise ValueError(f"{self.where}: invertible adapters have no form here")
        for kind in kinds & _NO_FORM.keys():
            raise ValueError(f"{self.where}: {_NO_FORM[kind]}")
        configs = list(self.config.get("configs") or []) or [self.config]
        if not kinds or len(configs) != len(kinds):
            raise ValueError(
                f"{self.where}: its tensors are of {sorted(kinds) or 'no method'}, and its configurations are "
                f"{len(configs)}; this release reads one of each method"
            )
        if self.method is not None and "refts" not in kinds:
            raise ValueError(f"load: method= says which ReFT a file has, and {self.where} has none: leave it out")
        for kind in sorted(kinds):
            self.config = self._of(kind, configs)
            at = {
                a: ({k: partial(file.tensor, key) for k, key in ts.items()}, ts)
                for (n, a), ts in groups.items()
                if n == kind
            }
            if kind == "prefix_tunings":
                adapterhub_prefix.read(self, at)
                continue
            shared = {k: key for (n, _), ts in groups.items() if n == "shared_parameters" for k, key in ts.items()}
            for path, (tensors, keys) in at.items():
                if kind == "adapters":
                    adapterhub_bottleneck.read(self, path, tensors, file, keys)
                elif kind == "loras":
                    self._lora(path, tensors, file, keys)
                else:
                    self._reft(path, tensors, file, keys)
            if kind == "adapters":
                adapterhub_bottleneck.share(self, {k: partial(file.tensor, key) for k, key in shared.items()})
            elif shared:
                self.stray += sorted(shared.values())

    def _of(self, kind: str, configs: list[Any]) -> Mapping[str, Any]:
        """The configuration of one kind of keys."""
        if len(configs) == 1:
            return configs[0]  # type: ignore[no-any-return]
        found = [c for c in configs if c.get("architecture") == _ARCHITECTURE[kind]]
        if len(found) != 1:
            raise ValueError(f"{self.where}: {len(found)} of its configurations are of {kind}; this release reads one")
        return found[0]  # type: ignore[no-any-return]

    # LoRA.

    def _lora(self, at: str, tensors: dict[str, Any], file: File, keys: Mapping[str, str]) -> None:
        for option, value in {"composition_mode": "add", "use_gating": False, "use_dora": False}.items():
            self.one(option, value)
        if tensors.keys() != {"lora_A", "lora_B"}:
            raise ValueError(
                f"{self.where}: the LoRA at {at} has {sorted(tensors)}; this release reads lora_A and lora_B"
            )
        rank = self.config.get("r", 8)
        if (rows := file.meta[keys["lora_A"]].shape[0]) != rank:
            raise ValueError(
                f"{self.where}: the LoRA at {at} has {rows} rows for r={rank}, of attn_matrices in a fused projection, "
                "which has no form here"
            )
        old = re.fullmatch(r"adapters\.(\d+)\.(\d+)\..*", str(self.whole.get("version", "")))
        alpha = rank if old and (int(old[1]), int(old[2])) < (1, 1) else self.config.get("alpha", 8)
        a, b = tensors["lora_A"], tensors["lora_B"]
        self.put(f"{self.module(at)}.weight", LoRA(rank=rank, alpha=alpha), {"a": a, "b": b})

    # ReFT.

    def _reft(self, at: str, tensors: dict[str, Any], file: File, keys: Mapping[str, str]) -> None:
        first, last = self.config.get("prefix_positions", 0), self.config.get("suffix_positions", 0)
        if not first and not last:
            raise ValueError(f"{self.where}: it changes no position (prefix_positions and suffix_positions are 0)")
        tied = bool(self.config.get("tied_weights", False))
        orthogonal = bool(self.config.get("orthogonality", True))
        cls: Any = self._which(orthogonal)
        more = {} if cls is not DiReFT else {"orthogonal": orthogonal}
        both = bool(first and last)
        method = cls(
            self.config["r"],
            first,
            last,
            tied or not both,
            self.model_width(file, keys),
            activation=self.activation(),
            **more,
        )
        units = {0: ""} if tied else {0: "first_", 1: "last_"} if both else {0 if first else 1: ""}
        leaf: dict[str, Any] = {}
        for i, name in units.items():
            part = {k.removeprefix(f"units.{i}."): f for k, f in tensors.items() if k.startswith(f"units.{i}.")}
            leaf |= {f"{name}{k}": f for k, f in _unit(part, cls is NoReFT).items()}
        self.put(self.module(at.removesuffix(".reft_layer")), method, leaf)

    def _which(self, orthogonal: bool) -> type[Method]:
        """The ReFT's class. The package's configurations leave out whether it subtracts the projection, so that what
        it writes of NoReFT and of DiReFT is the same; of its classes, LoReFT alone has orthonormal rows."""
        subtracts, usual = self.config.get("subtract_projection"), LoReFT if orthogonal else NoReFT
        known = (usual, DiReFT) if subtracts is None else (usual,) if subtracts else (DiReFT,)
        said = known[0] if self.method is None and (orthogonal or len(known) == 1) else type(self.method)
        if (found := next((c for c in known if c is said), None)) is None:
            cures = " or ".join(f"load(…, method=pf.{c.__name__}())" for c in known)
            raise ValueError(f"{self.where}: it is of {' or '.join(c.__name__ for c in known)}. Say which: {cures}")
        return found

    def model_width(self, file: File, keys: Mapping[str, str]) -> int:
        return int(next(file.meta[k].shape[1] for r, k in keys.items() if r.endswith("learned_source.weight")))


def _unit(part: dict[str, Any], free: bool) -> dict[str, Any]:
    projection = {k.removeprefix("projection."): f for k, f in part.items() if k.startswith("projection.")}
    return {"proj" if free else "r": partial(_rows, projection), "w": part["learned_source.weight"]} | {
        "b": part["learned_source.bias"]
    }


def _rows(saved: Mapping[str, Any]) -> Tensor:
    """A projection [rank, d], of what torch's orthogonal parametrization keeps of it."""
    state = {k: f() for k, f in saved.items()}
    if "weight" in state:
        return state["weight"]
    return orthogonal(state)
