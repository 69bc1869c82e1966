"""PEFT's files of multitask prompts, both ways: a stack with an adapter for each task.

In an encoder–decoder the first half of PEFT's table is the encoder's prompt, and the second the decoder's. In PEFT the
two multiply with one `rows`; here each has its own, which begin as the same. PEFT's `generate` leaves the decoder's
prompt out, with which it was trained; here it is in every call.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from peftfn.core.plan import Entry
from peftfn.formats.peft_prompt_common import PROMPT, sizes
from peftfn.formats.tensor_files import Tensors as File
from peftfn.model.model import Model
from peftfn.model.place import is_causal

COLS, ROWS = "prefix_task_cols", "prefix_task_rows"
KEYS = (PROMPT, COLS, ROWS)


def sites(model: Model) -> list[str]:
    """The backbones that PEFT gives a prompt: of an encoder–decoder both, the encoder first."""
    return sorted(model.backbones, key=lambda name: is_causal(model.modules[name]))


def leaves(file: File, entries: Mapping[str, Entry]) -> dict[str, dict[str, Tensor]]:
    """What the file has at each of the sites, with all tasks in the first dimension. ValueError for other shapes."""
    whole = {k: file.tensor(k) for k in KEYS}
    out: dict[str, dict[str, Tensor]] = {}
    tasks = len(whole[COLS])
    for i, (site, entry) in enumerate(entries.items()):
        n, d = entry.spec["shared"]
        wanted = {
            PROMPT: (n * len(entries), d),
            COLS: (n * len(entries), *entry.spec["cols"][1:]),
            ROWS: entry.spec["rows"],
        }
        for key, t in whole.items():
            if tuple(t.shape[t.dim() - 2 :]) != tuple(wanted[key]) or t.dim() != (2 if key == PROMPT else 3):
                raise ValueError(
                    f"{file.where}: {key} has shape {list(t.shape)}, and the model needs {list(wanted[key])}"
                )
        own = slice(i * n, (i + 1) * n)
        shared = whole[PROMPT][own].expand(tasks, n, d).clone()
        out[site] = {"shared": shared, "cols": whole[COLS][:, own].clone(), "rows": whole[ROWS].clone()}
    return out


def document(
    mine: Mapping[str, Entry], adapter: Mapping[str, Any], model: Model
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(PEFT's keys, tensors). ValueError where the adapters have no form in PEFT."""
    every = sites(model)
    order = every[: len(mine)]
    if mine.keys() != set(order):
        raise ValueError(
            f"{next(iter(mine))}: PEFT gives a multitask prompt to {every[0]}, or to {' and '.join(every)}, and this "
            f"net to {' and '.join(mine)}: save it in the native format"
        )
    parts: dict[str, list[Tensor]] = {"shared": [], "cols": [], "rows": []}
    for site in order:
        leaf = adapter[site]
        for k, some in parts.items():
            some.append(leaf[k] if leaf["cols"].dim() == 3 else leaf[k][None])  # a stack with tasks=True
        if not torch.equal(parts["shared"][-1], parts["shared"][-1][:1].expand_as(parts["shared"][-1])):
            raise ValueError(f"{site}: PEFT's tasks share one prompt, and these adapters have different ones")
        if not torch.equal(parts["rows"][0], parts["rows"][-1]):
            raise ValueError(
                f"{site}: PEFT's encoder and decoder share the rows of a task, and these adapters have different ones: "
                "save in the native format"
            )
    shared, cols = torch.cat([t[0] for t in parts["shared"]]), torch.cat(parts["cols"], 1)
    n = mine[order[0]].spec["shared"][0]
    more = {"num_virtual_tokens": n, "num_tasks": len(cols), "token_dim": shared.shape[-1]}
    more["num_transformer_submodules"] = len(order)
    return {**more, **sizes(model, order[0])}, {PROMPT: shared, COLS: cols, ROWS: parts["rows"][0]}
