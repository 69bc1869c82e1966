"""`peftfn inspect`: what is in an adapter's file or folder, and whether it fits a model."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peftfn.cli.base import load_base
from peftfn.cli.convert import bound
from peftfn.cli.outline import by_factors, outline
from peftfn.core.method import MATRIX, Method
from peftfn.formats.facts import adapters_at, facts_of
from peftfn.formats.files import Loaded
from peftfn.formats.obstacles import check_engine, obstacles_of
from peftfn.tools import spectrum as tool
from peftfn.tools.spectrum import SpectrumReport

WORDS = {
    "base_model": "base",
    "base_revision": "at",
    "base_class": "class",
    "task_type": "task",
    "peft_version": "peft",
}
"""Fact → what its row is called."""


def inspect(
    path: str | Path,
    model: Path | None = None,
    engine: str | None = None,
    max_rank: int | None = None,
    spectrum: bool = False,
) -> dict[str, dict[str, Any]]:
    """What `peftfn.inspect` returns; with a model also `fits`: "yes", or why not, and methods as the model has them;
    with an engine also `obstacles`, as lines.

    Args:
        spectrum: also `spectrum`, a `SpectrumReport`, of each adapter that fits. Of LoRAs in PEFT's format it needs no
            model, and of LoRAs in others a config.json alone.

    Raises:
        FileNotFoundError: no adapter there, or no model.
        ValueError: a broken file; a max_rank that the engine does not have; or a spectrum that needs a model, or the
            model's values.
    """
    if engine is not None:
        check_engine(engine, max_rank)
    elif max_rank is not None:
        raise ValueError("--max-lora-rank is what an engine is started with: give --for as well")
    found = adapters_at(path)
    base = None if model is None else load_base(model)
    out = {}
    for name, where in found.items():
        facts = facts_of(where)
        if base is not None:
            try:
                loaded = bound(where, base)
            except (ValueError, KeyError, TypeError, FileNotFoundError) as e:
                facts["fits"] = f"no: {e.args[0]}"
            else:
                facts["fits"] = "yes"
                facts["methods"] = dict(Counter(_brief(e.method) for e in loaded.net.plan.values()))
                if spectrum:
                    facts["spectrum"] = _spectrum(where, loaded, base.hollow)
        elif spectrum:
            facts["spectrum"] = _spectrum(where, bound(where, outline([where])), hollow=True)
        if engine is not None:
            facts["obstacles"] = [str(o) for o in obstacles_of(where, engine, max_rank)]
        out[name] = facts
    return out


def _spectrum(where: Path, loaded: Loaded, hollow: bool) -> SpectrumReport:
    for name, entry in loaded.net.plan.items() if hollow else ():
        if entry.site.kind in MATRIX and not by_factors(entry):
            raise ValueError(
                f"{where}: {name}: the change that {entry.method} makes depends on the base's values; give a --model "
                "folder with *.safetensors"
            )
    return tool.spectrum(loaded.net, loaded.adapter)


def _brief(method: Method) -> str:
    """The method with those of its fields that are not the default."""
    fields = {f.name: (getattr(method, f.name), f.default) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    given = ", ".join(f"{k}={value!r}" for k, (value, default) in fields.items() if value != default)
    return f"{type(method).__name__}({given})"


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
    rows += [(word, facts[fact]) for fact, word in WORDS.items() if fact in facts]
    if facts["whole"]:
        rows.append(("others", f"{len(facts['whole'])} tensors, {facts['whole'][0]} first"))
    rows += [("extra", f"{k} {v}") for k, v in facts.get("extra", {}).items()]
    if "obstacles" in facts:
        rows += [("obstacle", line) for line in facts["obstacles"]] or [("obstacle", "none")]
    if "fits" in facts:
        rows.append(("fits", f"{model}: {facts['fits']}"))
    rows += [("layer", layer) for layer in facts["layers"]] if full else []
    lines = [f"{what:<8} {value}" for what, value in rows]
    return "\n".join(lines + (["", str(facts["spectrum"])] if "spectrum" in facts else []))
