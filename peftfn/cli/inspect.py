"""`peftfn inspect`: what is in an adapter's file or folder, and whether it fits a model."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftfn.cli.base import load_base
from peftfn.cli.convert import bound
from peftfn.core.method import Method
from peftfn.formats import FORMATS, hub, kohya, mlx, native, peft, peft_keys, swift
from peftfn.formats import peft_config as configs
from peftfn.formats.files import Tensors, opened, read_json
from peftfn.formats.kohya_keys import ENDS
from peftfn.formats.peft_extra import INVOCATION, REPLICATION
from peftfn.formats.several import folders


def inspect(path: str | Path, model: Path | None = None) -> dict[str, dict[str, Any]]:
    """Facts about the adapters at `path`, from configurations and the headers of files: {"": facts}, or {name: facts}
    for the sub-folders that hold one each.

    Facts are the `format`, `methods` (name → number of layers), `ranks` (rank → number of layers), `layers` (the
    modules or, in the native format, sites), `whole` (tensors that are saved whole), `tensors`, `parameters`, `bytes`
    and `dtypes`; of a PEFT folder also `extra` keys; with a model also `fits`: "yes", or why not.

    Raises:
        FileNotFoundError: no adapter there, or no model.
        ValueError: a broken file.
    """
    path = hub.find(path)
    found = {"": path} if _format(path) not in (None, "swift") else folders(path)
    if not found and _format(path) == "swift":
        found = {"": path}
    if not found:
        raise FileNotFoundError(f"{path} holds no adapter of a known format: {', '.join(FORMATS)}")
    base = None if model is None else load_base(model)
    out = {}
    for name, where in found.items():
        facts = _facts(where)
        if base is not None:
            try:
                loaded = bound(where, base, gated=True)
            except (ValueError, KeyError, TypeError, FileNotFoundError) as e:
                facts["fits"] = f"no: {e.args[0]}"
            else:
                facts["fits"] = "yes"
                facts["methods"] = dict(Counter(_brief(e.method) for e in loaded.net.plan.values()))
        out[name] = facts
    return out


def _brief(method: Method) -> str:
    """The method with those of its fields that are not the default."""
    fields = {f.name: (getattr(method, f.name), f.default) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    given = ", ".join(f"{k}={value!r}" for k, (value, default) in fields.items() if value != default)
    return f"{type(method).__name__}({given})"


def _format(path: Path) -> str | None:
    return next((name for name, module in FORMATS.items() if module.is_mine(path)), None)


def _facts(path: Path) -> dict[str, Any]:
    match _format(path):
        case "native":
            with opened(path / native.TENSORS) as file:
                return {"format": "native", **_native(read_json(path / native.CONFIG), path), **_size(file)}
        case "swift":
            with swift.as_peft(swift.only(path)) as (config, file):
                return {"format": "swift", **_peft(config, file), **_size(file)}
        case "mlx":
            with opened(path / mlx.TENSORS) as file:
                return {"format": "mlx", **_mlx(read_json(path / mlx.CONFIG), file), **_size(file)}
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
    kind = config["peft_type"]
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


def report(name: str, facts: Mapping[str, Any], path: str | Path, model: Path | None, full: bool) -> str:
    """Facts as lines for a terminal."""

    def counted(of: Mapping[Any, int]) -> str:
        return ", ".join(
            k if n == len(facts["layers"]) else f"{k} at {n}" for k, n in ((str(k), n) for k, n in of.items())
        )

    parameters, dtypes = f"{facts['parameters']:,} parameters", " and ".join(facts["dtypes"])
    rows = [
        ("adapter", f"{path}{f', {name}' if name else ''}"),
        ("format", facts["format"]),
        ("method", counted(facts["methods"])),
        ("rank", counted(facts["ranks"]) or "-"),
        ("layers", f"{len(facts['layers']):,}"),
        ("size", f"{parameters} in {facts['tensors']:,} tensors, {facts['bytes'] / 1e6:,.2f} MB, {dtypes}"),
    ]
    if facts["whole"]:
        rows.append(("others", f"{len(facts['whole'])} tensors, {facts['whole'][0]} first"))
    rows += [("extra", f"{k} {v}") for k, v in facts.get("extra", {}).items()]
    if "fits" in facts:
        rows.append(("fits", f"{model}: {facts['fits']}"))
    rows += [("layer", layer) for layer in facts["layers"]] if full else []
    return "\n".join(f"{what:<8} {value}" for what, value in rows)
