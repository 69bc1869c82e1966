"""What an adapter's file or folder holds, from configurations and headers alone: no model, and no tensor is read."""

from collections import Counter
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from peftfn.formats import FORMATS, gguf_file, hub, kohya, mlx, native, peft, peft_keys, swift
from peftfn.formats import peft_config as configs
from peftfn.formats.files import read_json
from peftfn.formats.kohya_keys import ENDS
from peftfn.formats.peft_extra import INVOCATION, REPLICATION
from peftfn.formats.peft_old import named_today
from peftfn.formats.several import FOLDER_FILES, folders
from peftfn.formats.tensor_files import Tensors, opened

MODEL = {
    "base_model": "base_model_name_or_path",
    "base_revision": "revision",
    "task_type": "task_type",
    "peft_version": "peft_version",
}
"""Fact → the configuration's key."""


def inspect(
    path: str | PathLike[str], *, revision: str | None = None, hub_options: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Return facts about the adapters at a path, without a model.

    Args:
        path: an adapter's folder or file, a folder of several, or a Hub repository "owner/name".
        revision, hub_options: as for `load`.

    Returns:
        {"": facts} of one adapter, or {name: facts} of several. Facts are the `format`, `methods` (name → number of
        layers), `ranks` (rank → number of layers), `layers` (the modules or, in the native format, sites), `whole`
        (tensors that are saved whole), `tensors`, `parameters`, `bytes` and `dtypes`; what the adapter is for, where
        the file says it: `base_model`, `base_revision`, `base_class`, `task_type`, `peft_version`; and
        `extra` keys of a PEFT configuration that change what the adapter does.

    Raises:
        FileNotFoundError: no adapter is there.
        ValueError: the file is broken.

    Example:
        net = pf.adapt(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"0.weight": pf.LoRA(rank=2)})
        pf.save("adapter", net, net.init(), format="peft")
        assert pf.inspect("adapter")[""]["ranks"] == {2: 1}
    """
    return {name: facts_of(where) for name, where in adapters_at(path, revision, hub_options).items()}


def adapters_at(
    path: str | PathLike[str], revision: str | None = None, hub_options: Mapping[str, Any] | None = None
) -> dict[str, Path]:
    """{name: its folder or file} of the adapters at a path; "" is the name of a single one."""
    where = hub.find(path, revision=revision, options=hub_options)
    if format_of(where) not in (None, "swift"):
        return {"": where}
    if where != Path(path):  # of the hub, whose folders below are not there yet
        where = hub.find_all(path, FOLDER_FILES, revision=revision, options=hub_options)
    found = folders(where)
    if not found and format_of(where) == "swift":
        found = {"": where}
    if not found:
        raise FileNotFoundError(f"{where} holds no adapter of a known format: {', '.join(FORMATS)}")
    return found


def described(where: Path) -> dict[str, Any]:
    """What an adapter's configuration says of its base: keys as PEFT has them. {} of a file without one."""
    match format_of(where):
        case "native":
            config = read_json(where / native.CONFIG)
            found = config.get("extra") if isinstance(config, dict) else None
        case "swift":
            found = read_json(swift.only(where) / peft.CONFIG)
        case "mlx":
            found = read_json(where / mlx.CONFIG)
            found = {"base_model_name_or_path": found.get("model")} if isinstance(found, dict) else None
        case "peft":
            found = read_json(where / peft.CONFIG)
        case _:
            found = None
    return found if isinstance(found, dict) else {}


def format_of(path: Path) -> str | None:
    return next((name for name, module in FORMATS.items() if module.is_mine(path)), None)


def facts_of(path: Path) -> dict[str, Any]:
    """Facts about one adapter."""
    return {**_held(path), **_model(described(path))}


def _model(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapter is for, and what wrote it."""
    found = {fact: config.get(key) for fact, key in MODEL.items()}
    mapping = config.get("auto_mapping")
    found["base_class"] = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    return {fact: str(value) for fact, value in found.items() if value}


def _held(path: Path) -> dict[str, Any]:
    match format_of(path):
        case "native":
            with opened(path / native.TENSORS) as file:
                return {"format": "native", **_native(read_json(path / native.CONFIG), path), **_size(file)}
        case "swift":
            with swift.as_peft(swift.only(path)) as (config, file):
                return {"format": "swift", **_peft(config, file), **_size(file)}
        case "mlx":
            with opened(path / mlx.TENSORS) as file:
                return {"format": "mlx", **_mlx(read_json(path / mlx.CONFIG), file), **_size(file)}
        case "gguf":
            with gguf_file.opened(path) as (values, file):
                return {"format": "gguf", **_gguf(values, file), **_size(file)}
        case "kohya":
            with opened(path / kohya.FILE if path.is_dir() else path) as file:
                return {"format": "kohya", **_kohya(file), **_size(file)}
        case _:
            config = configs.read(path / peft.CONFIG)
            with opened(path / peft.TENSORS) as file:
                return {"format": "peft", **_peft(config, file), **_size(file)}


def _size(file: Tensors) -> dict[str, Any]:
    return {
        "tensors": len(file.meta),
        "parameters": sum(t.numel() for t in file.meta.values()),
        "bytes": sum(t.nbytes for t in file.meta.values()),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in file.meta.values()}),
    }


def _native(config: Any, path: Path) -> dict[str, Any]:
    rules, sites = config.get("rules"), config.get("sites")
    try:
        methods = dict(rules)
        chosen = {name: methods[site["rule"]] for name, site in sites.items()}
        counted = Counter(m["method"] for m in chosen.values())
    except (TypeError, KeyError, ValueError, AttributeError) as e:
        raise ValueError(f"{path / native.CONFIG}: its rules and sites are not those of a native adapter") from e
    ranks = Counter(m["rank"] for m in chosen.values() if isinstance(m.get("rank"), int))
    return {"methods": dict(counted), "ranks": dict(sorted(ranks.items())), "layers": list(chosen), "whole": []}


def _peft(config: Mapping[str, Any], file: Tensors) -> dict[str, Any]:
    kind, file = config["peft_type"], named_today(dict(config), file)
    classes = [c for c in configs.candidates(kind) if c.peft]
    ends = {k for c in classes if c.peft for k in c.peft.keys.values()}
    ends |= {v for k in ends for v in peft_keys.variants(k)}
    longest = sorted(ends, key=len, reverse=True)
    ranks: dict[str, int] = {}
    layers, whole = dict[str, None](), []
    for key, t in file.meta.items():
        bare = peft_keys.clean(key)
        if (parts := peft_keys.split(bare, longest)) is None:
            whole.append(bare)
            continue
        layers[parts[0]] = None
        if parts[1] in ("lora_A.weight", "lora_embedding_A") and t.dim() > 1:
            ranks[parts[0]] = t.shape[0]
    options = [k for k in ("use_dora", "use_rslora") if config.get(k)]
    name = f"{kind} ({', '.join(options)})" if options else str(kind)
    count = dict(sorted(Counter(ranks.values()).items())) or (
        {config["r"]: len(layers)} if isinstance(config.get("r"), int) else {}
    )
    extra = {k: config[k] for k in (INVOCATION, REPLICATION) if config.get(k)}
    return {"methods": {name: len(layers)}, "ranks": count, "layers": list(layers), "whole": whole, "extra": extra}


def _mlx(config: Any, file: Tensors) -> dict[str, Any]:
    kind = str(config.get("fine_tune_type", "lora")) if isinstance(config, dict) else "lora"
    layers = [k.removesuffix(".lora_a") for k in file.meta if k.endswith(".lora_a")]
    ranks = Counter(file.meta[f"{name}.lora_a"].shape[-1:].numel() for name in layers)
    whole = [k for k in file.meta if k.rpartition(".")[2] not in ("lora_a", "lora_b", "m")]
    return {"methods": {kind: len(layers)}, "ranks": dict(sorted(ranks.items())), "layers": layers, "whole": whole}


def _gguf(values: Mapping[str, Any], file: Tensors) -> dict[str, Any]:
    ranks = {k.removesuffix(".lora_b"): t.shape[-1:].numel() for k, t in file.meta.items() if k.endswith(".lora_b")}
    whole = [k for k in file.meta if not k.endswith((".lora_a", ".lora_b"))]
    count = dict(sorted(Counter(ranks.values()).items()))
    return {
        "methods": {str(values.get("adapter.type")): len(ranks)},
        "ranks": count,
        "layers": [*ranks],
        "whole": whole,
    }


def _kohya(file: Tensors) -> dict[str, Any]:
    ends = sorted(ENDS, key=len, reverse=True)
    methods, ranks = dict[str, str](), dict[str, int]()
    whole, decomposed = [], set()
    for key, t in file.meta.items():
        if (end := next((e for e in ends if key.endswith(f".{e}")), None)) is None:
            whole.append(key)
            continue
        layer, (method, tensor) = key.removesuffix(f".{end}"), ENDS[end]
        if tensor == "m":
            decomposed.add(layer)
        if method is not None and tensor != "l":  # what a model's own weights are called, too
            methods[layer] = method.__name__
            if tensor in ("a", "b1", "b2") and t.dim() > 1:
                ranks[layer] = t.shape[0]
    count = Counter(f"{m} (weight-decomposed)" if layer in decomposed else m for layer, m in methods.items())
    ranked = dict(sorted(Counter(ranks.values()).items()))
    return {"methods": dict(count), "ranks": ranked, "layers": list(methods), "whole": whole}
