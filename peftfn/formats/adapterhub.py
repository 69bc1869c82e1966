"""AdapterHub's folders (the `adapters` package), to read: bottlenecks, LoRA and ReFT, and the heads beside them.

`adapter_config.json` has the architecture under "config"; keys are the places of a model that the package has changed:
`encoder.layer.0.output.adapters.NAME.adapter_down.0.weight`. Its bottlenecks stand inside of a residual connection:

    h + U act(D h)           for what a sub-layer returns (Houlsby's, "double_seq_bn")
    N(x + U act(D N(x)))     where a norm follows the residual connection x = h + input (Pfeiffer's, "seq_bn", in BERT)
    x + U act(D x)           where none does: Pfeiffer's in GPT-2 and Llama, on what a block returns
"""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from peftfn.core.method import Method
from peftfn.formats.binding import ACTIVATIONS, exactly, planned, whole
from peftfn.formats.files import Loaded, Options, mismatch, opened, read_json, unpickled
from peftfn.formats.files import Tensors as File
from peftfn.formats.orthogonal import orthogonal
from peftfn.methods.modules.bottleneck import Activation, Bottleneck
from peftfn.methods.modules.direft import DiReFT
from peftfn.methods.modules.loreft import LoReFT
from peftfn.methods.modules.noreft import NoReFT
from peftfn.methods.weights.full import Full
from peftfn.methods.weights.lora import LoRA
from peftfn.model.model import Model
from peftfn.net.net import Adapted

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter.safetensors", "pytorch_adapter.bin"
HEAD, HEAD_PICKLE = "model_head.safetensors", "pytorch_model_head.bin"
_LEGACY = re.compile(r"\b(?:attention|layer)_text_(?:task|lang)_adapters\b")
_KEY = re.compile(r"(?P<at>.*?)\.?\b(?P<kind>adapters|loras|refts)\.(?P<name>[^.]+)\.(?P<rest>.+)")
_ACTIVATIONS: dict[str, Activation] = {
    **ACTIVATIONS,
    "gelu_orig": "gelu",
    "gelu_new": "gelu_tanh",
    "leakyrelu": "leaky_relu",
}
_PLAIN = {
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "is_parallel": False,
    "use_gating": False,
    "adapter_residual_before_ln": False,
    "phm_layer": False,
}
"""Options of a bottleneck that have one value here."""
_IN_BLOCK = {"attention_adapters": ("attn", "self_attn", "attention"), "output_adapters": ("mlp", "ffn")}
"""What holds an adapter in a block → the sub-layer that it follows, under one of these names."""
_NORMS = {"attention_adapters": "sa_layer_norm", "output_adapters": "output_layer_norm"}  # DistilBERT's


def is_mine(path: Path) -> bool:
    return (path / CONFIG).is_file() and any((path / f).is_file() for f in (TENSORS, PICKLE))


def save(folder: Path, net: Adapted, adapter: Mapping[str, Any], **options: Any) -> None:
    raise ValueError("save: AdapterHub's format is read, not written: use format='native'")


def load(folder: Path, model: Model, options: Options, method: Method | None = None) -> Loaded:
    """The adapter in the folder, with the head beside it if the model has such a head. ValueError for what its
    architecture would mean and the model's, or this release's, cannot.

    method: which ReFT it is; its fields are the file's.
    """
    where = folder / CONFIG
    options.only(where)
    described = read_json(where)
    config = dict(described.get("config") or {}) if isinstance(described, dict) else {}
    if not config:
        raise ValueError(f"{where}: it has no architecture under 'config'")
    if "version" not in described and config.get("non_linearity") == "gelu":
        config["non_linearity"] = "gelu_new"  # as its first versions called it
    with ExitStack() as files:
        file = _file(files, folder, (TENSORS, PICKLE), options)
        if file is None:
            raise FileNotFoundError(f"{folder} has no {TENSORS}")
        read = _Reader(where, described, config, model, method)
        try:
            read.all(file)
        except (KeyError, TypeError) as e:
            raise ValueError(f"{where}: it does not have what its architecture has: {type(e).__name__}: {e}") from e
        stray = list(read.stray)
        head = _file(files, folder, (HEAD, HEAD_PICKLE), options)
        heads = {} if head is None else _heads(head, model)
        if head is not None:
            stray += sorted(head.meta.keys() - heads.values())
        if options.strict and stray:
            raise mismatch(file.where, (), stray)
        rules: dict[str, Method] = {exactly(n): m for n, m in read.methods.items()}
        net = Adapted(model.root, planned(model, rules | {exactly(n): Full() for n in heads}, where))
        devices = {n: w.device for n in read.leaves if (w := model.weights.get(n)) is not None}  # others': `on_devices`
        adapter: dict[str, Any] = {
            n: {k: f().to(devices.get(n, "cpu")) for k, f in leaf.items()} for n, leaf in read.leaves.items()
        }
        for name, leaf in adapter.items():
            for k, t in leaf.items():
                if t.shape != net.plan[name].spec[k]:
                    raise ValueError(
                        f"{file.where}: {k} at {name} has shape {list(t.shape)}, not {net.plan[name].spec[k]}"
                    )
        adapter |= {} if head is None else whole(head, heads, model)
    base = described.get("model_name")
    extra = {"base_model_name_or_path": base} if isinstance(base, str) and base else {}
    return Loaded(net, {n: adapter[n] for n in net.plan}, unexpected=tuple(stray), extra=extra)


def _file(files: ExitStack, folder: Path, names: tuple[str, str], options: Options) -> File | None:
    safe, pickle = (folder / n for n in names)
    if safe.is_file():
        return files.enter_context(opened(safe))
    if not pickle.is_file():
        return None
    if not options.pickled:
        raise ValueError(f"{pickle} is a pickle: load(…, pickled=True) reads its tensors, and runs no code")
    return unpickled(pickle)


def _heads(file: File, model: Model) -> dict[str, str]:
    """parameter → key, for those that the model has in this shape."""
    named = {k: model.named[k].name for k in file.meta if k in model.named}
    return {n: k for k, n in named.items() if model.weights[n].shape == file.meta[k].shape}


class _Reader:
    """What the keys of a file mean at the places of a model."""

    def __init__(
        self,
        where: Path,
        whole: Mapping[str, Any],
        config: Mapping[str, Any],
        model: Model,
        method: Method | None,
    ):
        self.where, self.whole, self.config, self.model, self.method = where, whole, config, model, method
        self.methods: dict[str, Method] = {}
        self.leaves: dict[str, dict[str, Any]] = {}
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
        kinds = {kind for kind, _ in groups}
        if len(kinds) != 1:
            raise ValueError(f"{self.where}: its tensors are of {sorted(kinds) or 'no method'}; this release reads one")
        if any("invertible" in key for key in self.stray):
            raise ValueError(f"{self.where}: invertible adapters have no form here")
        if self.method is not None and kinds != {"refts"}:
            raise ValueError(f"load: method= says which ReFT a file has, and {self.where} has none: leave it out")
        read = {"adapters": self._bottleneck, "loras": self._lora, "refts": self._reft}[kinds.pop()]
        for (_, at), tensors in groups.items():
            read(at, {k: partial(file.tensor, key) for k, key in tensors.items()}, file, tensors)

    def _one(self, option: str, value: Any) -> None:
        if (have := self.config.get(option, value)) != value:
            raise ValueError(f"{self.where}: {option} is {have!r}; this release reads {value!r}")

    def _module(self, path: str) -> str:
        """The model's module at a path of theirs, where the base model may have a prefix, or none."""
        found = {n for n in self.model.modules if n == path or n.endswith(f".{path}")} if path else set()
        found = found or ({path.partition(".")[2]} & self.model.modules.keys())
        if len(found) != 1:
            raise ValueError(f"{self.where}: the model has {len(found)} modules at {path}")
        return found.pop()

    def _activation(self) -> Activation:
        name = self.config.get("non_linearity")
        if name is None:
            return "none"
        if (ours := _ACTIVATIONS.get(str(name).lower())) is None:
            raise ValueError(f"{self.where}: non_linearity is {name!r}; this release reads {', '.join(_ACTIVATIONS)}")
        return ours

    def _put(self, site: str, method: Method, leaf: dict[str, Any]) -> None:
        if site in self.methods:
            raise ValueError(f"{self.where}: two adapters of the file come to one place, {site}")
        self.methods[site], self.leaves[site] = method, leaf

    # Bottlenecks.

    def _bottleneck(self, at: str, tensors: dict[str, Any], file: File, keys: Mapping[str, str]) -> None:
        for option, value in _PLAIN.items():
            self._one(option, value)
        names = {"adapter_down.0.weight": "down", "adapter_down.0.bias": "c"}
        names |= {"adapter_up.weight": "up", "adapter_up.bias": "b"}
        if tensors.keys() != names.keys():
            raise ValueError(f"{self.where}: the adapter at {at} has {sorted(tensors)}; this release reads {[*names]}")
        scale = self.config.get("scaling", 1.0)
        if not isinstance(scale, float | int):
            raise ValueError(f"{self.where}: scaling is {scale!r}; this release reads a number")
        rank, dim = file.meta[keys["adapter_down.0.weight"]].shape
        site, of = self._place(at)
        method = Bottleneck(rank, self._activation(), of, float(scale), self.config.get("dropout", 0.0), dim)
        leaf = {ours: tensors[theirs] for theirs, ours in names.items()}
        self._put(site, method, leaf | {"b": lambda: scale * tensors["adapter_up.bias"]()})  # they scale the bias too

    def _place(self, at: str) -> tuple[str, Literal["output", "normed"]]:
        """(the module where a bottleneck acts, of what)."""
        normed = bool(self.config.get("original_ln_before", False))
        if normed:
            self._one("residual_before_ln", True)
        above, _, holder = at.rpartition(".")
        if holder not in _IN_BLOCK:  # BERT's: a module of a projection, a dropout and a norm
            path = self._module(at)
            children = dict(self.model.modules[path].named_children())
            if not {"dense", "LayerNorm"} <= children.keys():
                raise ValueError(f"{self.where}: {path} has no dense layer with a LayerNorm after it, as BERT's has")
            serial = f"{path}.dropout" if "dropout" in children else f"{path}.dense"
            return (f"{path}.LayerNorm", "normed") if normed else (serial, "output")
        block = self._module(above)
        children = dict(self.model.modules[block].named_children())
        follows = next((n for n in _IN_BLOCK[holder] if n in children), None)
        if follows is None or "cross_attn" in " ".join(children):
            raise ValueError(f"{self.where}: {block} has no part {' or '.join(_IN_BLOCK[holder])}")
        if not normed:
            return f"{block}.{follows}", "output"
        if isinstance(children.get(_NORMS[holder]), nn.Module):
            return f"{block}.{_NORMS[holder]}", "normed"
        if holder == "attention_adapters":
            raise ValueError(f"{self.where}: an adapter between the residual connections of {block} has no form here")
        return block, "output"

    # LoRA.

    def _lora(self, at: str, tensors: dict[str, Any], file: File, keys: Mapping[str, str]) -> None:
        for option, value in {"composition_mode": "add", "use_gating": False, "use_dora": False}.items():
            self._one(option, value)
        if tensors.keys() != {"lora_A", "lora_B"}:
            raise ValueError(
                f"{self.where}: the LoRA at {at} has {sorted(tensors)}; this release reads lora_A and lora_B"
            )
        rank = self.config.get("r", 8)
        old = re.fullmatch(r"adapters\.(\d+)\.(\d+)\..*", str(self.whole.get("version", "")))
        alpha = rank if old and (int(old[1]), int(old[2])) < (1, 1) else self.config.get("alpha", 8)
        a, b = tensors["lora_A"], tensors["lora_B"]
        self._put(f"{self._module(at)}.weight", LoRA(rank=rank, alpha=alpha), {"a": a, "b": b})

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
            activation=self._activation(),
            **more,
        )
        units = {0: ""} if tied else {0: "first_", 1: "last_"} if both else {0 if first else 1: ""}
        leaf: dict[str, Any] = {}
        for i, name in units.items():
            part = {k.removeprefix(f"units.{i}."): f for k, f in tensors.items() if k.startswith(f"units.{i}.")}
            leaf |= {f"{name}{k}": f for k, f in _unit(part, cls is NoReFT).items()}
        self._put(self._module(at.removesuffix(".reft_layer")), method, leaf)

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
