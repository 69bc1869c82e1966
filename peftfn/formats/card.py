"""The model card beside an adapter: README.md with its base, methods, targets and size, as the hub reads it."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfn.core.plan import Plan
from peftfn.formats.files import write

FILE = "README.md"
_PIPELINES = {"ForCausalLM": "text-generation", "LMHeadModel": "text-generation"}
"""End of a class's name → pipeline_tag, where it follows with certainty."""


def write_card(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], plan: Plan, library: str = "peft"
) -> None:
    """Write the card; one that is there already is the user's, and stays."""
    if not (folder / FILE).exists():
        write(folder / FILE, f"---\n{_head(config, library)}\n---\n\n# Adapter\n\n{_text(config, tensors, plan)}\n")


def _head(config: Mapping[str, Any], library: str) -> str:
    """What the hub searches by. A base that is a folder here has no name there."""
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    base = None if base and Path(str(base)).is_dir() else base
    mapping = config.get("auto_mapping") or {}
    of_transformers = str(mapping.get("parent_library", "")).startswith("transformers.")
    tags = [str(kind).lower()] if kind else []
    tags += ["transformers"] if of_transformers else []
    tags += [json.dumps(f"base_model:adapter:{base}")] if base else []
    name = str(mapping.get("base_model_class", ""))
    pipeline = next((p for end, p in _PIPELINES.items() if name.endswith(end)), None)
    lines = [f"base_model: {json.dumps(base)}"] if base else []
    lines += [f"library_name: {library}"]
    lines += [f"pipeline_tag: {pipeline}"] if pipeline and of_transformers else []
    lines += ["tags:", *(f"- {tag}" for tag in (*tags, *(["peftfn"] if library != "peftfn" else [])))]
    return "\n".join(lines)


def _text(config: Mapping[str, Any], tensors: Mapping[str, Tensor], plan: Plan) -> str:
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    methods = Counter(str(e.method) for e in plan.values())
    sites: dict[str, set[str]] = {}
    for e in plan.values():
        sites.setdefault(str(e.method), set()).add(e.site.module.rpartition(".")[2] or e.site.name or "the model")
    count, size = sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values())
    rows = "\n".join(f"| `{m}` | {n} | {', '.join(f'`{s}`' for s in sorted(sites[m]))} |" for m, n in methods.items())
    of_type = f" of PEFT's type {kind}" if kind else ""
    return (
        f"An adapter{of_type} for {f'`{base}`' if base else 'a model without a name'}, written by peftfn: {count:,} "
        f"numbers in {len(tensors)} tensors, {size / 1e6:,.2f} MB.\n\n"
        f"| method | sites | modules |\n|---|---|---|\n{rows}\n\n"
        "It loads with its base by `net, adapter = peftfn.load_model(path)`, where `path` is this repository or folder."
    )
