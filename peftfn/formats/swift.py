"""ms-swift's format: `<adapter>/adapter_config.json` with a `swift_type`, and keys that carry the adapter's name.

Its LoRA is PEFT's, so reading is a renaming (`q_proj.lora_A.default.weight` → `q_proj.lora_A.weight`) in front of
PEFT's reader, and writing one behind PEFT's writer. Of its tuners, those that change weights are read: LORA, longlora
(a LoRA, embeddings and norms in full) and part (whole modules); and `extra_states`, parameters that are trained too.
Those around modules are read in `swift_modules.py`, those of a whole model in `swift_models.py`.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peftfn.formats import peft, swift_models, swift_modules
from peftfn.formats import peft_config as configs
from peftfn.formats import peft_table as table
from peftfn.formats.files import Loaded, Options, read_json, write
from peftfn.formats.kohya import FILE
from peftfn.formats.peft import CONFIG, TENSORS
from peftfn.formats.peft_keys import PREFIX
from peftfn.formats.peft_write import document
from peftfn.formats.tensor_files import Tensors, opened
from peftfn.model.model import Model
from peftfn.net.net import Adapted

EXTRA = "extra_states"
_NAMED = re.compile(
    r"(?P<head>.*\blora_(?:[AB]|embedding_[AB]|magnitude_vector))\.(?P<name>[^.]+)(?P<tail>\.(?:weight|bias))?"
)
_LORA = re.compile(r"\blora_(?:[AB]\.(?:weight|bias)|embedding_[AB]|magnitude_vector)$")
_OWN = {
    "model_key_mapping": None,
    "use_qa_lora": False,
    "use_merged_linear": False,
    "enable_lora": None,
    "lora_dtype": None,
    "lorap_lr_ratio": 16.0,
    "lorap_emb_lr": 1e-6,
}
"""What ms-swift's LoRA has more than PEFT's, and its defaults."""
_LONG = ("embedder_and_normalizer", "model_type", "group_size_ratio")  # of training alone
_PASSED = frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights"})
"""PEFT's options that ms-swift hands on to the layers."""


def is_mine(path: Path) -> bool:
    return path.is_dir() and not (path / FILE).is_file() and bool(_adapters(path))


def save(folder: Path, net: Adapted, adapter: Mapping[str, Any], *, name: str = "default") -> None:
    """Write `folder/name`. ValueError for what is neither a LoRA as ms-swift has it, nor trained parameters alone.

    name: the adapter's, which is in the keys too.
    """
    if not re.fullmatch(r"[\w-]+", name) or name == EXTRA:
        raise ValueError(f"save: name is {name!r}; give letters, digits, _ and -, and not {EXTRA!r}")
    config, tensors = document(net, adapter)
    kind = config["peft_type"]
    if kind == "LN_TUNING":
        modules = dict.fromkeys(e.site.module for e in net.plan.values())
        config = {"swift_type": "part", "model_key_mapping": None, "target_modules": "|".join(map(re.escape, modules))}
        out = {k.removeprefix(PREFIX).replace(".ln_tuning_layers.", "."): t for k, t in tensors.items()}
    elif kind == "LORA":
        dropped = [k for k, v in table.DEFAULTS[kind].items() if k not in _PASSED and config.get(k, v) != v]
        dropped += [k for k in (*table.PATTERNS, "target_parameters", "trainable_token_indices") if config.get(k)]
        if dropped:
            raise ValueError(f"save: ms-swift's LoRA has no {', '.join(dropped)}; use PEFT's format")
        config = {**config, **_OWN, "swift_type": "LORA"}
        out = {_named(k.removeprefix(PREFIX), name): t for k, t in tensors.items()}
    else:
        raise ValueError(f"save: ms-swift has LoRA and whole modules, and this is PEFT's {kind}: use PEFT's format")
    write(folder / name / TENSORS, out)
    write(folder / name / CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False))


def load(folder: Path, model: Model, options: Options) -> Loaded:
    """The adapter in the folder, or the only one below it (`subfolder=` names one of several)."""
    where = only(folder)
    described = read_json(where / CONFIG)
    if described["swift_type"] == "PROMPT":
        raise ValueError(f"{where / CONFIG}: {swift_models.PROMPT}")
    own = next((m for m in (swift_modules, swift_models) if described["swift_type"] in list(m.KINDS)), None)
    if own is not None:  # a file may have a list or a dict there
        if (where.parent / EXTRA / CONFIG).is_file():
            raise ValueError(f"{where.parent / EXTRA}: this release reads {EXTRA} beside LORA, longlora and part")
        with opened(where / TENSORS) as file:
            return own.load(described, file, model, where / CONFIG, options)
    with as_peft(where) as (config, file):
        return peft.build(model, configs.checked(config, where / CONFIG), file, where / CONFIG, options)


def to_peft(folder: Path, out: Path) -> None:
    """A LoRA's folder as one of PEFT, without a model: keys and configuration renamed, values as they are.

    As ms-swift's `save_to_peft_format`; ValueError for another tuner, and where there are extra states, which PEFT's
    folder has no place for.
    """
    where = only(folder)
    if read_json(where / CONFIG).get("swift_type") != "LORA" or (where.parent / EXTRA).is_dir():
        raise ValueError(
            f"{where}: only a LORA without {EXTRA} has a form in PEFT; load it, and save it in another format"
        )
    with as_peft(where) as (config, file):
        tensors = {f"{PREFIX}{k.removeprefix(PREFIX)}": file.tensor(k, exact=True) for k in file.meta}
    write(out / TENSORS, tensors)
    write(out / CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False))


def only(folder: Path) -> Path:
    """The folder of the one adapter there. ValueError, with the names, where there are several."""
    found = _adapters(folder)
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ValueError(f"{folder} holds several adapters: {names}. Name one with subfolder=, or use load_all")
    if not found:
        raise FileNotFoundError(f"{folder} holds no adapter of ms-swift")
    return found[0]


def _adapters(folder: Path) -> list[Path]:
    if (folder / CONFIG).is_file():
        return [folder] if _is_swift(folder) else []
    return [p for p in sorted(folder.iterdir()) if p.is_dir() and (p / CONFIG).is_file() and _is_swift(p)]


def _is_swift(folder: Path) -> bool:
    config = read_json(folder / CONFIG)
    return isinstance(config, dict) and "swift_type" in config


def _named(key: str, name: str) -> str:
    """PEFT's key as ms-swift has it."""
    for end in ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        if key.endswith(f".{end}"):
            tail = ".weight" if end != "lora_embedding_A" and end != "lora_embedding_B" else ""
            return f"{key.removesuffix('.weight')}.{name}{tail}"
    return key


def _renamed(file: Tensors) -> Tensors:
    """The tensors under PEFT's names. ValueError where they are of several adapters."""
    names: dict[str, str] = {}

    def bare(key: str) -> str:
        m = _NAMED.fullmatch(key)
        if m is None:
            return key
        magnitude = m["head"].endswith("lora_magnitude_vector")
        if m["tail"] is None and m["name"] in ("weight", "bias"):  # saved in PEFT's format: no name
            return m["head"] if magnitude else key
        names.setdefault(m["name"], key)
        return m["head"] + ("" if magnitude or m["tail"] is None else m["tail"])

    renamed = file.renamed(bare)
    if len(names) > 1:
        raise ValueError(f"{file.where}: {' and '.join(map(repr, names.values()))} belong to two adapters")
    return renamed


@contextmanager
def as_peft(folder: Path) -> Iterator[tuple[dict[str, Any], Tensors]]:
    """(PEFT's configuration, tensors under PEFT's names) of an adapter's folder, with its extra states."""
    where, config = folder / CONFIG, read_json(folder / CONFIG)
    kind = config["swift_type"]
    with ExitStack() as files:
        file = _renamed(files.enter_context(opened(folder / TENSORS)))
        plain = [k for k in file.meta if not _LORA.search(k)]
        if kind in ("LORA", "longlora"):
            odd = [k for k in ("use_qa_lora", "use_merged_linear", "enable_lora") if config.get(k)]
            if odd:
                raise ValueError(f"{where}: {odd[0]} is {config[odd[0]]!r}, and ms-swift saves no such LoRA whole")
            left_out = {"swift_type", *_OWN, *(_LONG if kind == "longlora" else ())}
            config = {k: v for k, v in config.items() if k not in left_out} | {"peft_type": "LORA"}
        elif kind == "part":
            config = {"peft_type": "LN_TUNING"}
        else:
            raise ValueError(
                f"{where}: swift_type is {str(kind)[:80]!r}; this release reads LORA, longlora, part, ADAPTER, "
                "SIDE, SCETuning, RESTUNING and LLAMAPRO"
            )
        if kind == "longlora":
            saved = [*configs.listed(config.get("modules_to_save")), *(k.rpartition(".")[0] for k in plain)]
            config["modules_to_save"] = list(dict.fromkeys(saved))
        extra = folder.parent / EXTRA
        if (extra / CONFIG).is_file():
            more = files.enter_context(opened(extra / TENSORS))
            if both := file.meta.keys() & more.meta.keys():
                raise ValueError(f"{more.where}: {min(both)} is in {folder / TENSORS} too")
            names = {k: f"{EXTRA}/{n}" for k, n in more.names.items()}
            both_read: dict[str, Callable[[], Any]] = {**file.sources, **more.sources}
            file = Tensors(file.where, {**file.meta, **more.meta}, both_read, {**file.names, **names}, file.metadata)
        yield config, file
