"""`peftfn convert`: an adapter of one format written in another."""

from pathlib import Path
from typing import Any

from peftfn.cli.base import Base, guard, load_base
from peftfn.core.chain import Chain
from peftfn.core.plan import Entry
from peftfn.formats import hub, load, save, swift
from peftfn.formats.files import Loaded, read_json
from peftfn.methods.weights.full import Full
from peftfn.tools.convert import to_lora


def convert(
    path: str | Path,
    out: Path,
    to: str,
    model: Path | None = None,
    rank: int | None = None,
    *,
    any_base: bool = False,
    **options: Any,
) -> str:
    """Write the adapter at `path` to `out` in the format `to`; what it says is a line about it.

    Args:
        model: the base: a folder, or a config.json where no tensor of the adapter depends on the base's values. Without
            it, the local folder that the adapter's configuration names. From ms-swift's LoRA to PEFT none is needed.
        rank: write the best LoRA of this rank in place of each method (`to_lora`), which needs the base's values.
        any_base: whether the model may have other values than the one that the adapter was made on.
        options: of the format.

    Raises:
        FileExistsError: `out` is there, and no empty folder.
        ValueError: the format cannot express the adapter, or it needs a model, or the model's values.
    """
    free(out)
    path = hub.find(path)
    where = model or named(path)
    if where is None and to == "peft" and rank is None and swift.is_mine(path):
        swift.to_peft(path, out)
        return f"wrote {out}, PEFT's, with unchanged tensors"
    if where is None:
        raise ValueError(f"{path}: only the base model says which layers its names mean: give --model")
    base = load_base(where)
    net, adapter = loaded = bound(path, base, any_base)
    if to in ("native", "peft"):  # the adapter's own name of its base first
        folder = {"base_model_name_or_path": str(where.parent if where.is_file() else where)}
        options = {**options, "extra": {**folder, **{k: v for k, v in loaded.extra.items() if v}}}
    if base.hollow:
        for name, entry in net.plan.items():
            if rank is not None or of_values(entry):
                raise ValueError(
                    f"{name}: {entry.method} is stored relative to the base's values, and {where} has none; give "
                    "a --model folder with *.safetensors"
                )
    if rank is not None:
        net, adapter = to_lora(net, adapter, rank=rank)
    save(out, net, adapter, format=to, **options)
    methods = ", ".join(sorted({type(e.method).__name__ for e in net.plan.values()}))
    return f"wrote {out}: {methods} at {len(net.plan)} sites, format {to}"


def free(out: Path) -> None:
    """FileExistsError unless `out` can be written: there is nothing, or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} exists; name a new one")


def bound(path: Path, base: Base, any_base: bool = False) -> Loaded:
    """The adapter, on the model of the base. ValueError if it does not fit. any_base: as of `convert`."""
    guard(base, path)
    return load(path, base.model, base="any" if any_base else None)


def named(path: Path) -> Path | None:
    """The base that PEFT's or ms-swift's configuration names, where that is a folder on this machine."""
    config = swift.only(path) / "adapter_config.json" if swift.is_mine(path) else path / "adapter_config.json"
    if not config.is_file():
        return None
    read = read_json(config)
    name = read.get("base_model_name_or_path") if isinstance(read, dict) else None
    return Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None


def of_values(entry: Entry) -> bool:
    """Whether what stands at the site in one format is not the same number in another without the base's values."""
    methods = entry.method.methods if isinstance(entry.method, Chain) else (entry.method,)
    return bool(entry.frozen) or any(isinstance(m, Full) for m in methods)
