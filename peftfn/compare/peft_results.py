"""Runs of a comparison as PEFT's own method comparison stores them, for tools that read those files."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peftfn.compare.methods import METHODS
from peftfn.compare.run import Json, best
from peftfn.formats.files import write


def write_runs(records: Sequence[Json], folder: Path) -> int:
    """Write a file for each run at a method's best rate, and return how many."""
    files = {name: run for record in records for name, run in runs(record).items()}
    for name, run in files.items():
        write(folder / f"{name.replace('/', '--')}.json", json.dumps(run, indent=2) + "\n")
    return len(files)


def runs(record: Json) -> dict[str, Json]:
    """{experiment's name: the run, in PEFT's schema}: the seeds at the record's best rate; {} if it has none.

    PEFT's fields for an accelerator's memory are 0: these run on a CPU. `peak_bytes_of_a_gradient` is a field of ours.
    """
    found = best(record)
    if found is None:
        return {}
    lr, trials = found
    named = {f"{record['method'].lower()}/{record['task']}-lr_{lr:g}-seed_{t['seed']}": t for t in trials}
    return {name: _run(record, name, t) for name, t in named.items()}


def _run(record: Json, name: str, trial: Json) -> Json:
    how, where = record["settings"], record["environment"]
    samples = trial["step"] * how["batch"]
    no_device = dict.fromkeys((f"accelerator_memory_{k}" for k in ("reserved_avg", "max", "reserved_99th")), 0)
    packages = {"torch-version": where["torch"], "peftfn-version": where["peftfn"]}
    others = dict.fromkeys(f"{k}-version" for k in ("peft", "transformers", "datasets", "bitsandbytes"))
    return {
        "run_info": {
            "created_at": f"{where['date']}T00:00:00+00:00",
            "total_time": trial["seconds"],
            "experiment_name": name,
            "peft_branch": "peftfn",
            "train_config": {
                "model_id": record["task"],
                "dtype": "float32",
                "batch_size": how["batch"],
                "max_steps": how["steps"],
                "seed": trial["seed"],
                "grad_norm_clip": 1.0,
                "optimizer_type": "AdamW",
                "optimizer_kwargs": {"lr": trial["lr"]},
                "lr_scheduler": "cosine",
            },
            "peft_config": _config(record["method"]),
            "error_msg": "",
        },
        "train_info": {
            **no_device,
            "peak_bytes_of_a_gradient": record["peak_bytes_alone"],
            "train_time": trial["seconds"],
            "file_size": record["bytes"],
            "num_trainable_params": record["trained"],
            "status": "success",
            "metrics": [
                {
                    "step": trial["step"],
                    "valid accuracy": trial["validation"],
                    "test accuracy": trial["test"],
                    "train loss": trial["loss"],
                    "train samples": samples,
                    "train total tokens": samples * record["positions"],
                }
            ],
        },
        "meta_info": {
            "model_info": None,
            "dataset_info": {record["task"]: record["title"]},
            "package_info": packages | others,
            "system_info": {k: where[k] for k in ("machine", "cpu_capability", "threads")},
            "pytorch_info": f"PyTorch {where['torch']}",
        },
    }


def _config(name: str) -> dict[str, Any] | None:
    """PEFT's configuration of a method, or our words where PEFT has no such method; None for full fine-tuning."""
    method: Any = METHODS[name].method
    if name == "Full":
        return None
    if (peft := getattr(method, "peft", None)) is None:
        return {"peft_type": name.upper(), "peftfn": str(method)}
    try:
        return {"peft_type": peft.type, **peft.written(method)}
    except ValueError:  # PEFT has the method, and cannot express this one
        return {"peft_type": peft.type, "peftfn": str(method)}
