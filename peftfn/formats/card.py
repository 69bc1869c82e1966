"""The model card beside a PEFT adapter: README.md with its base, methods and size, as the hub reads it."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftfn.core.plan import Plan
from peftfn.formats.files import write

FILE = "README.md"


def write_card(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], plan: Plan) -> None:
    """Write the card; one that is there already is the user's, and stays."""
    if (folder / FILE).exists():
        return
    base, kind = config.get("base_model_name_or_path"), str(config["peft_type"])
    head = [f"base_model: {json.dumps(base)}"] if base else []
    head += ["library_name: peft", "tags:", f"- {kind.lower()}"]
    head += [f"- {json.dumps(f'base_model:adapter:{base}')}"] if base else []
    methods = Counter(str(e.method) for e in plan.values())
    count = sum(t.numel() for t in tensors.values())
    rows = "\n".join(f"| `{method}` | {n} |" for method, n in methods.items())
    text = (
        f"An adapter of PEFT's type {kind} for {f'`{base}`' if base else 'a model without a name'}, written by peftfn: "
        f"{count:,} numbers in {len(tensors)} tensors.\n\n| method | sites |\n|---|---|\n{rows}"
    )
    write(folder / FILE, "---\n" + "\n".join(head) + f"\n---\n\n# Adapter\n\n{text}\n")
