"""pyreft's folders, to read: one file for each intervention, `intkey_layer_0_comp_block_output_unit_pos_nunit_1#0.bin`.

They say what changes hidden states, and at which blocks; the positions were given with each batch, and the activation
in code. So `load` asks for both: `pf.load(folder, model, method=pf.LoReFT(first=1, last=1), pickled=True)`.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfn.core.method import Method
from peftfn.formats.binding import exactly, planned
from peftfn.formats.files import Loaded, Options, read_json
from peftfn.formats.orthogonal import orthogonal
from peftfn.formats.tensor_files import Tensors as File
from peftfn.formats.tensor_files import unpickled
from peftfn.methods.modules.consreft import ConsReFT
from peftfn.methods.modules.direft import DiReFT
from peftfn.methods.modules.lobireft import LobiReFT
from peftfn.methods.modules.loreft import LoReFT
from peftfn.methods.modules.noreft import NoReFT
from peftfn.model.model import Model
from peftfn.net.net import Adapted

CONFIG = "config.json"
_FILE = re.compile(
    r"intkey_(?:layer[._](?P<layer>\d+)[._]comp[._]block_output|comp[._](?P<path>.+?)[._]output)[._]unit[._]pos"
    r"[._]nunit[._]\d+#(?P<number>\d+)\.bin"
)
TYPES: dict[str, type[Method]] = {
    "Loreft": LoReFT,
    "Noreft": NoReFT,
    "Consreft": ConsReFT,
    "Lobireft": LobiReFT,
    "Direft": DiReFT,
    "Nodireft": DiReFT,
}
"""Name of an intervention → our method."""


def is_mine(path: Path) -> bool:
    return (path / CONFIG).is_file() and any(p.name.startswith("intkey_") for p in path.glob("intkey_*.bin"))


def save(folder: Path, net: Adapted, adapter: Mapping[str, Any], **options: Any) -> None:
    raise ValueError("save: pyreft's format is read, not written: use format='native'")


def load(folder: Path, model: Model, options: Options, method: Any = None) -> Loaded:
    """The interventions in the folder. method: where they act, and their activation; its rank is that of the files."""
    where = folder / CONFIG
    options.only(where)
    name, cls = _type(read_json(where), where)
    if not isinstance(method, cls):
        raise ValueError(
            f"{where}: these are {name}'s interventions, and pyreft keeps neither positions nor activation: "
            f"load(…, method=pf.{cls.__name__}(first=1, last=1)), as it was trained"
        )
    if not options.pickled:
        raise ValueError(f"{folder} has pickles: load(…, pickled=True) reads their tensors, and runs no code")
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(folder.glob("intkey_*.bin")):
        if (m := _FILE.fullmatch(path.name)) is None:
            raise ValueError(f"{path}: this release reads interventions on the output of blocks")
        found.setdefault(_site(m, model, path), {})[int(m["number"])] = path
    units: Any = method.units  # type: ignore[attr-defined]
    methods: dict[str, Any] = {}
    leaves: dict[str, dict[str, Tensor]] = {}
    for site, files in found.items():
        if sorted(files) != list(range(len(units))):
            raise ValueError(
                f"{files[min(files)]}: {site} has {len(files)} interventions, and {method} has {len(units)}: one for "
                "first and last tokens alike, or with tied=False one for each"
            )
        parts = [_unit(unpickled(files[i]), name, files[i]) for i in range(len(units))]
        leaves[site] = {f"{unit}{k}": t for unit, part in zip(units, parts, strict=True) for k, t in part.items()}
        first = parts[0]
        rank, dim = first["proj" if "proj" in first else "r"].shape
        more: dict[str, Any] = {"rank": rank, "dim": dim}
        more |= (
            {"add_bias": "c" in first} if cls is NoReFT else {"orthogonal": name == "Direft"} if cls is DiReFT else {}
        )
        methods[site] = dataclasses.replace(method, **more)
    plan = planned(model, {exactly(n): m for n, m in methods.items()}, where)
    for site, leaf in leaves.items():
        for k, shape in plan[site].spec.items():
            if k not in leaf or leaf[k].shape != shape:
                have = list(leaf[k].shape) if k in leaf else "missing"
                raise ValueError(f"{folder}: {k} of {site} is {have}, and its shape is {list(shape)}")
    return Loaded(Adapted(model.root, plan), {n: leaves[n] for n in plan})


def _type(config: Any, where: Path) -> tuple[str, type[Method]]:
    types = config.get("intervention_types") if isinstance(config, dict) else None
    names = set(re.findall(r"(\w+)Intervention\b", str(types)))
    if len(names) != 1 or not names <= TYPES.keys():
        raise ValueError(
            f"{where}: intervention_types is {str(types)[:80]}; this release reads one of {', '.join(TYPES)}"
        )
    (name,) = names
    return name, TYPES[name]


def _site(m: re.Match[str], model: Model, path: Path) -> str:
    if m["path"] is not None:
        site = re.sub(r"\[(\d+)\]", r".\1", m["path"])
        found = [n for n in model.modules if n == site or n.replace(".", "_") == site.replace(".", "_")]
    else:
        found = [n for n in model.modules if re.fullmatch(rf"(?:.*\.)?(?:layers?|h|blocks?)\.{m['layer']}", n)]
    if len(found) != 1:
        raise ValueError(f"{path}: the model has {len(found)} blocks of this name: {found[:3]}")
    return found[0]


def _unit(file: File, name: str, path: Path) -> dict[str, Tensor]:
    """One intervention's tensors under our names; those of one that shares a rotation are rows."""
    t = {k.removeprefix("learned_source."): file.tensor(k) for k in file.meta}
    rotation = {k.removeprefix("rotate_layer."): v for k, v in t.items() if k.startswith("rotate_layer")}
    try:
        if name in ("Noreft", "Nodireft"):
            proj = "proj" if name == "Noreft" else "r"
            out = {proj: t.pop("proj_layer.weight"), "w": t.pop("weight"), "b": t.pop("bias")}
            if "proj_layer.bias" in t:
                out["c"] = t.pop("proj_layer.bias")
        else:
            r = rotation["rotate_layer"] if "rotate_layer" in rotation else orthogonal(rotation)
            t = {k: v for k, v in t.items() if not k.startswith("rotate_layer")}
            out = {"r": r.mT.contiguous()}
            out |= (
                {"b": t.pop("learned_source")} if "learned_source" in t else {"w": t.pop("weight"), "b": t.pop("bias")}
            )
    except (KeyError, ValueError) as e:
        raise ValueError(f"{path}: it is not what {name} has: {e}") from e
    if t:
        raise ValueError(f"{path}: {name} has no {', '.join(sorted(t))}")
    return out
