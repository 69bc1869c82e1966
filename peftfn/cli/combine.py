"""`peftfn combine`: several adapters' files merged into one, without a model where the adapters are LoRAs."""

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftfn.cli.base import load_base
from peftfn.cli.convert import bound, free, named
from peftfn.cli.outline import by_factors, outline
from peftfn.formats import hub, peft, save
from peftfn.formats.files import Loaded, read_json
from peftfn.tools import merging

_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""What says in PEFT's configuration which layers are adapted."""


def combine(
    paths: Sequence[str | Path],
    out: Path,
    method: str,
    weights: Sequence[float] | None = None,
    model: Path | None = None,
    to: str = "peft",
    **options: Any,
) -> str:
    """Merge the adapters at `paths` by a function of `pf.merging`, and write the result; returns a line about it.

    Args:
        method: the function's name.
        weights: a number for each adapter; None for 1 each.
        model: the base: a folder, or a config.json where no change depends on the base's values. Without it, the local
            folder that the first adapter's configuration names. LoRAs in PEFT's format need none.
        to: "peft" or "native".
        options: of the function.

    Raises:
        FileExistsError: `out` is there, and no empty folder.
        ValueError: an option that the function does not have; adapters of different bases; an adapter that needs a
            model, or the model's values; or what the function itself raises. Nothing has been written then.
    """
    free(out)
    run = getattr(merging, method)
    known = inspect.signature(run).parameters
    for k in options:
        if k not in known:
            raise ValueError(f"--{k} is not an option of --method {method}")
    found = [hub.find(p) for p in paths]
    where = model or named(found[0])
    base = outline(found) if where is None else load_base(where)
    loaded = [bound(path, base, any_base=model is not None) for path in found]
    if model is None:
        _one_base(found, loaded)
    if base.hollow:
        for path, (net, _) in zip(found, loaded, strict=True):
            for name, entry in net.plan.items():
                if not by_factors(entry):
                    raise ValueError(
                        f"{path}: {name}: the change that {entry.method} makes depends on the base's values; give a "
                        "--model folder with *.safetensors"
                    )
    net, adapter = run(loaded, weights, **options)
    extra: dict[str, Any] = (
        {"extra": {k: v for k, v in loaded[0].extra.items() if k != "auto_mapping"}} if to == "peft" else {}
    )
    save(out, net, adapter, format=to, **extra)
    if where is None:
        _name_layers(out, found, [n.rpartition(".")[0] for n in net.plan])
    methods = ", ".join(sorted({str(e.method) for e in net.plan.values()}))
    return f"wrote {out}: {method} of {len(found)} adapters, {methods} at {len(net.plan)} sites"


def _one_base(paths: Sequence[Path], loaded: Sequence[Loaded]) -> None:
    """ValueError where the configurations name different bases."""
    names = [(path, a.extra.get("base_model_name_or_path")) for path, a in zip(paths, loaded, strict=True)]
    names = [(path, name) for path, name in names if name]
    for path, name in names[1:]:
        if name != names[0][1]:
            raise ValueError(
                f"{path} is for {name!r} and {names[0][0]} for {names[0][1]!r}: changes of different bases do not add "
                "up. If the two are one base, give it as --model"
            )


def _name_layers(out: Path, paths: Sequence[Path], modules: Sequence[str]) -> None:
    """Let the configuration name the layers as all of the adapters' do, or each by its whole name: what was written
    is for a model that has no other layers."""
    where = out / peft.CONFIG
    if not where.is_file():
        return
    given = [{k: read_json(p / peft.CONFIG).get(k) for k in _TARGETS} for p in paths]
    config = read_json(where)
    same = all(_sorted(g) == _sorted(given[0]) for g in given) and given[0]["target_modules"]
    config |= {k: v for k, v in given[0].items() if v is not None} if same else {"target_modules": sorted(set(modules))}
    where.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _sorted(given: Mapping[str, Any]) -> dict[str, Any]:
    return {k: sorted(v) if isinstance(v, list) else v for k, v in given.items()}
